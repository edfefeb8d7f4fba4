"""The commit that this package was built from, as the build wrote it down.  Knows nothing else."""

from __future__ import annotations

import json
import re
from importlib import metadata, resources

NAME = "COMMIT"
"""The file that a build leaves beside this module: one line."""

_HASH = re.compile(r"[0-9a-f]{7,64}(-dirty)?")


def git_hash() -> str | None:
    """The hash, "-dirty" behind it where the tree had changes; None where nobody wrote one down.

    From the build's own file; else from the metadata of an install straight from a repository (PEP 610).
    """
    try:
        found = _HASH.fullmatch(resources.files("vserve").joinpath(NAME).read_text("ascii").strip())
    except (OSError, ValueError):
        found = None
    if found is not None:
        return found[0]
    try:
        told = json.loads(metadata.distribution("vserve").read_text("direct_url.json") or "{}")
        commit = told["vcs_info"]["commit_id"]
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    return commit if isinstance(commit, str) and _HASH.fullmatch(commit) else None
