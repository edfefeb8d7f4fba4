"""The tokenizers made from GGUF metadata agree with the programs that made the vocabularies."""

from __future__ import annotations

import string

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from vserve.errors import StartupError
from vserve.text import gguf_vocab
from vserve.text.pieces import byte_alphabet
from vserve.text.tokenizer import Tokenizer

ALPHABET = byte_alphabet()

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "1 12 123 1234 3.14159 1,000,000 2²½ ٣٤ Ⅷ x1y22",
    "don't I'll WE'VE it's he'd 'tis y'all's",
    "你好，世界！今天天气很好。 日本語のテキスト 한국어",
    "naïve café ÀÉÎ straße привет мир שלום مرحبا हिन्दी ไทย",
    "😀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200d\ufeff",
    "def f(x):\n\tif x == 1:\n        return {'a': [1, 2]}  # ok\n\n\n",
    "a  b   c    d\t\te\r\nf\n\n \n  g   ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start <jupyter_start>",
    "camelCaseWords HTTPServer snake_case kebab-case $100 +5 <=> ~/`x`",
    "\x00\x01\x7f\u0085\u00a0\u2028",
    "ĠHello Ċ ▁x <0x0A>",
]


@pytest.fixture(scope="session")
def published(smollm_metadata: dict[str, object]) -> tokenizers.Tokenizer:
    """The default model's tokenizer by transformers' conversion, with the word splitting of its published files."""
    prefix = "tokenizer.ggml."
    names = {"model": "tokenizer_type", "tokens": "tokens", "merges": "merges", "token_type": "token_type"}
    core, _ = convert_gguf_tokenizer("llama", {ours: smollm_metadata[prefix + key] for key, ours in names.items()})
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return core


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_ids_equal_those_of_the_published_tokenizer(
    text: str, smollm: Tokenizer, published: tokenizers.Tokenizer
) -> None:
    assert smollm.encode(text) == published.encode(text, add_special_tokens=False).ids


@given(text=st.text(max_size=60))
@settings(max_examples=300)
def test_smollm_ids_equal_those_of_the_published_tokenizer_on_any_text(
    text: str, smollm: Tokenizer, published: tokenizers.Tokenizer
) -> None:
    ids = smollm.encode(text)
    assert ids == published.encode(text, add_special_tokens=False).ids
    # Not the text itself: the vocabulary lacks bytes that only rare characters have, and drops them.
    assert smollm.decode(ids) == published.decode(ids)


