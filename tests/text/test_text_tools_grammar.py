"""Grammars of calls allow exactly what the splitter reads as calls with valid arguments, in every family's syntax."""

from __future__ import annotations

import json

import jsonschema  # type: ignore[import-untyped]
import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from vserve.text.grammar_spec import GrammarKind, GrammarSpec
from vserve.text.parts import CallArguments, CallBegin, merged
from vserve.text.reasoning import Start
from vserve.text.tokenizer import Tokenizer
from vserve.text.tools import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, CallSyntax
from vserve.text.tools_grammar import (
    Function,
    Thought,
    UnboundedError,
    calls,
    calls_at_will,
    free,
    given,
    grammar,
)
from vserve.text.tools_splitter import CallSplitter

SPECIAL = ("<|end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
SYNTAXES = [HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED]


def letters(thinks: bool = True) -> tuple[Tokenizer, LLTokenizer]:
    """A token a byte, the marks as control tokens, and <think> and </think> as ordinary added ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    if thinks:
        core.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    tokenizer = Tokenizer(core, bos_id=None, eos_ids={256}, special_tokens={})
    judge = LLTokenizer(core.to_str(), n_vocab=core.get_vocab_size(), eos_token=256)
    return tokenizer, judge


TOKENIZER, JUDGE = letters()


def allows(spec: GrammarSpec, text: str, tokenizer: Tokenizer = TOKENIZER, judge: LLTokenizer = JUDGE) -> bool:
    """Whether the grammar takes all of the text, and the answer may end there."""
    assert spec.kind is GrammarKind.LARK
    source = LLMatcher.grammar_from_lark(spec.source)
    assert LLMatcher.validate_grammar(source, judge) == ""
    matcher = LLMatcher(judge, source, log_level=0)
    return (
        all(matcher.consume_token(token) for token in tokenizer.encode(text, add_special=False))
        and matcher.is_accepting()
    )


CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/Name"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Name": {"type": "string", "maxLength": 9}},
}
FUNCTIONS = [Function("get_weather", CITY), Function("now"), Function('odd"name', {"properties": {}})]


def written(syntax: CallSyntax, *made: tuple[str, str]) -> str:
    """Calls as a model of the family writes them."""
    if syntax is MISTRAL_NAMED:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in made)
    objects = [f'{{"name": "{name}", "{syntax.key}": {arguments}}}' for name, arguments in made]
    if syntax is HERMES:
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    return "; ".join(objects) if syntax is LLAMA3_JSON else f"[TOOL_CALLS] [{', '.join(objects)}]"


GOOD = ('{"city": "Oslo"}', '{"city":"Oslo","days":3}', '{"city": "Oslo", "days": 12}')
BAD = ("{}", '{"city": 5}', '{"city": "Oslo", "days": 0}', '{"city": "far too long"}', '{"city": "Oslo", "x": 1}', "5")


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_required_calls_are_those_with_valid_arguments_and_are_read_back(syntax: CallSyntax) -> None:
    spec = grammar(calls(syntax, FUNCTIONS, TOKENIZER, many=True), "calls", None, TOKENIZER)
    for arguments in GOOD:
        jsonschema.validate(json.loads(arguments), CITY)
        text = written(syntax, ("get_weather", arguments), ("now", "{}"), ("get_weather", arguments))
        assert allows(spec, text)
        splitter = CallSplitter(syntax, ["get_weather", "now"], hold=False, new_id=lambda: "id")
        parts = merged([*splitter.push(text), *splitter.flush()])
        assert [part.name for part in parts if isinstance(part, CallBegin)] == ["get_weather", "now", "get_weather"]
        assert [part.text for part in parts if isinstance(part, CallArguments)] == [arguments, "{}", arguments]
    for arguments in BAD:
        assert not allows(spec, written(syntax, ("get_weather", arguments)))
    assert not allows(spec, written(syntax, ("nobody", "{}")))
    assert not allows(spec, written(syntax, ("now", '{"a": 1}')))
    assert not allows(spec, "")
    assert not allows(spec, "Hello")


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_without_parallel_calls_there_is_one(syntax: CallSyntax) -> None:
    spec = grammar(calls(syntax, FUNCTIONS, TOKENIZER, many=False), "calls", None, TOKENIZER)
    assert allows(spec, written(syntax, ("now", "{}")))
    assert not allows(spec, written(syntax, ("now", "{}"), ("now", "{}")))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_calls_at_will_leave_text_alone_and_bind_calls(syntax: CallSyntax) -> None:
    spec = grammar(calls_at_will(syntax, FUNCTIONS, TOKENIZER, many=True), "answer", None, TOKENIZER)
    good, bad = written(syntax, ("get_weather", GOOD[0])), written(syntax, ("get_weather", BAD[1]))
    lead = "" if syntax.bare else "Let me look.\n"
    assert allows(spec, "Just text, é <b> [x].\n")
    assert allows(spec, good)
    assert allows(spec, lead + good)
    assert not allows(spec, bad)
    assert not allows(spec, lead + bad)


def thinking(budget: int | None, start: Start = Start.INSIDE) -> Thought:
    return Thought(start, budget, [256])


def test_a_grammar_begins_behind_the_reasoning() -> None:
    rules = given(GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "object"}'))
    inside = grammar(rules, "answer", thinking(None), TOKENIZER)
    assert allows(inside, 'Hm {"a"} é\n</think>\n\n{"a": 1}')
    assert not allows(inside, '{"a": 1}')
    assert not allows(inside, "Hm</think>Hm")
    maybe = grammar(rules, "answer", thinking(None, Start.OPEN), TOKENIZER)
    assert allows(maybe, '<think>Hm</think>{"a": 1}')
    assert allows(maybe, '{"a": 1}')
    assert not allows(maybe, "Hm</think>{}")
    tokenizer, judge = letters(thinks=False)
    spelled = grammar(rules, "answer", thinking(None), tokenizer)
    assert allows(spelled, 'Hm </think>\n{"a": 1}', tokenizer, judge)
    assert not allows(spelled, '{"a": 1}', tokenizer, judge)


@pytest.mark.parametrize("budget", [0, 1, 5, 5000])
def test_a_budget_of_reasoning_ends_it_after_so_many_tokens(budget: int) -> None:
    spec = grammar(free(thinking(budget), TOKENIZER), "answer", thinking(budget), TOKENIZER)
    assert allows(spec, "x" * budget + "</think>\n\nany </think> text")
    assert not allows(spec, "x" * (budget + 1) + "</think>")
    assert allows(spec, "</think>")
    assert not allows(spec, "x" * budget)


def test_a_budget_needs_a_token_that_closes_the_reasoning() -> None:
    tokenizer, _ = letters(thinks=False)
    with pytest.raises(UnboundedError):
        grammar(free(thinking(5), tokenizer), "answer", thinking(5), tokenizer)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (GrammarSpec(GrammarKind.JSON_OBJECT, ""), '{"a": [1]}', "[1]"),
        (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "integer"}'), "12", "x"),
        (GrammarSpec(GrammarKind.JSON_OBJECT, "", ""), '{"a":1}', '{"a": 1}'),
        (GrammarSpec(GrammarKind.JSON_OBJECT, "", " ?"), '{ "a": 1}', '{  "a": 1}'),
        (GrammarSpec(GrammarKind.REGEX, "a+/b"), "aa/b", "b"),
        (GrammarSpec(GrammarKind.REGEX, "a+\\/\n"), "aa/\n", "b"),
        (GrammarSpec(GrammarKind.CHOICE, '["ja", "né\\n"]'), "né\n", "nein"),
        (GrammarSpec(GrammarKind.LARK, 'start: "a" b\nb: "b"'), "ab", "b"),
    ],
)
def test_every_kind_of_constraint_can_stand_behind_reasoning_or_beside_calls(
    spec: GrammarSpec, good: str, bad: str
) -> None:
    behind = grammar(given(spec), "answer", thinking(None), TOKENIZER)
    assert allows(behind, f"Hm</think>\n{good}")
    assert not allows(behind, f"Hm</think>\n{bad}")
    beside = grammar(
        [*calls(HERMES, FUNCTIONS, TOKENIZER, many=True), *given(spec)],
        "(calls | answer)",
        None,
        TOKENIZER,
    )
    assert allows(beside, good)
    assert allows(beside, written(HERMES, ("now", "{}")))
    assert not allows(beside, bad)


def test_gbnf_cannot_stand_behind_anything() -> None:
    with pytest.raises(ValueError, match="Lark"):
        given(GrammarSpec(GrammarKind.LARK, 'root ::= "x"'))
