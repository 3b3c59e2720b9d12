"""The pages are about this repository: what they name exists, links lead somewhere, and the table of recipes is the recipes."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, anchors, blocks, links

import adapt

PAGES = [
    *DOCUMENTS,
    ROOT / "SECURITY.md",
    *(ROOT / "docs" / name for name in ("log.md", "ablations.md", "architectures.md")),
]
FUNCTION = re.compile(r"`([\w/.]+\.py):([\w.]+)`")
FILE = re.compile(r"`((?:adapt|eval|recipes|launch|tests|benchmarks|docs|examples)/[\w/.-]+\.\w+)`")


def names_of(page: Path) -> list[tuple[str, str]]:
    return FUNCTION.findall(page.read_text())


def tree_lines() -> list[tuple[int, str]]:
    """(indentation, names) of each line of the README's tree."""
    [tree] = [body for _, body in blocks((ROOT / "README.md").read_text(), "") if body.startswith("adapt/")]
    return [(len(line) - len(line.lstrip()), re.split(r" {2,}", line.strip())[0]) for line in tree.splitlines()]


def tree_paths() -> list[Path]:
    parents, paths = [ROOT], []
    for indentation, names in tree_lines():
        parents = parents[: indentation // 2 + 1]
        paths += [parents[-1] / name for name in names.split(" ")]
        parents.append(paths[-1])
    return paths


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readmes_tree_is_the_folder() -> None:
    paths = tree_paths()
    assert [str(path) for path in paths if not path.exists()] == []
    rooms = {path for path in (ROOT / "adapt").rglob("*") if path.is_dir() and "__pycache__" not in path.parts}
    assert {str(room) for room in rooms} <= {str(path) for path in paths}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    named = [name for name in FILE.findall(page.read_text()) if "MODEL" not in name]
    missing = [name for name in named if not (ROOT / name).exists()]
    for file, dotted in names_of(page):
        body = ast.parse((ROOT / file).read_text()).body if (ROOT / file).exists() else []
        for name in dotted.split("."):
            found = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
            body = found[0].body if found else []
            missing += [] if found else [f"{file}:{dotted}"]
    assert missing == []


def test_the_method_names_functions_for_every_equation() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    for equation in re.split(r"^```\n.*?^```$", text, flags=re.MULTILINE | re.DOTALL)[2:]:
        assert FUNCTION.search(re.split(r"^## ", equation, flags=re.MULTILINE)[0]), equation[:200]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_python_in_a_page_is_python_and_names_what_adapt_has(page: Path) -> None:
    for _, body in blocks(page.read_text(), "python"):
        compile(body, page.name, "exec")
        known = {"lm": adapt.DiffusionLM, "adapt": adapt}
        for owner, name in re.findall(r"\b(lm|adapt)\.(\w+)", body):
            assert hasattr(known[owner], name), f"{owner}.{name}"


def test_the_table_of_recipes_is_the_recipes() -> None:
    spec = importlib.util.spec_from_file_location("recipes_page", ROOT / "benchmarks" / "recipes_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert module.PAGE.read_text() == page, "run python benchmarks/recipes_page.py"
    recipes = [path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "quickstart"]
    assert all(f"(../{path.relative_to(ROOT)})" in page for path in recipes)


def test_the_glossary_explains_the_words_that_the_pages_use() -> None:
    glossary = (ROOT / "docs" / "guide.md").read_text().partition("\n## Glossary\n")[2]
    words = set(re.findall(r"^\| ([\w ]+) \|", glossary, flags=re.MULTILINE))
    assert {
        "arm",
        "base",
        "block",
        "canvas",
        "clean tokens",
        "control",
        "document",
        "nfe",
        "round",
        "tpf",
        "view",
    } <= words
