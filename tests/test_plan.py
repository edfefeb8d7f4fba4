"""vserve plan, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vserve.cli import main
from vserve.model.memory import GIB, CacheForm, plan_cache
from vserve.model.outline import of_size
from vserve.model.source import _default_file
from vserve.sizing import CONTEXT_BYTES, COUNTERS_BYTES, cache_budget, reserve, weight_bytes

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "float16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with nothing but a configuration."""
    made = tmp_path / "some-model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, object]:
    assert main(["plan", *words, "--json"]) == code
    return dict(json.loads(capsys.readouterr().out))


def model(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, object]:
    found = planned(capsys, *words, code=code)["model"]
    assert isinstance(found, dict)
    return found


def test_a_folder_needs_its_config_alone_and_gives_the_figures_of_a_start(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = model(capsys, str(folder), "--gpu", "24GiB", "--max-num-batched-tokens", "4096", "--block-size", "32")
    config = of_size("1B").config
    kept = reserve(config, max_num_seqs=256, max_tokens=4096, element_bytes=2)
    weights = weight_bytes(config, 2) + 2 * 128256 * 2048  # this one's head is not tied
    budget = cache_budget(total=24 * GIB, utilization=0.9, taken=weights + CONTEXT_BYTES, reserve=kept)
    cache = plan_cache(
        config, budget_bytes=budget, form=CacheForm.of("auto", "bfloat16"), block_size=32, max_model_len=8192
    )
    assert (found["name"], found["dtype"], found["weights_bytes"]) == ("some-model", "float16", weights)
    assert found["kv_bytes_per_token"] == 2 * 16 * 8 * 64 * 2
    assert (found["num_blocks"], found["max_model_len"]) == (cache.num_blocks, 8192)
    assert found["recommended_concurrency"] == min(256, cache.num_blocks // 40)
    assert found["fits"] is True
    assert found["refused"] is None


def test_an_fp8_cache_counts_a_byte_a_number_and_a_scale_a_head(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, narrow = (model(capsys, str(folder), "--kv-cache-dtype", dtype) for dtype in ("auto", "fp8"))
    assert (wide["kv_cache_dtype"], narrow["kv_cache_dtype"]) == ("float16", "fp8_e4m3")
    assert narrow["kv_bytes_per_token"] == 2 * 16 * 8 * (64 + 2)
    assert wide["num_blocks"] * 128 - 66 < narrow["num_blocks"] * 66 < (wide["num_blocks"] + 1) * 128
    assert main(["plan", str(folder), "--kv-cache-dtype", "fp8"]) == 0
    assert "16,896 bytes a token (fp8_e4m3)" in capsys.readouterr().out


def test_the_page_names_every_term(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--concurrency", "8"]) == 0
    text = capsys.readouterr().out
    for term in ("weights", "KV cache", "largest step", "graphs", "most blocks", "most sequences", "recommended"):
        assert term in text
    assert "at 8 at once" in text
    assert [line.split()[0] for line in text.splitlines() if "KiB" in line] == [
        size for size in ("7B", "8B", "13B", "70B") for _ in range(2)
    ]


def test_without_a_model_there_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys)
    assert "model" not in found
    sizes = found["sizes"]
    assert isinstance(sizes, list)
    rows = {(row["size"], row["quantization"]): row for row in sizes}
    assert rows["7B", None]["weights_bytes"] == 13_476_831_232
    assert rows["7B", None]["recommended_concurrency"] >= 8
    assert rows["70B", None]["recommended_concurrency"] == 0
    assert rows["70B", None]["least_gpu_bytes"] > 140e9
    assert rows["70B", "awq"]["weights_bytes"] < 37.5e9


def test_a_size_that_would_do_does(capsys: pytest.CaptureFixture[str]) -> None:
    least = model(capsys, "70B", code=1)["least_gpu_bytes"]
    assert model(capsys, "70B", "--gpu", str(least))["recommended_concurrency"] == 1
    assert isinstance(least, int)
    found = model(capsys, "70B", "--gpu", str(least - 2 * 1280 * 327_680), code=1)
    assert found["recommended_concurrency"] == 0


def test_a_concurrency_that_does_not_fit_is_exit_code_1_and_says_what_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(folder), "--gpu", "12GiB", "--max-num-batched-tokens", "2048", "--input-len", "7000")
    most = model(capsys, *words)["recommended_concurrency"]
    assert isinstance(most, int)
    assert model(capsys, *words, "--concurrency", str(most))["fits"] is True
    found = model(capsys, *words, "--concurrency", str(2 * most), code=1)
    longest = found["longest_input"]
    assert isinstance(longest, int)
    assert 0 < longest < 7000
    assert model(capsys, *words, "--input-len", str(longest), "--concurrency", str(2 * most))["fits"] is True


def test_the_default_model_is_read_from_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    found = model(capsys, str(_default_file()))
    # Q4_1 takes 5 bits a number on a GPU: 4, and a scale and a minimum in float16 for each 32.
    plain, packed = 49152 * 576 + 61 * 576, 30 * (576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536)
    assert found["weights_bytes"] == 2 * plain + packed * 5 // 8 + 30 * 4 * COUNTERS_BYTES
    assert found["quantization"] == "gguf"
    assert model(capsys, str(_default_file()), "-q", "none")["weights_bytes"] == 2 * 134_515_008
    assert found["recommended_concurrency"] == 256


def test_a_hub_id_is_read_from_the_cache_and_nothing_is_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for ref, commit, layers in (("main", "a" * 40, 16), ("v2", "b" * 40, 8)):
        (repository / "refs" / ref).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    cache = ("--download-dir", str(tmp_path))
    assert model(capsys, "org/name", *cache)["kv_bytes_per_token"] == 32768
    assert model(capsys, "org/name", *cache, "--revision", "v2")["kv_bytes_per_token"] == 16384
    assert main(["plan", "org/other", *cache]) == 2
    assert "planning downloads nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "flags", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, (), 4.25),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, (), 4.5),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False}, (), 8.0),
        ({"quant_method": "fp8"}, (), 8.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, ("--quantization", "none"), 16.0),
        ({"quant_method": "unheard-of"}, ("-q", "awq_marlin"), 4.25),
    ],
)
def test_quantised_weights_count_as_they_are_stored(
    folder: Path, section: dict[str, object], flags: tuple[str, ...], bits: float, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": section}))
    found = model(capsys, str(folder), *flags)
    matrices = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    rest = 2 * (2 * 128256 * 2048 + 33 * 2048) + 16 * 4 * COUNTERS_BYTES
    assert found["weights_bytes"] == pytest.approx(matrices * bits / 8 + rest, rel=2e-3)
    assert (found["refused"] is None) == (section["quant_method"] != "unheard-of")


def test_a_plain_model_is_planned_as_if_it_were_quantised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, fp8 = (model(capsys, str(folder), "-q", flag) for flag in ("auto", "fp8"))
    assert (plain["quantization"], fp8["quantization"], fp8["refused"]) == (None, "fp8", None)
    assert isinstance(plain["weights_bytes"], int)
    assert isinstance(fp8["weights_bytes"], int)
    assert fp8["weights_bytes"] < plain["weights_bytes"]


def test_weights_that_a_start_would_refuse_are_planned_only_as_something_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"quant_method": "awq", "bits": 4, "version": "gemv"}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": section}))
    assert main(["plan", str(folder)]) == 2
    assert "only gemm is supported; --quantization plans" in capsys.readouterr().err
    assert main(["plan", str(folder), "-q", "awq"]) == 0
    assert "vserve serve would refuse it: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-model"], "'no-such-model' does not exist"),
        (["9B"], "a size: 1B, 3B, 7B, 8B, 13B, 70B"),
        (["7B", "--gpu", "lots"], "--gpu: 'lots' is no size of a GPU"),
        (["7B", "--gpu", "-1"], "--gpu"),
        (["7B", "--concurrency", "0"], "--concurrency: '0' is not a whole number"),
        (["7B", "--input-len", "4.5"], "--input-len"),
        (["7B", "--input-len", "9" * 5000], "--input-len"),
        (["7B", "--input-len", "4000"], "4256 tokens, more than the 4096 of a sequence"),
        (["7B", "--max-model-len", "1000"], "1280 tokens, more than the 1000 of a sequence"),
        (["--quantization", "exl2"], "--quantization: 'exl2' is not auto, none, awq, gptq, fp8"),
        (["7B", "--quantization", "exl2"], "--quantization: 'exl2' is not auto, none, awq, gptq, fp8"),
        (["7B", "--device", "cpu"], "about GPUs"),
        (["7B", "-tp", "2"], "--tensor-parallel-size: '2' is not supported"),
        (["7B", "--dtyp", "float16"], "unknown flag --dtyp; did you mean --dtype?"),
        (["pyproject.toml"], "pass a Hugging Face folder or a .gguf file"),
        (["x" * 5000], "does not exist"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(("words", "code"), [(("8B",), 0), (("8B", "--json"), 0), (("70B",), 1)])
def test_a_reader_that_has_left_is_no_error(words: tuple[str, ...], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vserve", "plan", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


def test_planning_never_loads_torch() -> None:
    code = (
        "import sys; from vserve.cli import main; code = main(['plan', '8B', '--json']); "
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout)["model"]["name"].startswith("8B")
