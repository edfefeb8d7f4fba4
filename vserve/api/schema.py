"""The field tables of the generation and token endpoints: name, kind, bounds, default, meaning, fate.

Every field of the OpenAI and vLLM request schemas has its row: obeyed, refused with 400, or reported as ignored.  What
a request is made of is requests.py's; bounds that need a prompt's length are checked in generation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vserve.api.fields import (
    Bool,
    Field,
    Float,
    Int,
    Kept,
    LogitBias,
    Object,
    Objects,
    OneOf,
    Schema,
    Stops,
    Text,
    TokenIds,
    ignored,
    object_schema,
    read,
    refused,
    table,
)
from vserve.api.prompts import PROMPT_TOKEN_LIMIT, Documents, Message, Messages, Prompt, Prompts, Texts
from vserve.api.responses_fields import (
    Choosing,
    FunctionTools,
    Include,
    Metadata,
    PromptText,
    ReasoningKind,
    ResponseId,
    ResponseToolChoice,
    StreamChoices,
    TextAnswer,
    TextKind,
    Thinking,
)
from vserve.api.responses_items import InputItems, Item
from vserve.api.structured import (
    WHITESPACE,
    Choices,
    Constraint,
    ResponseFormat,
    SchemaKind,
    Source,
    StructuredOutputs,
)
from vserve.api.tools import FunctionChoiceKind, Functions, Tool, ToolChoice, ToolChoiceKind, Tools
from vserve.errors import BadRequest
from vserve.text.grammar_spec import GrammarKind

MAX_LOGPROBS = 20
_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What a stream says beside the text.  ignored: option names without effect."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    ignored: tuple[str, ...] = ()


INCLUDE_USAGE: Field[bool] = Field("include_usage", Bool(), False, "one last chunk with the token counts")
CONTINUOUS_USAGE: Field[bool] = Field("continuous_usage_stats", Bool(), False, "token counts in every chunk")
STREAM_OPTION_LIMIT = 16
STREAM_OPTION_ROWS = table(INCLUDE_USAGE, CONTINUOUS_USAGE)


@dataclass(frozen=True, slots=True)
class StreamOptionsKind:
    """An object with include_usage and continuous_usage_stats."""

    def check(self, value: object, path: str, vocab_size: int) -> StreamOptions:
        body = Object(STREAM_OPTION_LIMIT).check(value, path, vocab_size)
        try:
            values, unknown = read(body, STREAM_OPTION_ROWS, vocab_size, strict=False)
        except BadRequest as error:
            raise BadRequest(f"`{path}`: {error.message}", param=f"{path}.{error.param}") from None
        return StreamOptions(
            values[INCLUDE_USAGE], values[CONTINUOUS_USAGE], tuple(f"{path}.{name}" for name in unknown)
        )

    def schema(self) -> Schema:
        return {**object_schema(STREAM_OPTION_ROWS, strict=False), "maxProperties": STREAM_OPTION_LIMIT}


# Rows that chat and completions share.
MODEL: Field[str | None] = Field("model", Text(512), None, "served model; missing, null or empty: the default one")
N: Field[int] = Field("n", Int(1, 128), 1, "choices for each prompt")
STREAM: Field[bool] = Field("stream", Bool(), False, "send the answer as server-sent events")
STREAM_OPTIONS: Field[StreamOptions | None] = Field(
    "stream_options", StreamOptionsKind(), None, "what a stream says beside the text; only with stream"
)
MAX_TOKENS: Field[int | None] = Field(
    "max_tokens", Int(1, _INT32), None, "most tokens of one choice; chat: what is left of the context by default"
)
MIN_TOKENS: Field[int] = Field(
    "min_tokens", Int(0, _INT32), 0, "tokens before anything but max_tokens can end a choice"
)
TEMPERATURE: Field[float | None] = Field("temperature", Float(0, 2), None, "0 is greedy; model's own default, else 1")
TOP_P: Field[float | None] = Field("top_p", Float(0, 1, above=True), None, "smallest set of tokens with this mass")
TOP_K: Field[int | None] = Field("top_k", Int(-1, _INT32), None, "draw from the k most likely; 0 and -1: all")
MIN_P: Field[float | None] = Field("min_p", Float(0, 1), None, "least probability relative to the most likely token")
REPETITION: Field[float | None] = Field(
    "repetition_penalty", Float(0, 100, above=True), None, "divides logits of tokens seen in prompt or answer; 1 is off"
)
PRESENCE: Field[float] = Field("presence_penalty", Float(-2, 2), 0.0, "subtracted once from tokens already drawn")
FREQUENCY: Field[float] = Field("frequency_penalty", Float(-2, 2), 0.0, "subtracted for each time a token was drawn")
LOGIT_BIAS: Field[tuple[tuple[int, float], ...]] = Field(
    "logit_bias", LogitBias(1024), (), "added to the logits of these token ids"
)
SEED: Field[int | None] = Field(
    "seed", Int(-(2**63), 2**63 - 1), None, "same seed, same text; choice i draws with seed + i; -1: a fresh one"
)
STOP: Field[tuple[str, ...]] = Field("stop", Stops(64, 1024), (), "strings that end a choice")
STOP_TOKEN_IDS: Field[Sequence[int]] = Field("stop_token_ids", TokenIds(1024), (), "token ids that end a choice")
INCLUDE_STOP: Field[bool] = Field("include_stop_str_in_output", Bool(), False, "leave the stop string in the text")
IGNORE_EOS: Field[bool] = Field("ignore_eos", Bool(), False, "go on after the model's end-of-text tokens")
SKIP_SPECIAL: Field[bool] = Field("skip_special_tokens", Bool(), True, "leave special tokens out of the text")
TRUNCATE: Field[int | None] = Field(
    "truncate_prompt_tokens", Kept(_INT32), None, "keep only the last so many prompt tokens; -1: as many as fit"
)
PRIORITY: Field[int] = Field("priority", Int(-_INT32, _INT32), 0, "lower is served earlier")
CACHE_SALT: Field[str | None] = Field(
    "cache_salt", Text(1024, 1), None, "prefix-cache blocks are shared only with requests of the same salt"
)
TIMEOUT_MS: Field[int | None] = Field(
    "timeout_ms", Int(1, 86_400_000), None, "milliseconds until the request ends with 504"
)
REQUEST_ID: Field[str | None] = Field(
    "request_id", Text(128, 1, visible=True), None, "part of the reply's id; otherwise X-Request-Id is"
)
USER: Field[str | None] = Field("user", Text(4096), None, "the operator's to use; no effect on the answer")
RETURN_TOKEN_IDS: Field[bool] = Field("return_token_ids", Bool(), False, "prompt_token_ids and token_ids in the reply")
TOKENS_AS_IDS: Field[bool] = Field(
    "return_tokens_as_token_ids", Bool(), False, 'tokens of logprobs as "token_id:N" instead of text'
)

PROMPT_LOGPROBS: Field[int | None] = Field(
    "prompt_logprobs", Int(0, MAX_LOGPROBS), None, "log-probabilities of the prompt's tokens and so many likely others"
)
BAD_WORDS: Field[tuple[str, ...]] = Field("bad_words", Stops(128, 256), (), "words that must not appear in the answer")
ALLOWED_IDS: Field[Sequence[int] | None] = Field(
    "allowed_token_ids", TokenIds(2**18), None, "the only token ids that may be drawn"
)
RESPONSE_FORMAT: Field[Constraint | None] = Field(
    "response_format", ResponseFormat(), None, "the answer is text, a JSON object, or JSON that follows a schema"
)
STRUCTURED_OUTPUTS: Field[Constraint | None] = Field(
    "structured_outputs", StructuredOutputs(), None, "the answer follows a schema, a pattern, a choice or a grammar"
)
GUIDED_JSON: Field[Constraint | None] = Field(
    "guided_json", SchemaKind(), None, "older name of structured_outputs.json"
)
GUIDED_REGEX: Field[Constraint | None] = Field(
    "guided_regex", Source(GrammarKind.REGEX), None, "older name of structured_outputs.regex"
)
GUIDED_CHOICE: Field[Constraint | None] = Field(
    "guided_choice", Choices(), None, "older name of structured_outputs.choice"
)
GUIDED_GRAMMAR: Field[Constraint | None] = Field(
    "guided_grammar", Source(GrammarKind.LARK), None, "older name of structured_outputs.grammar"
)
GUIDED_WHITESPACE: Field[str | None] = Field(
    "guided_whitespace_pattern", WHITESPACE, None, "older name of structured_outputs.whitespace_pattern"
)

_SHARED: tuple[object, ...] = (
    MODEL, N, STREAM, STREAM_OPTIONS, MAX_TOKENS, MIN_TOKENS, TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION, PRESENCE,
    FREQUENCY, LOGIT_BIAS, SEED, STOP, STOP_TOKEN_IDS, INCLUDE_STOP, IGNORE_EOS, SKIP_SPECIAL, TRUNCATE, PRIORITY,
    CACHE_SALT, TIMEOUT_MS, REQUEST_ID, USER, RETURN_TOKEN_IDS, TOKENS_AS_IDS,
    RESPONSE_FORMAT, STRUCTURED_OUTPUTS, GUIDED_JSON, GUIDED_REGEX, GUIDED_CHOICE, GUIDED_GRAMMAR, GUIDED_WHITESPACE,
    refused("guided_decoding_backend", "there is one back end", ("auto", "guidance", "llguidance")),
    PROMPT_LOGPROBS, BAD_WORDS, ALLOWED_IDS,
    refused("use_beam_search", "beam search", (False,)),
    refused("length_penalty", "beam search", (1, 1.0)),
    refused("early_stopping", "beam search", (False,)),
    refused("logits_processors", "code from the request", ([],)),
    refused("kv_transfer_params", "transfer of cached prompts between servers"),
    refused("vllm_xargs", "arguments of engine extensions", ({},)),
    refused("prompt_embeds", "prompts as vectors"),
    ignored("spaces_between_special_tokens", "text is joined without added spaces, as for false", (False,)),
    ignored("metadata", "goes with store", ({},)),
    ignored("service_tier", "there is one tier", ("auto", "default")),
    ignored("safety_identifier", "no moderation is done"),
    ignored("prompt_cache_key", "equal prompt beginnings are found without a key"),
    ignored("prompt_cache_retention", "cached prompts live as long as there is room"),
)  # fmt: skip

# Chat only.
MESSAGES: Field[tuple[Message, ...]] = Field("messages", Messages(), (), "the conversation", required=True)
MAX_COMPLETION_TOKENS: Field[int | None] = Field(
    "max_completion_tokens", Int(1, _INT32), None, "as max_tokens, and wins over it"
)
LOGPROBS: Field[bool] = Field("logprobs", Bool(), False, "log-probabilities of the drawn tokens")
TOP_LOGPROBS: Field[int] = Field("top_logprobs", Int(0, MAX_LOGPROBS), 0, "most likely tokens at each place")
ECHO: Field[bool] = Field("echo", Bool(), False, "begin with the prompt; chat: with a last message of the assistant")
ADD_GENERATION_PROMPT: Field[bool] = Field("add_generation_prompt", Bool(), True, "open the assistant's turn")
CONTINUE_FINAL: Field[bool] = Field(
    "continue_final_message", Bool(), False, "leave the last message open and go on with it"
)
ADD_SPECIAL_CHAT: Field[bool] = Field(
    "add_special_tokens", Bool(), False, "add the tokenizer's own first token to what the template made"
)
ADD_SPECIAL: Field[bool] = Field("add_special_tokens", Bool(), True, "add the tokenizer's own first token")
DOCUMENTS: Field[tuple[dict[str, object], ...]] = Field("documents", Objects(1024), (), "for the chat template")
TEMPLATE_KWARGS: Field[dict[str, object]] = Field(
    "chat_template_kwargs",
    Object(
        64,
        frozenset(
            {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
             "tokenize", "bos_token", "eos_token", "raise_exception", "strftime_now"}
        ),
    ),
    {},
    "further variables of the chat template",
)  # fmt: skip

TOOLS: Field[tuple[Tool, ...]] = Field("tools", Tools(), (), "functions that the model may call")
TOOL_CHOICE: Field[ToolChoice | None] = Field(
    "tool_choice", ToolChoiceKind(), None, "none, auto (the default), required, or the one function to call"
)
PARALLEL: Field[bool] = Field("parallel_tool_calls", Bool(), True, "more than one call in an answer")
FUNCTIONS: Field[tuple[Tool, ...]] = Field("functions", Functions(), (), "older form of tools; one call an answer")
FUNCTION_CALL: Field[ToolChoice | None] = Field(
    "function_call", FunctionChoiceKind(), None, "older form of tool_choice"
)
INCLUDE_REASONING: Field[bool] = Field("include_reasoning", Bool(), True, "send the model's reasoning, too")
EFFORT: Field[str | None] = Field(
    "reasoning_effort",
    OneOf(("none", "minimal", "low", "medium", "high", "xhigh", "max")),
    None,
    "for the chat template, where it has such a dial or a switch (none); otherwise reported as ignored",
)
THINKING_BUDGET: Field[int | None] = Field(
    "thinking_token_budget", Int(0, _INT32), None, "most tokens of reasoning; then it is closed and the answer begins"
)

CHAT = table(
    *_SHARED, MESSAGES, MAX_COMPLETION_TOKENS, LOGPROBS, TOP_LOGPROBS, ECHO, ADD_GENERATION_PROMPT, CONTINUE_FINAL,
    ADD_SPECIAL_CHAT, DOCUMENTS, TEMPLATE_KWARGS, TOOLS, TOOL_CHOICE, PARALLEL, FUNCTIONS, FUNCTION_CALL,
    INCLUDE_REASONING, EFFORT, THINKING_BUDGET,
    refused("chat_template", "a template from the request"),
    refused("mm_processor_kwargs", "images and audio", ({},)),
    refused("modalities", "answers other than text", (["text"],)),
    refused("audio", "answers as audio"),
    refused("web_search_options", "web search"),
    refused("prompt", "a field of /v1/completions"),
    ignored("verbosity", "the model has no such dial", ("medium",)),
    ignored("prediction", "a hint for speed"),
    ignored("store", "answers of this endpoint are not stored", (False,)),
)  # fmt: skip

# Completions only.
PROMPT: Field[tuple[Prompt, ...]] = Field("prompt", Prompts(), (), "one prompt or many", required=True)
MAX_TOKENS_OR_0: Field[int | None] = Field(
    "max_tokens", Int(0, _INT32), None, "most tokens of one choice, 16 by default; 0 only with echo"
)
LOGPROBS_COUNT: Field[int | None] = Field(
    "logprobs", Int(0, MAX_LOGPROBS), None, "log-probabilities of the drawn tokens and so many of the most likely"
)
BEST_OF: Field[int | None] = Field("best_of", Int(1, 128), None, "must equal n: every choice drawn is returned")

COMPLETIONS = table(
    *(row for row in _SHARED if row is not MAX_TOKENS), PROMPT, MAX_TOKENS_OR_0, LOGPROBS_COUNT, ECHO, ADD_SPECIAL,
    BEST_OF,
    refused("suffix", "filling in the middle", ("",)),
    refused("messages", "a field of /v1/chat/completions"),
)  # fmt: skip

# Token endpoints.
TEXT_PROMPT: Field[str | tuple[str, ...] | None] = Field("prompt", Texts(), None, "a text or a list of texts")
TEXT: Field[str | tuple[str, ...] | None] = Field("text", Texts(), None, "other name of prompt")
TOKENIZE_MESSAGES: Field[tuple[Message, ...] | None] = Field("messages", Messages(), None, "a conversation")
TOKEN_STRS: Field[bool] = Field("return_token_strs", Bool(), False, "also each token's text")
ADD_SPECIAL_ANY: Field[bool | None] = Field(
    "add_special_tokens", Bool(), None, "add the tokenizer's own first token; true for texts, false for messages"
)
TOKENS: Field[list[int] | None] = Field("tokens", TokenIds(PROMPT_TOKEN_LIMIT), None, "token ids")
TOKEN_IDS: Field[list[int] | None] = Field("token_ids", TokenIds(PROMPT_TOKEN_LIMIT), None, "other name of tokens")
KEEP_SPECIAL: Field[bool] = Field("skip_special_tokens", Bool(), False, "leave special tokens out of the text")

TOKENIZE = table(
    MODEL, TEXT_PROMPT, TEXT, TOKENIZE_MESSAGES, TOKEN_STRS, ADD_SPECIAL_ANY, ADD_GENERATION_PROMPT, CONTINUE_FINAL,
    TEMPLATE_KWARGS, DOCUMENTS, TOOLS,
    refused("chat_template", "a template from the request"),
    refused("mm_processor_kwargs", "images and audio", ({},)),
)  # fmt: skip
DETOKENIZE = table(MODEL, TOKENS, TOKEN_IDS, KEEP_SPECIAL)

# Responses.  What is not here but in PASSED_ON is chat's own row: the value is handed on as it came.
RESPONSE_INPUT: Field[tuple[Item, ...] | None] = Field(
    "input", InputItems(), None, "a text, or the items of a conversation"
)
PROMPT_TEXT: Field[str | None] = Field("prompt", PromptText(), None, "short form: a text, answered in the background")
INSTRUCTIONS: Field[str | None] = Field("instructions", Text(2**24), None, "a system message before the conversation")
BACKGROUND: Field[bool | None] = Field(
    "background", Bool(), None, "answer at once and go on without the client; only with store; true for prompt"
)
MAX_OUTPUT_TOKENS: Field[int | None] = Field(
    "max_output_tokens", Int(1, _INT32), None, "most tokens of the answer; what is left of the context by default"
)
METADATA: Field[dict[str, str]] = Field("metadata", Metadata(), {}, "up to 16 pairs of strings, returned as they came")
PREVIOUS: Field[str | None] = Field(
    "previous_response_id",
    ResponseId(),
    None,
    "go on from this response: its whole conversation comes before the input",
)
REASONING: Field[Thinking] = Field("reasoning", ReasoningKind(), Thinking(), "how much the model is to reason: effort")
STORE: Field[bool] = Field("store", Bool(), True, "keep the response, to be retrieved or gone on from")
STREAM_CHOICES: Field[tuple[str, ...]] = Field("stream_options", StreamChoices(), (), "events are sent without padding")
TEXT_ANSWER: Field[TextAnswer] = Field(
    "text", TextKind(), TextAnswer(), "format of the answer: text or JSON; verbosity"
)
RESPONSE_TOOLS: Field[tuple[dict[str, object], ...]] = Field("tools", FunctionTools(), (), "functions of the client")
RESPONSE_TOOL_CHOICE: Field[Choosing | None] = Field(
    "tool_choice", ResponseToolChoice(), None, "which functions may be called"
)
TRUNCATION: Field[str] = Field(
    "truncation", OneOf(("disabled", "auto")), "disabled", "auto: leave out the oldest items when there are too many"
)
INCLUDE: Field[tuple[str, ...]] = Field("include", Include(), (), "log-probabilities of the text")
_NO_TOOLS = "the server runs no tools of its own"

PASSED_ON = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "min_tokens", "truncate_prompt_tokens", "priority", "cache_salt", "timeout_ms",
    "user", "parallel_tool_calls", "allowed_token_ids", "bad_words", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend", "guided_whitespace_pattern",
    "documents", "chat_template_kwargs", "add_special_tokens", "include_reasoning", "thinking_token_budget",
    "chat_template", "mm_processor_kwargs", "logits_processors", "kv_transfer_params", "vllm_xargs", "service_tier",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip

RESPONSES = table(
    *(CHAT[name] for name in PASSED_ON), RESPONSE_INPUT, PROMPT_TEXT, INSTRUCTIONS, BACKGROUND, MAX_OUTPUT_TOKENS,
    METADATA, PREVIOUS, REASONING, STORE, STREAM, STREAM_CHOICES, TEXT_ANSWER, RESPONSE_TOOLS, RESPONSE_TOOL_CHOICE,
    TRUNCATION, INCLUDE, TOP_LOGPROBS,
    refused("conversation", "conversations kept by the server; previous_response_id goes on from a response"),
    refused("n", "several answers", (1,)),
    refused("messages", "a field of /v1/chat/completions; this endpoint has input"),
    refused("max_tokens", "a field of /v1/chat/completions; this endpoint has max_output_tokens"),
    refused("max_completion_tokens", "a field of /v1/chat/completions; this endpoint has max_output_tokens"),
    refused("response_format", "a field of /v1/chat/completions; this endpoint has text.format"),
    refused("logprobs", "a field of /v1/chat/completions; this endpoint has include and top_logprobs", (False,)),
    refused("prompt_logprobs", "log-probabilities of the prompt"),
    refused("echo", "the prompt in the answer", (False,)),
    refused("continue_final_message", "an answer that goes on with the last message", (False,)),
    refused("moderation", "judging what is said"),
    refused("context_management", "compacting a conversation", ([],)),
    ignored("max_tool_calls", _NO_TOOLS),
    ignored("background_options", "a background response starts as soon as there is room"),
    ignored("prompt_cache_options", "equal prompt beginnings are found without being told"),
    ignored("image", "there are no images"),
    ignored("access_programs", "there are none"),
    ignored("request_id", "ids of responses are the server's own"),
    ignored("return_token_ids", "a response has no place for token ids", (False,)),
    ignored("return_tokens_as_token_ids", "tokens are shown as text", (False,)),
)  # fmt: skip

# Embedding endpoints.
MAX_INPUTS = 2048
INPUT: Field[tuple[Prompt, ...]] = Field(
    "input", Prompts(MAX_INPUTS), (), "a text, token ids, or a list of either", required=True
)
ENCODING_FORMAT: Field[str] = Field(
    "encoding_format", OneOf(("float", "base64")), "float", "numbers, or little-endian float32 in base64"
)
DIMENSIONS: Field[int | None] = Field(
    "dimensions", Int(1, 2**20), None, "keep so many numbers of a vector; only the sizes that the model was made for"
)
NORMALIZE: Field[bool | None] = Field(
    "normalize", Bool(), None, "vectors of length 1, or as the model made them; the model's own choice by default"
)
TRUNCATE_INPUT: Field[int | None] = Field(
    "truncate_prompt_tokens", Kept(_INT32), None, "keep the first so many tokens of an input; -1: as many as fit"
)
_ENCODER: tuple[object, ...] = (
    MODEL, TRUNCATE_INPUT, PRIORITY, TIMEOUT_MS, REQUEST_ID, USER,
    refused("truncation_side", "inputs are cut at their end", ("right",)),
    refused("mm_processor_kwargs", "images and audio", ({},)),
    ignored("cache_salt", "nothing is cached"),
    ignored("additional_data", "data for extensions", ({},)),
)  # fmt: skip
EMBEDDINGS = table(
    *_ENCODER, INPUT, ENCODING_FORMAT, DIMENSIONS, NORMALIZE, ADD_SPECIAL,
    refused("messages", "embeddings of conversations"),
    refused("embed_dtype", "numbers other than float32", ("float32",)),
    refused("endianness", "big-endian numbers", ("native", "little")),
)  # fmt: skip

TEXT_1: Field[str | tuple[str, ...] | None] = Field("text_1", Texts(MAX_INPUTS), None, "one text, or as many as text_2")
TEXT_2: Field[str | tuple[str, ...] | None] = Field("text_2", Texts(MAX_INPUTS), None, "the texts to compare it with")
QUERIES: Field[str | tuple[str, ...] | None] = Field("queries", Texts(MAX_INPUTS), None, "other name of text_1")
SCORE_DOCUMENTS: Field[str | tuple[str, ...] | None] = Field(
    "documents", Texts(MAX_INPUTS), None, "other name of text_2"
)
SCORE = table(*_ENCODER, TEXT_1, TEXT_2, QUERIES, SCORE_DOCUMENTS)

QUERY: Field[str] = Field("query", Text(2**24), "", "what the documents are compared with", required=True)
DOCUMENTS_RANKED: Field[tuple[str, ...]] = Field(
    "documents", Documents(MAX_INPUTS), (), "strings, or objects with a text", required=True
)
TOP_N: Field[int] = Field("top_n", Int(0, _INT32), 0, "return only the best so many; 0: all")
RETURN_DOCUMENTS: Field[bool] = Field("return_documents", Bool(), True, "each result has its document's text")
RERANK = table(
    *_ENCODER, QUERY, DOCUMENTS_RANKED, TOP_N, RETURN_DOCUMENTS,
    refused("rank_fields", "documents of several fields", (["text"],)),
    refused("max_chunks_per_doc", "documents in several pieces"),
    refused("max_tokens_per_doc", "a limit for documents alone; truncate_prompt_tokens cuts query and document"),
)  # fmt: skip
