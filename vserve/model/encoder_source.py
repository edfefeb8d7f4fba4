"""Where an embedding model comes from and what becomes of its token vectors: ``EncoderSource``.

Owns the reading of sentence-transformers' files beside a model: modules.json, the pooling configuration and the
longest input.  Whatever is wrong is a ``StartupError`` of one line.  Knows nothing of tokenizers, devices or layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model import hub
from vserve.model.config import MAX_POSITION
from vserve.model.encoder_config import EncoderConfig, is_encoder
from vserve.model.fields import Fields
from vserve.model.json_file import read_object, read_objects
from vserve.model.safetensors_files import SafetensorsWeights, weight_files
from vserve.model.weights import Weights

log = logging.getLogger(__name__)

MAX_MODULES: Final = 16
_MODULE_FOLDER: Final = re.compile(r"[\w.-]{1,100}", re.ASCII)


class Pooling(StrEnum):
    """How one vector is made of a text's token vectors; the values are sentence-transformers' names."""

    CLS = "cls"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    LAST = "lasttoken"


_OLDER_NAMES: Final = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}


@dataclass(frozen=True, slots=True)
class EncoderSource:
    """An encoder found and understood, its weights not yet read.

    name: the id it is served under by default.  poolings: their vectors are joined in this order; () for a
    cross-encoder.  normalize: vectors have length 1.  max_tokens: of one input, special tokens included.
    lower_case: texts are lower-cased before the tokenizer sees them.
    """

    path: Path
    name: str
    config: EncoderConfig
    poolings: tuple[Pooling, ...]
    normalize: bool
    max_tokens: int
    lower_case: bool

    @property
    def size(self) -> int:
        """Numbers in one vector; 1 for a cross-encoder."""
        return self.config.hidden_size * len(self.poolings) if self.poolings else 1

    def open_weights(self) -> Weights:
        """The tensors, mapped and not yet read; StartupError when the files are missing or broken."""
        return SafetensorsWeights(self.path)


def resolve_encoder(
    model: str, *, environ: Mapping[str, str], revision: str | None = None, progress: hub.Progress | None = None
) -> EncoderSource:
    """Find an embedding model: an existing folder, else a hub id; StartupError when there is none.

    environ: the process environment, for the Hugging Face variables.  revision: of a hub id.  progress: called while a
    download runs.
    """
    try:
        path = Path(model)
        if path.is_dir():
            return read_encoder(path, path.resolve().name or "model")
        if path.exists() or not hub.is_hub_id(model) or model.endswith(".gguf"):
            raise StartupError(
                f"embedding model {shorten(model)} is no Hugging Face folder and no hub id like org/name; embedding "
                "models are read from safetensors"
            )
        settings = hub.HubSettings.from_env(environ)
        folder = hub.cached(model, settings, revision)
        if folder is None or not _is_whole(folder):
            folder = hub.download(model, settings, revision, weights=True, progress=progress)
        return read_encoder(folder, model)
    except OSError as error:
        raise StartupError(f"embedding model {shorten(model)} cannot be read: {error.strerror}") from None


def names_encoder(model: str | None, *, environ: Mapping[str, str], revision: str | None = None) -> bool:
    """Whether what is to be served is an encoder, told from a config.json that is on this machine already."""
    if not model:
        return False
    try:
        folder: Path | None = Path(model)
        if not Path(model).exists():
            settings = hub.HubSettings.from_env(environ)
            folder = hub.cached(model, settings, revision) if hub.is_hub_id(model) else None
        if folder is None or not (folder / "config.json").is_file():
            return False
        return is_encoder(read_object(folder / "config.json"))
    except (OSError, ValueError, StartupError):
        return False  # whoever reads it next says what is wrong


def read_encoder(folder: Path, name: str) -> EncoderSource:
    """The encoder of a folder, checked but for its weights."""
    if not (folder / "config.json").is_file():
        raise StartupError(f"{shorten(str(folder))}: no config.json; it is not a Hugging Face model folder")
    config = EncoderConfig.from_json(read_object(folder / "config.json"), shorten(str(folder / "config.json")))
    weight_files(folder)
    poolings: tuple[Pooling, ...] = ()
    normalize = False
    if not config.architecture.cross:
        poolings, normalize = _modules(folder)
    longest, lower_case = _limits(folder, config.max_tokens)
    return EncoderSource(folder, name, config, poolings, normalize, longest, lower_case)


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot has what is needed; a download that was cut off leaves files out."""
    try:
        weight_files(folder)
    except StartupError:
        return False
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def _modules(folder: Path) -> tuple[tuple[Pooling, ...], bool]:
    """What follows the transformer, by modules.json; without that file the mean, as sentence-transformers does."""
    path = folder / "modules.json"
    if not path.is_file():
        log.info("%s has no modules.json: vectors are the mean of their tokens', not normalised", folder.name)
        return (Pooling.MEAN,), False
    where = shorten(str(path))
    poolings: tuple[Pooling, ...] = ()
    normalize = False
    modules = read_objects(path)
    if len(modules) > MAX_MODULES:
        raise StartupError(f"{where}: {len(modules)} modules, the limit is {MAX_MODULES}")
    for number, module in enumerate(modules):
        fields = Fields(module, f"{where}: module {number}")
        kind = (fields.text("type") or "").rsplit(".", 1)[-1]
        if number == 0 and kind == "Transformer":
            continue
        if kind == "Pooling" and number == 1:
            poolings = _pooling(folder, fields)
        elif kind == "Normalize" and poolings:
            normalize = True
        else:
            raise fields.fail("type", "supported are Transformer, Pooling and Normalize, in this order")
    if not poolings:
        raise StartupError(f"{where}: no Pooling module")
    return poolings, normalize


def _pooling(folder: Path, module: Fields) -> tuple[Pooling, ...]:
    name = module.text("path") or ""
    if not _MODULE_FOLDER.fullmatch(name) or name in (".", ".."):
        raise module.fail("path", "must be a folder's name")
    path = folder / name / "config.json"
    values = read_object(path)
    fields = Fields(values, shorten(str(path)))
    modes = values.get("pooling_mode")
    if modes is None:
        found = tuple(mode for key, mode in _OLDER_NAMES.items() if fields.flag(key, False))
        if not found:
            raise StartupError(f"{shorten(str(path))}: no pooling mode is on")
        return found
    names = modes if isinstance(modes, list) else [modes]
    poolings = tuple(mode for mode in Pooling for name in names[: len(Pooling)] if name == mode)
    if not names or len(poolings) != len(names):
        raise fields.fail("pooling_mode", f"supported are {', '.join(Pooling)}, each once")
    # In the order of the file: that is the order of the numbers.
    return tuple(sorted(poolings, key=names.index))


def _limits(folder: Path, positions: int) -> tuple[int, bool]:
    """The longest input in tokens and whether to lower-case, by sentence_bert_config.json, then the tokenizer's."""
    longest, lower_case = positions, False
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        fields = Fields(read_object(path), shorten(str(path)))
        lower_case = fields.flag("do_lower_case", False)
        if "max_seq_length" in fields:
            return min(positions, fields.integer("max_seq_length", 1, MAX_POSITION)), lower_case
    path = folder / "tokenizer_config.json"
    if path.is_file():
        limit = read_object(path).get("model_max_length")
        # A tokenizer without a limit has a number of thirty digits there, as an integer or a float.
        if isinstance(limit, int | float) and not isinstance(limit, bool) and 1 <= limit < positions:
            longest = int(limit)
    return longest, lower_case
