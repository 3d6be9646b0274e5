"""docs/architecture.md shows the tree that there is."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "drllm"


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
