"""Who may import whom: the rules of DESIGN.md, checked on the syntax trees of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = frozenset(sys.stdlib_module_names)

POLICY = frozenset(
    {
        "encoding",
        "encoding_queue",
        "inbox",
        "limits",
        "pages",
        "places",
        "planner",
        "prefix",
        "request",
        "scheduler",
        "sequence",
    }
)
"""Modules of vserve.engine that decide and never touch a tensor."""

RULES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # layer: (our layers it may import, third-party packages it may import)
    "errors": (frozenset(), frozenset()),
    "config": (frozenset({"errors"}), frozenset()),
    "familiar": (frozenset({"errors"}), frozenset()),
    "settings": (frozenset({"config", "errors", "familiar"}), frozenset()),
    "sizing": (frozenset({"errors", "engine.policy", "engine.device", "model"}), frozenset()),
    "plan": (frozenset({"config", "errors", "model", "settings", "sizing", ""}), frozenset()),
    "client": (frozenset({"errors"}), frozenset()),
    "http": (frozenset({"errors"}), frozenset()),
    "text": (frozenset({"errors"}), frozenset({"tokenizers", "jinja2", "markupsafe", "llguidance"})),
    "kernels": (frozenset(), frozenset({"torch", "triton"})),
    "model": (frozenset({"kernels", "errors"}), frozenset({"torch", "safetensors", "numpy", "huggingface_hub"})),
    "engine.policy": (frozenset({"errors"}), frozenset()),
    "engine.device": (
        frozenset({"errors", "engine.policy", "model", "kernels", "observe"}),
        frozenset({"torch", "numpy"}),
    ),
    "observe": (frozenset({"errors"}), frozenset({"prometheus_client", "opentelemetry"})),
    "build": (frozenset(), frozenset()),
    "preload": (frozenset({"kernels"}), frozenset()),
    "scale": (frozenset({"errors"}), frozenset()),
    "bridge": (frozenset({"engine.policy", "errors"}), frozenset()),
    "encoder_bridge": (frozenset({"engine.policy", "errors"}), frozenset()),
    "store": (frozenset({"errors"}), frozenset()),
    "oauth.grants": (frozenset({"errors"}), frozenset()),
    "oauth": (frozenset({"errors", "oauth.grants"}), frozenset({"jwt", "cryptography"})),
    "api": (
        frozenset(
            {
                "build",
                "http",
                "text",
                "bridge",
                "encoder_bridge",
                "engine.policy",
                "errors",
                "oauth.grants",
                "observe",
                "scale",
                "store",
                "",
            }
        ),
        frozenset({"orjson"}),
    ),
}
NO_ASYNCIO = frozenset({"text", "kernels", "model", "engine.policy", "engine.device", "oauth", "oauth.grants"})


def layer(parts: tuple[str, ...]) -> str:
    """("vserve", "engine", "pages") -> "engine.policy"; the package itself is ""."""
    if len(parts) < 2:
        return ""
    if parts[1] == "engine":
        return "engine.policy" if len(parts) < 3 or parts[2] in POLICY else "engine.device"
    if parts[1] == "oauth":
        return "oauth.grants" if parts[2:] == ("grants",) else "oauth"
    return parts[1]


def modules() -> list[tuple[Path, tuple[str, ...]]]:
    """Every module of the project as (file, dotted parts); both folders are walked: rglob follows no links."""
    found = []
    for file in sorted((ROOT / "vserve").rglob("*.py")):
        if "kernels" not in file.relative_to(ROOT).parts:
            found.append((file, file.relative_to(ROOT).with_suffix("").parts))
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        found.append((file, ("vserve", "kernels", file.stem)))
    return [(file, parts[:-1] if parts[-1] == "__init__" else parts) for file, parts in found]


def imports(file: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, dotted parts) of every import in the file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(name.name.split("."))) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are written in full"
            base = tuple((node.module or "").split("."))
            # "from vserve.engine import loop" names a module, "from vserve.engine.loop import X" does not
            found += [(node.lineno, (*base, name.name) if len(base) < 3 else base) for name in node.names]
    return found


@pytest.mark.parametrize(
    ("file", "parts"), modules(), ids=lambda value: ".".join(value) if type(value) is tuple else ""
)
def test_a_module_imports_only_what_its_layer_may(file: Path, parts: tuple[str, ...]) -> None:
    own = layer(parts)
    if own not in RULES:
        return  # cli, serve, __main__ wire everything
    ours, others = RULES[own]
    for line, target in imports(file):
        where = f"{file.relative_to(ROOT)}:{line}: {own} imports {'.'.join(target)}"
        if target[0] == "vserve":
            assert layer(target) in ours | {own}, where
        elif target[0] == "asyncio":
            assert own not in NO_ASYNCIO, where
        else:
            assert target[0] in STDLIB | others, where


def test_every_layer_of_the_rules_exists() -> None:
    assert {layer(parts) for _, parts in modules()} >= set(RULES)


def test_modules_that_start_the_command_line_do_not_import_torch() -> None:
    for name in ("cli", "config", "errors", "__main__"):
        tree = ast.parse((ROOT / "vserve" / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(part.split(".")[0] in ("torch", "numpy", "uvloop") for part in names), f"{name}.py: {names}"


HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "uvloop", "jinja2")


@pytest.mark.parametrize("name", ["vserve.cli", "vserve.settings", "vserve.plan", "vserve.client.health"])
def test_a_command_without_a_model_loads_nothing_heavy(name: str) -> None:
    """What is imported on the way counts too, which no single file shows."""
    code = f"import sys, {name}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
