"""The Python of the docs: every block runs, in order, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def shown(block):
    """Return the output that a block shows, its lines behind `#>`."""
    lines = [line[3:] for line in block.splitlines() if line.startswith("#> ")]
    return "".join(line + "\n" for line in lines)


def test_the_python_page_runs_and_prints_what_it_says(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    found = blocks("python.md")
    assert len(found) >= 10
    for block in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "docs/python.md", "exec"), namespace)
        if shown(block):
            assert printed.getvalue() == shown(block), block


@pytest.mark.parametrize("page", ["python.md"])
def test_every_block_that_prints_shows_what(page):
    for block in blocks(page):
        assert ("print(" in block) == bool(shown(block)), block
