"""Models of the Hugging Face hub: found in the local cache by its directory layout, else downloaded.

The cache is read without any library.  Only a download imports huggingface_hub (the extra ``hub``), and takes
configuration, tokenizer and safetensors files alone.  Reads no environment: ``HubSettings.from_env`` is handed one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Thread
from typing import Final

from vserve.errors import StartupError, shorten

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) on the caller's own thread."""

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_FILES: Final = ("*.json", "*.jinja", "tokenizer.model")
_WEIGHTS: Final = ("model*.safetensors",)
_NESTED: Final = re.compile(
    r"[0-9]{1,2}_[A-Za-z]{1,40}/config\.json|additional_chat_templates/[A-Za-z0-9_-]{1,64}\.jinja", re.ASCII
)
_TRUE: Final = ("1", "ON", "YES", "TRUE")
_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class HubSettings:
    """cache: the folder that holds models--org--name folders.  offline: never touch the network.  endpoint: the hub's
    address, None for the public one.  token: for models that need one; None: the library's own, if it finds one."""

    cache: Path
    offline: bool = False
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> HubSettings:
        """From HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_ENDPOINT, HF_TOKEN."""
        offline = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or ""
        home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        cache = Path(environ.get("HF_HUB_CACHE") or str(Path(home) / "hub"))
        try:
            cache = cache.expanduser()
        except RuntimeError:
            raise StartupError("no home folder for the Hugging Face cache; set HF_HOME") from None
        endpoint, token = environ.get("HF_ENDPOINT") or None, environ.get("HF_TOKEN") or None
        return cls(cache, offline.upper() in _TRUE, endpoint, token)


def environ_with(environ: Mapping[str, str], download_dir: str | None, token: str | None) -> dict[str, str]:
    """environ with the values of --download-dir and --hf-token, where given, in place of its own."""
    given = {"HF_HUB_CACHE": download_dir, "HF_TOKEN": token}
    return {**environ, **{name: value for name, value in given.items() if value is not None}}


def is_hub_id(text: str) -> bool:
    """Whether text has the form org/name of a hub id."""
    return _ID.fullmatch(text) is not None and "--" not in text and ".." not in text


def cached(hub_id: str, settings: HubSettings, revision: str | None = None) -> Path | None:
    """The cached snapshot folder of a revision (default: main), or None; whether it is whole is for the caller.

    hub_id must satisfy ``is_hub_id``.  StartupError for a revision that is not a branch, tag or commit name.
    """
    name = _revision(revision)
    repository = settings.cache / f"models--{hub_id.replace('/', '--')}"
    commit = name if _COMMIT.fullmatch(name) else _read_ref(repository / "refs" / name)
    snapshot = repository / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and snapshot.is_dir() else None


def download(
    hub_id: str,
    settings: HubSettings,
    revision: str | None = None,
    *,
    weights: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Download a model into the cache and return its snapshot folder; files already there are kept.

    weights False leaves the safetensors out.  StartupError when offline, without the library, or on any failure.
    """
    name = _revision(revision)
    if settings.offline:
        raise StartupError(
            f"model {hub_id} is not whole in the cache {settings.cache}, and HF_HUB_OFFLINE forbids to download it; "
            "unset it, or pass a folder or a .gguf file"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise StartupError(
            f"model {hub_id} is not in the cache {settings.cache}; to download it: pip install 'vserve[hub]', "
            "or pass a folder or a .gguf file"
        )
    transfer = _Transfer(hub_id, settings, name, (*_FILES, *_WEIGHTS) if weights else _FILES)
    # A daemon: an interrupt at the terminal ends the process without waiting for the network.
    worker = Thread(target=transfer.run, name="hub-download", daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(_POLL_S)
        if progress is not None and transfer.total_bytes:
            progress(min(transfer.done_bytes(), transfer.total_bytes), transfer.total_bytes)
    if transfer.folder is None:
        raise StartupError(
            f"model {hub_id} could not be downloaded: {transfer.problem}; check the name, the network and --hf-token "
            "or HF_TOKEN, or pass a folder or a .gguf file"
        )
    if progress is not None and transfer.total_bytes:
        progress(transfer.total_bytes, transfer.total_bytes)
    return transfer.folder


class _Transfer:
    """One download.  ``run`` is the worker thread's; the caller's thread reads the fields, each written once."""

    def __init__(self, hub_id: str, settings: HubSettings, revision: str, patterns: tuple[str, ...]) -> None:
        self._hub_id = hub_id
        self._settings = settings
        self._revision = revision
        self._patterns = patterns
        self._blobs = settings.cache / f"models--{hub_id.replace('/', '--')}" / "blobs"
        self.total_bytes = 0
        self.folder: Path | None = None
        self.problem = ""

    def run(self) -> None:
        try:
            self._download()
        except Exception as error:  # the library's failures have no common base
            lines = str(error).strip().splitlines()
            self.problem = f"{type(error).__name__}: {shorten(lines[0] if lines else '')}"

    def done_bytes(self) -> int:
        """Bytes on disk: the library's own bars differ from version to version, its files do not."""
        done = 0
        try:
            for blob in self._blobs.iterdir():
                done += blob.stat().st_size
        except OSError:
            # A file was renamed under way, or there is no folder yet; the next poll sees it.
            return done
        return done

    def _is_wanted(self, name: str) -> bool:
        """Folders of a repository hold the same model in other formats, but for an embedding model's modules and
        further chat templates."""
        if "/" in name:
            return _NESTED.fullmatch(name) is not None
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _download(self) -> None:
        from huggingface_hub import HfApi

        # Not exported in a way that type checkers follow, but documented.
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()
        api = HfApi(endpoint=self._settings.endpoint, token=self._settings.token)
        info = api.model_info(self._hub_id, revision=self._revision, files_metadata=True)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        self.total_bytes = sum(size for name, size in sizes.items() if self._is_wanted(name))
        self.folder = Path(
            api.snapshot_download(
                self._hub_id,
                revision=self._revision,
                cache_dir=self._settings.cache,
                allow_patterns=[name for name in sizes if self._is_wanted(name)],
            )
        )


def _revision(revision: str | None) -> str:
    name = "main" if revision is None else revision
    if not _REVISION.fullmatch(name) or ".." in name:
        raise StartupError(f"revision {shorten(name)} is not the name of a branch, a tag or a commit")
    return name


def _read_ref(path: Path) -> str | None:
    try:
        with path.open("rb") as opened:
            text = opened.read(128).decode("ascii", "replace").strip()
    except OSError:
        return None
    return text if _COMMIT.fullmatch(text) else None
