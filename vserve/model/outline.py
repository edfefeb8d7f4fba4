"""A model's configuration without its weights, and without torch: for planning before anything is loaded.

Reads config.json of a folder or of a model in the local hub cache, the header of a .gguf file, or takes the dimensions
of a well-known size.  Downloads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model import gguf, hub, quantization
from vserve.model.config import ModelConfig
from vserve.model.json_file import read_object
from vserve.model.quantization import Quantization


@dataclass(frozen=True, slots=True)
class Outline:
    """name: for people.  quantization: of a folder's checkpoint, None where it is plain.  tensors: of a GGUF file.

    refused: why ``vserve serve`` would not load weights quantised so; None where it would.
    """

    name: str
    config: ModelConfig
    quantization: Quantization | None = None
    tensors: Mapping[str, gguf.TensorInfo] | None = None
    refused: str | None = None


SIZES: Final[Mapping[str, tuple[str, tuple[int, ...]]]] = {
    "1B": ("Llama 3.2 1B", (16, 2048, 32, 8, 8192, 128256, 131072)),
    "3B": ("Llama 3.2 3B", (28, 3072, 24, 8, 8192, 128256, 131072)),
    "7B": ("Llama 2 7B", (32, 4096, 32, 32, 11008, 32000, 4096)),
    "8B": ("Llama 3.1 8B", (32, 4096, 32, 8, 14336, 128256, 131072)),
    "13B": ("Llama 2 13B", (40, 5120, 40, 40, 13824, 32000, 4096)),
    "70B": ("Llama 2 70B", (80, 8192, 64, 8, 28672, 32000, 4096)),
}
"""Size -> whose dimensions; layers, width, heads, key-value heads, width of the MLP, vocabulary, longest sequence."""


def of_size(size: str) -> Outline:
    """The outline of one of SIZES."""
    return Outline(f"{size} (dimensions of {SIZES[size][0]})", ModelConfig.from_json(_values(size)))


def _values(size: str) -> dict[str, object]:
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    values = dict(zip((*keys, "vocab_size", "max_position_embeddings"), SIZES[size][1], strict=True))
    tied = values["hidden_size"] < 4096
    return {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, **values}


def outline(model: str, *, environ: Mapping[str, str], revision: str | None = None) -> Outline:
    """The outline of a folder, a .gguf file, a hub id in the local cache, or a size.  StartupError otherwise.

    environ, revision: as for source.resolve.
    """
    path = Path(model)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):
        is_folder = is_file = False
    if is_folder:
        return _from_folder(path, path.resolve().name or "model")
    if is_file:
        return _from_gguf(path)
    if model.upper() in SIZES:
        return of_size(model.upper())
    if hub.is_hub_id(model) and not model.endswith(".gguf"):
        settings = hub.HubSettings.from_env(environ)
        folder = hub.cached(model, settings, revision)
        if folder is None:
            raise StartupError(
                f"model {model} is not in the cache {settings.cache}, and planning downloads nothing; pass a folder "
                f"with its config.json, or a size: {', '.join(SIZES)}"
            )
        return _from_folder(folder, model)
    raise StartupError(
        f"model {shorten(model)} does not exist; pass a Hugging Face folder, a .gguf file, a hub id like org/name, or "
        f"a size: {', '.join(SIZES)}"
    )


def _from_folder(folder: Path, name: str) -> Outline:
    path = folder / "config.json"
    if not path.is_file():
        raise StartupError(f"{shorten(str(folder))}: no config.json")
    values, where = read_object(path), shorten(str(path))
    config = ModelConfig.from_json(values, where)
    try:
        return Outline(name, config, quantization.read(folder, values))
    except StartupError as error:
        return Outline(name, config, refused=str(error))


def _from_gguf(path: Path) -> Outline:
    if path.suffix != ".gguf":
        raise StartupError(f"{shorten(str(path))}: pass a Hugging Face folder or a .gguf file")
    metadata, tensors = gguf.read_header(path)
    shapes = {name: info.shape for name, info in tensors.items()}
    config = ModelConfig.from_gguf(metadata, shapes, where=shorten(str(path)))
    return Outline(path.name, config, tensors=tensors)
