"""docs/architecture.md shows the tree, the import order, the calls and the files that there are."""

import functools
import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "drllm"
FILES = (".json", ".jsonl", ".safetensors")


def tree() -> set[str]:
    """Return the files and folders that the page's tree names, relative to the package."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^src/drllm/\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    named: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        named.add("".join(folders) + name)
        folders.append(name)
    return named


def test_every_place_of_the_tree_exists():
    for place in tree():
        assert (PACKAGE / place).exists(), place


def test_every_package_and_every_module_at_the_top_is_in_the_tree():
    packages = {f"{p.parent.relative_to(PACKAGE)}/" for p in PACKAGE.rglob("__init__.py")} - {"./"}
    packages = {package for package in packages if package.count("/") <= 2}
    modules = {p.name for p in PACKAGE.glob("[a-z]*.py")}
    assert packages | modules <= tree() | {"models/architectures/"}


def page_from(heading: str) -> str:
    """Return what stands under a heading of the second level."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.split(r"^## ", page.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def walks() -> dict[str, list[str]]:
    """Return the names of each walk, in its order."""
    _, *parts = re.split(r"^### ", page_from("Four walks through the code"), flags=re.MULTILINE)
    found = {}
    for part in parts:
        title, text = part.split("\n", 1)
        steps = re.findall(r"^\d+\. (.*)$", text, flags=re.MULTILINE)
        assert all(step.startswith("`") for step in steps), title
        names = re.findall(r"`((?:\w+\.)+\w+)`", "\n".join(steps))
        found[title] = [name for name in names if not name.endswith(FILES)]
    return found


def resolve(name: str) -> object:
    """Return what stands under `module.name` or `module.Class.method` of the package."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            found = importlib.import_module(".".join(("drllm", *parts[:length])))
            return functools.reduce(getattr, parts[length:], found)
    raise AssertionError(f"{name} is in no module of the package")


def test_what_the_walks_name_exists():
    found = walks()
    assert len(found) == 4
    for names in found.values():
        assert len(names) > 20
        for name in names:
            assert resolve(name) is not None, name


def test_the_files_of_the_table_exist():
    rows = re.findall(
        r"^\| (?!question|---).*\| (.*) \|$", page_from("Where to look"), re.MULTILINE
    )
    assert len(rows) >= 20
    for row in rows:
        places = re.findall(r"`([\w/.]+)`", row)
        assert places, row
        for place in places:
            assert (PACKAGE / place).exists(), place


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_import_order_is_that_of_the_contract(page):
    contract = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", contract, flags=re.DOTALL | re.MULTILINE)
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    block = re.search(r"^```\n(cli\n.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert layers is not None
    assert block is not None
    assert block[1].splitlines() == re.findall(r'"(.*?)"', layers[1])
