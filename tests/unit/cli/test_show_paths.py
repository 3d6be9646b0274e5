"""What `drllm tune` and `drllm show` print of a `paths.json`."""

import io
import json
import sys
from pathlib import Path

import pytest

from drllm.cli.show_paths import show_paths
from drllm.cli.terminal import Terminal
from drllm.records.static_paths import read_paths
from drllm.statistics.differences import Differences
from drllm.statistics.losses import describe_loss
from drllm.statistics.verdicts import judge_counts, judge_means
from paths_json import leave_grades_out, written_paths

MODEL = {"id": "owner/name", "num_layers": 6, "fingerprint": "0123", "hidden_size": 8, "class": "X"}
PATHS = {"full": [0, 1, 2, 3, 4, 5], "skip1": [0, 1, 3, 4, 5], "skip2": [0, 3, 4, 5]}
TEXT_LOSS = judge_means("text_loss", [0.9] * 40, [0.0] * 40, seed=0)
LOSSY = Differences(accuracy=judge_counts(0, 130, 400), text_loss=TEXT_LOSS)
HARMLESS = Differences(accuracy=judge_counts(1, 1, 400))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A `paths.json` whose plain paths lose much, and whose refitted paths lose nothing."""
    return written_paths(
        tmp_path / "paths.json",
        MODEL,
        paths=PATHS,
        fitted=(0.9, 0.8, 1.0),
        test=LOSSY,
        repaired=HARMLESS,
    )


@pytest.fixture
def narrow_output(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is printed of the file on a terminal of 80 columns."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    show_paths(file, Terminal())
    return screen.getvalue()


def test_the_table_fits_into_80_columns_with_a_row_for_each_repair(narrow_output):
    lines = narrow_output.splitlines()
    # The line with the file's name is as long as the name.
    assert max(len(line) for line in lines if "paths.json" not in line) <= 80
    rows = [line.split() for line in lines if line.split()[1:2] in (["refit"], ["plain"])]
    assert [row[:3] for row in rows] == [
        ["skip1,", "refit", "5"],
        ["skip1,", "plain", "5"],
        ["skip2,", "refit", "4"],
        ["skip2,", "plain", "4"],
    ]
    assert "+0.900" not in narrow_output, "the gain on fit isn't shown"


def test_the_caption_says_on_which_questions_the_numbers_are_measured(narrow_output):
    caption = narrow_output.split("─")[0]
    assert "400 test questions" in caption


def test_the_last_lines_are_what_each_path_loses_as_it_was_chosen(narrow_output):
    last_lines = " ".join(narrow_output.split("paths.json")[-1].split())
    for name in ("skip1", "skip2"):
        assert f"on arc_easy, {describe_loss(f'{name} with its refit', HARMLESS)}" in last_lines
    assert "don't use it" not in last_lines


def test_paths_without_a_repair_are_judged_as_they_are(drllm, tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL, paths=PATHS, test=LOSSY)
    last_line = drllm("show", file).out.splitlines()[-1]
    assert last_line == f"on arc_easy, {describe_loss('skip2', LOSSY)}"


def test_prompts_alone_have_an_objective_in_place_of_an_accuracy(drllm, file):
    values = json.loads(file.read_text())
    for path in values["paths"]:
        path["repaired"] = []
        for score in path["measured"]:
            score |= {"accuracy": None, "against_full": None}
    file.write_text(json.dumps(values))
    output = drllm("show", file).out
    assert "accuracy" not in output.split("─")[0]
    [row] = [line for line in output.splitlines() if line.split()[:2] == ["skip2", "4"]]
    assert "+0.050 (−0.01 to +0.11)" in row
    assert output.splitlines()[-1] == (
        "on arc_easy, skip2: 400 test questions can't tell whether its loss on the right options "
        "rises or falls (−0.11 to +0.01 nats a question); its answers aren't graded"
    )


@pytest.mark.parametrize(
    ("objective", "change", "sentence"),
    [
        (
            "next_token_loss",
            (-0.32, -0.46, -0.18),
            "its loss rises by 0.32 nats a token (0.18 to 0.46) on 400 test questions",
        ),
        (
            "next_token_loss",
            (0.06, 0.01, 0.11),
            "its loss falls by 0.06 nats a token (0.01 to 0.11) on 400 test questions",
        ),
        (
            "next_token_loss",
            (-1.5, -1.9, -1.1),
            "its loss rises by 1.50 nats a token (1.10 to 1.90) on 400 test questions: don't use "
            "it",
        ),
        (
            "kl",
            (-0.2, -0.3, -0.1),
            "its KL from the full path rises by 0.20 nats a token (0.10 to 0.30) on 400 test "
            "questions",
        ),
    ],
    ids=["worse", "better", "far worse", "prompts alone"],
)
def test_a_path_without_grades_is_said_to_lose_where_its_objective_falls(
    tmp_path, drllm, objective, change, sentence
):
    file = written_paths(tmp_path / "paths.json", MODEL, paths=PATHS)
    leave_grades_out(file, objective, change)
    last_line = drllm("show", file).out.splitlines()[-1]
    assert last_line == f"on arc_easy, skip2: {sentence}; its answers aren't graded"


def test_a_task_without_scores_on_test_is_named(drllm, file):
    record = read_paths(file)
    assert record.tasks[1] == "builtin_facts"
    assert "builtin_facts: no scores on test questions" in drllm("show", file).out
