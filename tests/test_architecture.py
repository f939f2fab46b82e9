"""Imports between the package's folders go one way, as docs/architecture.md draws them; imports in functions count."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "ecoflap"
DRAWING = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ORDER = re.findall(r"`(\w+)`", re.search(r"^From the ground up: (.*?)\.$", DRAWING, re.MULTILINE | re.DOTALL)[1])


def _imports():
    """(folder, folder that it imports, place) for every import of the package."""
    for path in sorted(SOURCE.rglob("*.py")):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ecoflap":
                modules = [f"{node.module}.{one.name}" for one in node.names]
            elif isinstance(node, ast.Import):
                modules = [one.name for one in node.names if one.name.startswith("ecoflap.")]
            else:
                continue
            for module in modules:
                yield here, module.split(".")[1], f"{path.relative_to(ROOT)}:{node.lineno}"


def test_the_drawing_has_every_folder():
    inside = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if not path.name.startswith(("__", "py."))}
    assert set(ORDER) == inside
    assert len([name for name in inside if (SOURCE / name).is_dir()]) <= 12


def test_imports_go_down_only():
    rank = {name: number for number, name in enumerate(ORDER)}
    known = [(a, b, place) for a, b, place in _imports() if a in rank and b in rank]
    assert len(known) > 500
    assert not [f"{place} imports {b}" for a, b, place in known if rank[b] > rank[a]]


def test_arrows_of_the_drawing_are_imports():
    drawn = {(b, a) for a, b in re.findall(r"^ *(\w+) --> (\w+)$", DRAWING, re.MULTILINE)}
    assert drawn
    assert drawn <= {(a, b) for a, b, _ in _imports()}


def test_files_can_be_read_in_one_sitting():
    """No file has over 350 lines without saying why in its docstring; the median is from 120 to 200."""
    texts = {path: path.read_text("utf-8") for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    long = [path for path, text in texts.items() if len(text.splitlines()) > 350]
    assert not [path for path in long if "Over 350 lines" not in (ast.get_docstring(ast.parse(texts[path])) or "")]
    assert 120 <= sorted(len(text.splitlines()) for text in texts.values())[len(texts) // 2] <= 200
