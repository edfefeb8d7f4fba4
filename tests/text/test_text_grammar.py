"""Grammars of the default model's vocabulary: random text under a mask is valid; hostile sources harm themselves."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vserve.errors import BadRequest
from vserve.model import source
from vserve.text import gguf_vocab, grammar
from vserve.text.grammar import Grammars
from vserve.text.grammar_spec import GrammarKind, GrammarSpec
from vserve.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    metadata = source.resolve(None, environ=os.environ).gguf_metadata
    assert metadata is not None
    return gguf_vocab.build(metadata)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)
    yield made
    made.close()


def written(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, seed: int, most: int = 200) -> str | None:
    """Random text that the grammar allows; None if it does not end.  It prefers to end."""
    matcher = grammars.compile(spec, "field").matcher()
    draw, ids = random.Random(seed), list[int]()
    while len(ids) < most:
        bits = int.from_bytes(matcher.mask(ids), "little")
        assert bits.bit_length() <= tokenizer.vocab_size
        if any(bits >> end & 1 for end in tokenizer.eos_ids):
            return tokenizer.decode(ids)
        allowed = [id for id in draw.sample(range(tokenizer.vocab_size), 3000) if bits >> id & 1]
        ids.append(draw.choice(allowed) if allowed else (bits & -bits).bit_length() - 1)
    return None


def schema_of(value: object) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value), "")


_LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 500},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{2}$"},
        {"enum": ["ä", "日本", 1, None]},
        {"const": {"x": [1, "y"]}},
    ]
)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda one: {"type": "array", "items": one, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
        st.dictionaries(st.sampled_from(["a", "b c", "ключ", '"']), inner, min_size=1, max_size=3).map(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": list(fields)[:1],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 9))
def test_random_text_under_a_schemas_mask_follows_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    text = written(grammars, tokenizer, schema_of(schema), seed)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("spec", "holds"),
    [
        (GrammarSpec(GrammarKind.REGEX, r"[a-z]{2,5}\d+"), lambda text: re.fullmatch(r"[a-z]{2,5}\d+", text)),
        (GrammarSpec(GrammarKind.CHOICE, '["a\\nb", "\\u00fc\\"", "x"]'), lambda text: text in ("a\nb", 'ü"', "x")),
        (GrammarSpec(GrammarKind.LARK, 'start: "<" /[0-9]/ ">"'), lambda text: re.fullmatch("<[0-9]>", text)),
        (GrammarSpec(GrammarKind.LARK, 'root ::= "<" [0-9] ">"'), lambda text: re.fullmatch("<[0-9]>", text)),
        (GrammarSpec(GrammarKind.JSON_OBJECT, ""), lambda text: isinstance(json.loads(text), dict)),
        (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type":"array","items":{"const":1},"minItems":2,"maxItems":2}', "_"),
         lambda text: text.replace("_", "") == "[1,1]"),
    ],
)  # fmt: skip
def test_every_kind_of_source_is_followed(
    grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, holds: Callable[[str], object]
) -> None:
    for seed in range(5):
        text = written(grammars, tokenizer, spec, seed)
        assert text is None or holds(text), text


def test_a_matcher_goes_on_from_what_it_has_seen_and_asking_twice_changes_nothing(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    compiled = grammars.compile(GrammarSpec(GrammarKind.CHOICE, '["abcabc", "abd"]'), "field")
    one, other = compiled.matcher(), compiled.matcher()
    ids = tokenizer.encode("ab", add_special=False)
    assert one.mask([]) == one.mask([]) == other.mask([])
    assert one.mask(ids) == one.mask(ids) != other.mask([])
    assert other.mask(ids) == one.mask(ids)
    afresh = one.afresh()  # for an answer that goes on elsewhere: it reads what was drawn, all at once
    assert afresh.mask(ids) == one.mask(ids)
    assert one.afresh().mask([]) == compiled.matcher().mask([])


def test_only_ids_that_end_the_answer_follow_a_complete_one(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.compile(GrammarSpec(GrammarKind.CHOICE, '["no"]'), "field").matcher()
    bits = int.from_bytes(matcher.mask(tokenizer.encode("no", add_special=False)), "little")
    assert {id for id in range(tokenizer.vocab_size) if bits >> id & 1} == tokenizer.eos_ids


def test_what_was_compiled_is_kept_within_bounds(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [GrammarSpec(GrammarKind.REGEX, f"a{i}") for i in range(5)]
    monkeypatch.setattr(grammar, "KEPT", 3)
    for spec in specs:
        grammars.compile(spec, "field")
    assert [grammars.kept(spec) is not None for spec in specs] == [False, False, True, True, True]
    assert grammars.compile(specs[-1], "field") is grammars.kept(specs[-1])
    monkeypatch.setattr(grammar, "KEPT_CHARS", 3)
    grammars.compile(GrammarSpec(GrammarKind.REGEX, "b" * 10), "field")
    assert [grammars.kept(spec) for spec in specs] == [None] * 5


_RULES = "\n".join(f'r{i}: "x" r{i + 1}' for i in range(20_000))
HOSTILE = {
    "a stack overflow": GrammarSpec(GrammarKind.LARK, f'start: r0\n{_RULES}\nr20000: "z"'),
    "a chain of references": schema_of(
        {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/d0"}
    ),
    "itself": schema_of({"$ref": "#"}),
    "an unknown keyword": schema_of({"type": "object", "dependentSchemas": {}, "not": {}}),
    "nested repetition": GrammarSpec(GrammarKind.REGEX, "((((a{100}){100}){100}){100})"),
    "many stars": GrammarSpec(GrammarKind.REGEX, ".*" * 500 + "x"),
    "deep nesting": GrammarSpec(GrammarKind.LARK, "start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "broken": GrammarSpec(GrammarKind.REGEX, "(("),
    "GBNF without an end": GrammarSpec(GrammarKind.LARK, "root ::= (" * 3000),
    "every branch of every branch": schema_of(
        {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"const": j}}} for j in range(8)]} for i in range(12)]}
    ),
}


@pytest.mark.promise("fault: exploding grammar", "input: exploding schema")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_source_is_refused_with_a_reason_and_the_next_one_compiles(grammars: Grammars, name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        grammars.compile(HOSTILE[name], "guided_json")
    assert caught.value.param == "guided_json"
    assert len(caught.value.message) < 700
    grammars.compile(GrammarSpec(GrammarKind.REGEX, f"fine after {name}"), "field")


def test_a_helper_that_takes_too_long_is_ended(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars.compile(GrammarSpec(GrammarKind.REGEX, "warm"), "field")
    children = [helper._child.pid for helper in grammars._helpers if helper._child is not None]
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    monkeypatch.setattr(grammar, "COMPILE_S", 0.2)
    with pytest.raises(BadRequest, match=r"longer than 0\.2 s"):
        grammars.compile(GrammarSpec(GrammarKind.REGEX, "slow"), "field")
    monkeypatch.undo()
    grammars.compile(GrammarSpec(GrammarKind.REGEX, "slow"), "field")
    assert all(helper._child is None or helper._child.pid not in children for helper in grammars._helpers)


def test_many_at_once_are_all_answered(grammars: Grammars) -> None:
    done: list[int] = []

    def compile_one(number: int) -> None:
        grammars.compile(GrammarSpec(GrammarKind.REGEX, f"at once {number % 4}"), "field")
        done.append(number)

    threads = [threading.Thread(target=compile_one, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(16))


def test_no_helper_is_left_after_close(tokenizer: Tokenizer) -> None:
    made = Grammars(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)
    made.compile(GrammarSpec(GrammarKind.REGEX, "a"), "field")
    (child,) = [helper._child for helper in made._helpers if helper._child is not None]
    made.close()
    assert child.returncode == -signal.SIGKILL


def test_a_server_without_the_extra_or_with_a_model_it_cannot_use_says_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grammar.why_none(tokenizer, tokenizer.eos_ids) is None
    assert "ends an answer" in (grammar.why_none(tokenizer, frozenset()) or "")
    monkeypatch.delitem(sys.modules, "llguidance")
    monkeypatch.setattr(sys, "meta_path", [])
    assert "vserve[structured]" in (grammar.why_none(tokenizer, tokenizer.eos_ids) or "")
