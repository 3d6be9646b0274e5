"""The demo finds what its page shows, on this machine too."""

import re
from pathlib import Path

import pytest

from drllm.records.results import read_evaluation

PAGE = Path(__file__).resolve().parents[2] / "docs" / "demo.md"
# The page's figures may differ on another machine: rounding decides near ties.
POINTS = 1.5  # of accuracy; four of 285 questions
NATS = 0.02  # of next-token loss


def read_table() -> dict[str, list[float]]:
    """Return the page's table: name of a system → layers run, accuracy and loss."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").split("```")[1].splitlines():
        row = re.fullmatch(r" (\S.*?) +(\d+\.\d\d) +(\d+\.\d) .* (\d\.\d{3}) .*", line)
        if row:
            name, *numbers = row.groups()
            rows[name] = [float(number) for number in numbers]
    return rows


@pytest.mark.thorough
@pytest.mark.usefixtures("smollm2")
def test_the_demo_finds_what_its_page_shows(drllm, tmp_path):
    drllm("run demo --output-dir", tmp_path)
    evaluation = read_evaluation(tmp_path / "eval" / "builtin_facts.json")
    rows = read_table()
    assert list(rows) == [system.name for system in evaluation.systems]
    for system in evaluation.systems:
        layers, accuracy, text_loss = rows[system.name]
        assert system.executions == layers
        assert 100 * system.accuracy == pytest.approx(accuracy, abs=POINTS)
        assert system.text_loss == pytest.approx(text_loss, abs=NATS)