def test_smollm_knows_its_special_tokens(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert (smollm.bos_id, smollm.bos_token) == (1, "<|im_start|>")
    assert smollm.eos_token == "<|im_end|>"
    assert smollm.eos_ids == {0, 2}
    assert smollm.is_special(2)
    assert not smollm.is_special(100)
    assert smollm.encode("hi") == smollm.encode("hi", add_special=False)


TEXT = st.text(
    alphabet=st.sampled_from("ab 0é你😀\u2581\n<>x-.") | st.characters(exclude_categories=["Cs"]), max_size=60
)


@given(text=TEXT)
@settings(max_examples=500)
def test_llama_ids_equal_those_of_sentencepiece(
    text: str, llama: Tokenizer, sentencepiece_model: sentencepiece.SentencePieceProcessor
) -> None:
    # SentencePiece gives NUL a meaning of its own, and takes its own space sign for a space when it decodes.
    text = text.replace("\x00", "")
    ids = llama.encode(text, add_special=False, parse_special=False)
    assert ids == sentencepiece_model.encode(text)
    assert llama.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", [text for text in TEXTS if "\x00" not in text and "<|" not in text])
def test_llama_ids_equal_those_of_sentencepiece_on_real_text(
    text: str, llama: Tokenizer, sentencepiece_model: sentencepiece.SentencePieceProcessor
) -> None:
    assert llama.encode(text, add_special=False) == sentencepiece_model.encode(text)


@given(words=st.lists(st.sampled_from(["a", "b", "ab", "-", "  ", " ", "."]), max_size=40))
def test_repeated_pieces_merge_from_the_left(
    words: list[str], llama: Tokenizer, sentencepiece_model: sentencepiece.SentencePieceProcessor
) -> None:
    text = "".join(words)
    assert llama.encode(text, add_special=False) == sentencepiece_model.encode(text)


def test_a_sentencepiece_vocabulary_adds_bos_unless_told_otherwise(
    llama: Tokenizer, sentencepiece_metadata: dict[str, object]
) -> None:
    assert llama.encode("a")[0] == llama.bos_id == 1
    both = gguf_vocab.build({**sentencepiece_metadata, "tokenizer.ggml.add_eos_token": True})
    assert both.encode("a") == [1, *llama.encode("a", add_special=False), 2]
    neither = gguf_vocab.build({**sentencepiece_metadata, "tokenizer.ggml.add_bos_token": False})
    assert neither.encode("a") == llama.encode("a", add_special=False)


def test_a_control_token_in_the_text_is_one_token_and_starts_a_word(llama: Tokenizer) -> None:
    one = llama.encode("hello", add_special=False)
    assert llama.encode("hello</s>hello", add_special=False) == [*one, 2, *one]
    assert 2 not in llama.encode("</s>", add_special=False, parse_special=False)


def test_without_a_space_prefix_the_first_word_stays_bare(gemma: Tokenizer, llama: Tokenizer) -> None:
    assert gemma.encode(" hello", add_special=False) == llama.encode("hello", add_special=False)
    assert gemma.decode(gemma.encode(" hello", add_special=False)) == " hello"


def test_a_user_defined_token_matches_whole_and_stays_visible(sentencepiece_metadata: dict[str, object]) -> None:
    tokens = sentencepiece_metadata["tokenizer.ggml.tokens"]
    scores = sentencepiece_metadata["tokenizer.ggml.scores"]
    types = sentencepiece_metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    assert isinstance(types, list)
    tokenizer = gguf_vocab.build(
        {
            **sentencepiece_metadata,
            "tokenizer.ggml.tokens": [*tokens, "<think>"],
            "tokenizer.ggml.scores": np.array([*scores, 0.0], dtype=np.float32),
            "tokenizer.ggml.token_type": np.array([*types, 4], dtype=np.int32),
        }
    )
    ids = tokenizer.encode("<think>", add_special=False)
    assert ids == [len(tokens)]
    assert tokenizer.decode(ids, skip_special=True) == "<think>"


# What each family's published pattern makes of one line, worked out by hand from the pattern.
LINE = "I'll don'T 12345  HTTPServer x2\n\n y"
CUTS = {
    "gpt-2": ["I", "'ll", " don", "'", "T", " 12345", " ", " HTTPServer", " x", "2", "\n\n", " y"],
    "smollm": ["I", "'ll", " don", "'", "T", " ", "1", "2", "3", "4", "5", " ", " HTTPServer", " x", "2", "\n\n", " y"],
    "llama-bpe": ["I", "'ll", " don", "'T", " ", "123", "45", " ", " HTTPServer", " x", "2", "\n\n", " y"],
    "qwen2": ["I", "'ll", " don", "'T", " ", *"12345", " ", " HTTPServer", " x", "2", "\n\n", " y"],
    "gpt-4o": ["I'll", " don'T", " ", "123", "45", " ", " HTTPServer", " x", "2", "\n\n", " y"],
    "tekken": ["I", "'ll", " don", "'T", " ", *"12345", " ", " HTTPServer", " x", "2", "\n\n", " y"],
    "deepseek-v3": ["I", "'ll", " don", "'T", " ", "123", "45", " ", " HTTPServer", " x", "2", "\n\n", " y"],
}


def cuts_of(name: str, text: str) -> list[str]:
    """The words that the pre-tokenizer makes of an ASCII text."""
    steps = pre_tokenizers.Sequence(list(gguf_vocab.PRE_TOKENIZERS[name].steps))
    return ["".join(chr(ALPHABET[char]) for char in word) for word, _ in steps.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", CUTS)
def test_a_pre_tokenizer_cuts_as_its_pattern_says(name: str) -> None:
    assert cuts_of(name, LINE) == CUTS[name]


@pytest.mark.parametrize("name", sorted(gguf_vocab.PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_every_byte(name: str) -> None:
    steps = pre_tokenizers.Sequence(list(gguf_vocab.PRE_TOKENIZERS[name].steps))
    for text in TEXTS:
        words = "".join(word for word, _ in steps.pre_tokenize_str(text))
        assert bytes(ALPHABET[char] for char in words) == text.encode()


def test_whole_words_of_llama3_win_over_merges() -> None:
    metadata = small_gpt2(["abc"], ["a b"], pre="llama-bpe", bos_token_id=0)
    tokenizer = gguf_vocab.build(metadata)
    # "abc" has no merge that builds it; bos comes from the family's default.
    assert [tokenizer.token_str(id) for id in tokenizer.encode("abc")] == ["<0>", "abc"]
    assert len(gguf_vocab.build(small_gpt2(["abc"], ["a b"], pre="gpt-2")).encode("abc")) == 2


def small_gpt2(tokens: list[str], merges: list[str], *, pre: str = "gpt-2", **keys: object) -> dict[str, object]:
    """A vocabulary of the 256 bytes (by code point, then the rest), "ab", and tokens."""
    letters = list(string.ascii_lowercase)
    base = [chr(i) if chr(i) in letters else f"<{i}>" for i in range(128)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*base, "ab", *tokens],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, ["tokenizer.ggml.model", "'t5'", "gpt2, llama"]),
        ({"tokenizer.ggml.model": None}, ["tokenizer.ggml.model"]),
        ({"tokenizer.ggml.pre": "martian"}, ["'martian'", "llama-bpe", "smollm"]),
        ({"tokenizer.ggml.tokens": None}, ["tokenizer.ggml.tokens is missing"]),
        ({"tokenizer.ggml.tokens": 5}, ["tokenizer.ggml.tokens must be an array"]),
        ({"tokenizer.ggml.tokens": "abc"}, ["tokenizer.ggml.tokens must be an array"]),
        ({"tokenizer.ggml.tokens": ["a", 3]}, ["tokenizer.ggml.tokens must hold strings"]),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, ["lists 'a' twice"]),
        ({"tokenizer.ggml.merges": []}, ["tokenizer.ggml.merges is missing"]),
        ({"tokenizer.ggml.merges": ["ab"]}, ["tokenizer.ggml.merges does not fit"]),
        ({"tokenizer.ggml.merges": ["q q"]}, ["tokenizer.ggml.merges does not fit"]),
        ({"tokenizer.ggml.token_type": [1, 1]}, ["tokenizer.ggml.token_type has 2 entries for 129 tokens"]),
        ({"tokenizer.ggml.token_type": ["x"]}, ["tokenizer.ggml.token_type must hold numbers"]),
        ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.scores is missing"]),
    ],
)
def test_wrong_metadata_is_one_line_that_names_the_key(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(StartupError) as caught:
        gguf_vocab.build(small_gpt2([], ["a b"]) | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
