import ast
import re
import sys
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(pattern):
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    return {_normal(name) for name in re.findall(pattern, text, flags=re.MULTILINE)}


@pytest.fixture(scope="module")
def declared():
    """Requirements that stand alone on a line with their reason: those of the package and of every extra."""
    return _requirements(r'^(?:  |\w+ = \[)"([A-Za-z0-9_.-]+?)(?:[><=!~][^"]*)?"\]?,? +#')


def test_every_requirement_has_its_reason(declared):
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.scripts]")[0].split("dependencies = [", 1)[1]
    listed = {_normal(name) for name in re.findall(r'"([A-Za-z0-9_.-]+?)(?:[><=!~][^"]*)?"', section)}
    assert {"torch", "jinja2", "gguf", "pytest"} <= declared
    assert listed == declared


def test_every_requirement_has_a_tested_version(declared):
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pinned = {_normal(line.split("==")[0]) for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; python_version >= \"3\.11\")?", line) for line in lines)
    assert declared <= pinned
    assert "torch==2.13.0" in lines


def test_every_import_is_declared(declared):
    providers = packages_distributions()
    undeclared = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                if top in sys.stdlib_module_names or top == "ecoflap":
                    continue
                names = {_normal(name) for name in providers.get(top, [top])}
                if not names & declared:
                    undeclared[top] = path.name
    assert undeclared == {}


def test_readme_opens_with_a_paragraph_and_two_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks[:2]] == ["sh", "sh"]
    first, second = (body.strip() for _, body in blocks[:2])
    assert "\n" not in first
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ")
    assert ".venv/bin/ecoflap prune" in first
    assert second.endswith(".venv/bin/python -m pytest")


def _anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def test_package_data_is_found():
    package = files("ecoflap")
    assert package.joinpath("py.typed").is_file()
    assert "{{ run.model }}" in package.joinpath("report/templates/report.html.j2").read_text("utf-8")
    assert "prefers-color-scheme" in package.joinpath("report/templates/page.css").read_text("utf-8")


def test_hooks_need_no_download():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks["repos"][0]["hooks"])


def test_names_of_test_files_are_different():
    """Two of one name in two folders can't be collected together: they are imported by their bare names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
