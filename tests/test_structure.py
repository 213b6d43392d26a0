"""The rules of CONTRIBUTING.md on the structure of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = [
    *sorted((ROOT / "megatron_rw").rglob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
    ROOT / "pretrain_gpt_rw.py",
]
MAX_FILE, MAX_FUNCTION = 400, 60


def test_imports_point_one_way() -> None:
    cli = pytest.importorskip("importlinter.cli")
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_files_and_functions_are_short() -> None:
    long = []
    for path in PRODUCT:
        text = path.read_text()
        if text.count("\n") > MAX_FILE:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def places() -> list[tuple[str, str]]:
    """Files and names in the table "Where to add what" of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("## Where to add what")[1].split("\n## ")[0]
    return re.findall(r"`([\w/.]+\.py)`(?: \(`(\w+)`\))?", table)


@pytest.mark.parametrize(("file", "name"), places())
def test_the_map_names_what_is_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert not name or name in defined
