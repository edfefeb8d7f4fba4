"""The field tables of /v1/messages: Anthropic's requests, as far as a text model can serve them.

Owns what one field may hold; what becomes of it is messages_chat.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

from vserve.api.fields import (
    Bool,
    Field,
    Float,
    Int,
    Object,
    OneOf,
    Schema,
    Table,
    Text,
    ignored,
    refused,
    table,
)
from vserve.api.nested import Checked, Items, Record, Tagged
from vserve.api.prompts import MESSAGE_LIMIT
from vserve.api.schema import MODEL, STREAM

_INT32 = 2**31 - 1
BLOCK_LIMIT = 4096
TOOL_LIMIT = 128
_ANY_TEXT = Text(2**31)
_CACHE = ignored("cache_control", "equal prompt beginnings are found without a mark")
_CITATIONS = ignored("citations", "no document is cited", ([],))
_NOTE = "; the model reads text only"


@dataclass(frozen=True, slots=True)
class TextOr:
    """A string, or a list of tagged blocks; a string counts as one block of type text."""

    blocks: Items[Checked]

    def check(self, value: object, path: str, vocab_size: int) -> str | tuple[Checked, ...]:
        return value if isinstance(value, str) else self.blocks.check(value, path, vocab_size)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, self.blocks.schema()]}


Blocks = str | tuple[Checked, ...]


def _blocks(tables: dict[str, Table], least: int = 0) -> TextOr:
    return TextOr(Items(Tagged(tables, note=_NOTE), BLOCK_LIMIT, least))


# Blocks of content.
BLOCK_TEXT: Field[str] = Field("text", _ANY_TEXT, "", "the text", required=True)
THOUGHT: Field[str] = Field("thinking", _ANY_TEXT, "", "earlier reasoning, for the chat template", required=True)
CALL_ID: Field[str] = Field("id", Text(256, 1), "", "the call's id", required=True)
CALL_NAME: Field[str] = Field("name", Text(256, 1), "", "the tool's name", required=True)
CALL_INPUT: Field[dict[str, object]] = Field("input", Object(4096), {}, "the call's arguments", required=True)
RESULT_OF: Field[str] = Field("tool_use_id", Text(256, 1), "", "the call that this is the result of", required=True)
_TEXT_BLOCK: dict[str, Table] = {"text": table(BLOCK_TEXT, _CACHE, _CITATIONS)}
RESULT: Field[Blocks] = Field("content", _blocks(_TEXT_BLOCK), "", "what the tool gave back")
USER_BLOCKS: dict[str, Table] = {
    **_TEXT_BLOCK,
    "tool_result": table(RESULT_OF, RESULT, _CACHE, ignored("is_error", "the content says it", (False,))),
}
ASSISTANT_BLOCKS: dict[str, Table] = {
    **_TEXT_BLOCK,
    "thinking": table(THOUGHT, ignored("signature", "nothing is signed", ("",))),
    "tool_use": table(CALL_ID, CALL_NAME, CALL_INPUT, _CACHE, ignored("caller", "the model", ({"type": "direct"},))),
}
SAID: Field[Blocks] = Field("content", _blocks(USER_BLOCKS, 1), "", "text, or blocks", required=True)
ANSWERED: Field[Blocks] = Field("content", _blocks(ASSISTANT_BLOCKS), "", "text, or blocks", required=True)
TURN_TABLES: dict[str, Table] = {"user": table(SAID), "assistant": table(ANSWERED)}

# Tools.
TOOL_NAME: Field[str] = Field("name", Text(128, 1), "", "the tool's name", required=True)
TOOL_HELP: Field[str | None] = Field("description", Text(2**20), None, "what the tool does")
TOOL_INPUT: Field[dict[str, object]] = Field(
    "input_schema", Object(4096), {}, "JSON Schema of its input", required=True
)
TOOL_STRICT: Field[bool] = Field("strict", Bool(), False, "the input is made to follow the schema")
TOOL_ROWS = table(
    TOOL_NAME, TOOL_HELP, TOOL_INPUT, TOOL_STRICT, _CACHE,
    refused("type", "tools that the server would run itself", ("custom",)),
    ignored("eager_input_streaming", "input is streamed as it is made"),
    ignored("input_examples", "the description is all the model is told"),
    ignored("defer_loading", "all tools are shown to the model", (False,)),
    ignored("allowed_callers", "the model alone calls", (["direct"],)),
)  # fmt: skip
ONE_CALL: Field[bool] = Field("disable_parallel_tool_use", Bool(), False, "at most one call")
CHOSEN: Field[str] = Field("name", Text(128, 1), "", "the tool to call", required=True)
CHOICE_TABLES: dict[str, Table] = {
    "auto": table(ONE_CALL),
    "any": table(ONE_CALL),
    "tool": table(CHOSEN, ONE_CALL),
    "none": table(),
}

# Reasoning and shape of the answer.
_DISPLAY = ignored("display", "reasoning is shown as it is", ("summarized", "full"))
BUDGET: Field[int | None] = Field("budget_tokens", Int(1, _INT32), None, "most tokens of reasoning", required=True)
THINKING_TABLES: dict[str, Table] = {
    "enabled": table(BUDGET, _DISPLAY),
    "adaptive": table(_DISPLAY),
    "disabled": table(),
}
SCHEMA: Field[dict[str, object]] = Field("schema", Object(4096), {}, "JSON Schema of the answer", required=True)
FORMAT: Field[Checked | None] = Field(
    "format", Tagged({"json_schema": table(SCHEMA)}), None, "the answer is JSON that follows a schema"
)
EFFORT: Field[str | None] = Field(
    "effort", OneOf(("low", "medium", "high", "xhigh", "max")), None, "how much to reason"
)
USER_ID: Field[str | None] = Field("user_id", Text(4096), None, "the operator's to use; no effect on the answer")

SYSTEM: Field[Blocks | None] = Field("system", _blocks(_TEXT_BLOCK), None, "instructions before the conversation")
TURNS: Field[tuple[Checked, ...]] = Field(
    "messages", Items(Tagged(TURN_TABLES, by="role"), MESSAGE_LIMIT, 1), (), "the conversation", required=True
)
MAX_TOKENS: Field[int | None] = Field("max_tokens", Int(1, _INT32), None, "most tokens of the answer", required=True)
STOP_SEQUENCES: Field[tuple[str, ...]] = Field(
    "stop_sequences", Items(Text(1024, 1), 64), (), "strings that end the answer"
)
TEMPERATURE: Field[float | None] = Field(
    "temperature", Float(0, 1), None, "0 is greedy; the model's own default, else 1"
)
TOP_P: Field[float | None] = Field("top_p", Float(0, 1, above=True), None, "smallest set of tokens with this mass")
TOP_K: Field[int | None] = Field("top_k", Int(0, _INT32), None, "draw from the k most likely; 0: all")
TOOLS: Field[tuple[Checked, ...]] = Field("tools", Items(Record(TOOL_ROWS), TOOL_LIMIT), (), "tools the model may call")
TOOL_CHOICE: Field[Checked | None] = Field("tool_choice", Tagged(CHOICE_TABLES), None, "whether it has to call one")
THINKING: Field[Checked | None] = Field("thinking", Tagged(THINKING_TABLES), None, "whether to reason first")
METADATA: Field[Checked | None] = Field("metadata", Record(table(USER_ID)), None, "of the request")
OUTPUT: Field[Checked | None] = Field(
    "output_config", Record(table(FORMAT, EFFORT)), None, "the shape of the answer and the effort it is worth"
)

_COUNTED: tuple[object, ...] = (
    MODEL, SYSTEM, TURNS, TOOLS, TOOL_CHOICE, THINKING, OUTPUT, _CACHE,
    refused("mcp_servers", "tools of other servers", ([],)),
    refused("context_management", "edits of the conversation by the server"),
    ignored("speed", "there is one speed", ("standard",)),
    ignored("user_profile_id", "there are no profiles"),
    ignored("workspace_id", "there are no workspaces"),
)  # fmt: skip
MESSAGES = table(
    *_COUNTED, MAX_TOKENS, STREAM, STOP_SEQUENCES, TEMPERATURE, TOP_P, TOP_K, METADATA,
    refused("container", "code run by the server"),
    ignored("service_tier", "there is one tier", ("auto", "standard_only")),
    ignored("inference_geo", "there is one place"),
    ignored("diagnostics", "none are kept"),
)  # fmt: skip
COUNT_TOKENS = table(*_COUNTED)
