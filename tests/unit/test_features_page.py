"""docs/features.md names modules and tests that exist."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "features.md").read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    """Return the cells of each feature's row: feature, module, test."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return [row for row in cells if not row[0].startswith("**")]


def test_every_feature_names_a_module_and_a_test_that_exist():
    assert len(rows()) > 80
    for feature, module, test in rows():
        assert (REPOSITORY / "src" / "drllm" / module.strip("`")).is_file(), (feature, module)
        name, _, function = test.strip("`").partition("::")
        file = REPOSITORY / "tests" / name
        assert file.is_file(), (feature, test)
        if function:
            assert re.search(rf"\bdef {function}\(", file.read_text(encoding="utf-8")), test
