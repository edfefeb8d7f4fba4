"""The command line: what each word does, and the exit codes that need no server."""

from __future__ import annotations

import pytest

from vserve import __version__
from vserve.cli import main


@pytest.mark.parametrize("argv", [["--version"], ["-V"], ["version"]])
def test_the_version_is_printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], ["serve", "--help"]])
def test_help_goes_to_stdout(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["serve", "--prot", "1"], "vserve: unknown flag --prot; did you mean --port?\n"),
        (["--prot", "1"], "vserve: unknown flag --prot; did you mean --port?\n"),
        (["serve", "--port"], "vserve: argument --port: expected one argument\n"),
        (["version", "x"], "vserve: version takes no arguments, got 'x'\n"),
    ],
)
def test_a_word_that_cannot_be_used_is_one_line_and_exit_code_2(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == line
