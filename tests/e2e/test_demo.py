"""The demo finds what its page shows, on this machine too."""

import re
from pathlib import Path

import pytest

from drllm.records.codec import read_json
from drllm.records.shortened import DEMO_FILE, DemoResult

PAGE = Path(__file__).resolve().parents[2] / "docs" / "demo.md"
# The page's figures may differ on another machine: rounding decides near ties.
POINTS = 1.5  # of accuracy; four of 285 questions
NATS = 0.02  # of next-token loss
LEAST_GAIN = 10  # points of accuracy; a slow machine learns less in a minute


def read_table() -> dict[str, list[float]]:
    """Return the page's table: name of a row → layers, accuracy and loss of other text."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| (\S.*?) \| (\d+) \| ([\d.]+) \|.*\| ([\d.]+) \|", line)
        if row:
            name, *numbers = row.groups()
            rows[name] = [float(number) for number in numbers]
    return rows


@pytest.mark.thorough
@pytest.mark.usefixtures("smollm2")
def test_the_demo_finds_what_its_page_shows(drllm, tmp_path):
    drllm("run demo --output-dir", tmp_path / "demo")
    result = read_json(tmp_path / "demo" / DEMO_FILE, DemoResult)
    rows = read_table()
    assert list(rows) == [row.name for row in result.rows]
    full, *_, taught = result.rows
    for row in result.rows:
        layers, accuracy, text_loss = rows[row.name]
        assert row.num_layers == layers
        if row is not taught:  # it depends on how much a machine learns in a minute
            assert 100 * row.accuracy == pytest.approx(accuracy, abs=POINTS)
            assert row.text_loss == pytest.approx(text_loss, abs=NATS)
    assert 100 * (taught.accuracy - full.accuracy) > LEAST_GAIN
