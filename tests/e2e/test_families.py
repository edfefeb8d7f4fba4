"""Other architectures through the whole server: a folder that transformers saved, a tokenizer, and a client."""

from __future__ import annotations

import shutil
from pathlib import Path

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.e2e.process import serving
from tests.model.families import VOCAB, saved

WORDS = " ".join(f"w{number}" for number in range(5, 60))


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token; the first three are special."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCAB))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe", "opt, norms behind"])
def test_a_folder_is_served_as_transformers_would_go_on(name: str, tmp_path: Path) -> None:
    model, source = saved(name)
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    words = tokenizer()
    words.save_pretrained(folder)
    ids = words(WORDS, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = words.decode(ids[-8:])
    with serving("--model", str(folder), "--max-num-batched-tokens", "32", "--max-model-len", "128") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="empty")
        answer = client.completions.create(
            model="model", prompt=WORDS, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == wanted
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 55
