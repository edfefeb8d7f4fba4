"""dist/vserve.pyz: the wheel's modules as one file that Python runs.

What vserve depends on is not in it (torch alone is gigabytes): the file runs with any Python that has it installed, as
a container layer of its own on top of torch or beside a torch that is already there.
"""

from __future__ import annotations

import argparse
import compileall
import sys
import tempfile
import zipapp
import zipfile
from pathlib import Path

MAIN = '''"""vserve as one file; what it depends on must be installed."""

import sys

try:
    from vserve.cli import main

    sys.exit(main())
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("vserve"):
        raise
    print(f"vserve.pyz needs the package {error.name}: pip install vserve brings it", file=sys.stderr)
    sys.exit(2)
'''


def build(wheel: Path, target: Path) -> None:
    """Write target from the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        # Found on import without being compiled each time; the sources stay for tracebacks and for Triton, which reads
        # its kernels' text.
        compileall.compile_dir(
            folder, quiet=1, legacy=True, stripdir=folder, invalidation_mode=None, workers=1, optimize=-1
        )
        Path(folder, "__main__.py").write_text(MAIN)
        zipapp.create_archive(folder, target, interpreter="/usr/bin/env python3", compressed=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    build(given.wheel, given.target)
    print(f"{given.target}: {given.target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
