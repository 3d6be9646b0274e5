"""What `drllm shrink` prints: the table, the verdict, and commands that can be pasted."""

import json
import shlex
from pathlib import Path

import pytest
from msgspec.structs import replace

from drllm.cli.parser import parse
from drllm.cli.show_shrink import show_models
from drllm.cli.shrinking import _describe_plan, _print_next_steps
from drllm.cli.terminal import Terminal
from drllm.config import ExportConfig, ShrinkConfig
from drllm.pipeline.shrink_questions import read_questions
from drllm.records.shrink import ShrinkRecord, ShrunkModel, TaskScores, TextScores
from drllm.records.static_paths import FULL
from drllm.statistics.differences import Differences
from drllm.statistics.exclusion import Limits, Trial, end_at_failure, judge_task
from drllm.statistics.verdicts import judge_counts, judge_means

LIMITS = Limits(max_drop=3.0, max_loss_increase=0.05)
LOSSES = {FULL: [3.0] * 60, "skip1": [3.01] * 60, "skip2": [3.4] * 60}


def make_model(name, layers):
    """A model that answers like the full one, and whose text loses as `LOSSES` says."""
    differences = None
    if name != FULL:
        text_loss = judge_means("text_loss", LOSSES[name], LOSSES[FULL], seed=0)
        differences = Differences(accuracy=judge_counts(5, 5, 1000), text_loss=text_loss)
    scores = TaskScores(accuracy=0.5, text_loss=LOSSES[name][0], against_full=differences)
    return ShrunkModel(
        name=name, layers=tuple(range(layers)), num_bytes=10**6 * layers, tasks={"sums": scores}
    )


@pytest.fixture
def record():
    models = (make_model(FULL, 6), make_model("skip1", 5), make_model("skip2", 4))
    trials = []
    for model in models[1:]:
        test = judge_task("sums", model.tasks["sums"].against_full, LIMITS)
        trials.append(Trial(name=model.name, tasks=(test,)))
    result = end_at_failure(trials, LIMITS)
    return ShrinkRecord(
        schema="drllm.shrink",
        schema_version=1,
        drllm_version="0",
        created="",
        model={},
        config={},
        inputs={},
        libraries={},
        tasks=("sums",),
        num_questions={"sums": 3000},
        num_held_out={"sums": 1000},
        runtime={},
        limits=LIMITS,
        models=models,
        trials=result.trials,
        chosen=result.chosen,
    )


def test_the_table_has_a_row_for_each_model_and_says_what_became_of_it(record, capsys):
    show_models(record, Terminal())
    out = capsys.readouterr().out.replace("\u00a0", " ")
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["6"], ["5"], ["4"])]
    assert [row[0] for row in rows] == ["6", "5", "4"]
    assert rows[1][-2:] == ["←", "written"]
    assert rows[2][-2:] == ["not", "passed"]
    assert "3.400 (+0.400)" in out
    assert record.verdict in " ".join(out.split())


def test_a_loss_that_is_excluded_never_looks_like_the_limit(record, capsys):
    full, first, second = record.models
    scores = first.tasks["sums"]
    differences = replace(scores.against_full, accuracy=judge_counts(36, 48, 1026))
    nearly = replace(first, tasks={"sums": replace(scores, against_full=differences)})
    show_models(replace(record, models=(full, nearly, second)), Terminal())
    assert "(−2.97 to +0.6)" in capsys.readouterr().out.replace("\u00a0", " ")


def test_the_commands_at_the_end_can_be_pasted(capsys):
    _print_next_steps(Path("a folder"), Terminal())
    out = capsys.readouterr().out
    commands = [line.strip() for line in out.splitlines() if line.startswith("  drllm")]
    assert len(commands) == 2
    for command in commands:
        _, *words = shlex.split(command)
        assert parse(words).verb == words[0]


def test_a_record_without_the_numbers_of_held_out_questions_is_shown(record, capsys):
    show_models(replace(record, num_held_out={}), Terminal())
    assert "– held out" in capsys.readouterr().out


def read_rows(folder, row):
    """Return the questions of a file with a hundred such rows, with numbers in them."""
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(row) % number + "\n" for number in range(100)))
    return read_questions(ShrinkConfig(), str(file))


@pytest.mark.parametrize(
    ("settings", "goal", "times"),
    [
        (
            {},
            "at most 3 points of accuracy and 0.05 nats a token may be lost",
            "about 20 min to find and heal paths",
        ),
        ({"layers": 25}, "25 layers stay, however much is lost", "healing it at most 20 min"),
        (
            {"save": "10%"},
            "10% of the layers go, however much is lost",
            "healing it at most 20 min",
        ),
    ],
)
def test_the_first_line_says_what_may_be_lost_and_how_long_it_takes(
    tmp_path, settings, goal, times
):
    row = {"question": "What is %d + 0?", "choices": ["a", "b"], "answer": 0}
    questions = read_rows(tmp_path, row)
    plan = _describe_plan(questions, ShrinkConfig(**settings, minutes=20))
    assert plan.startswith(f"{goal} · ")
    assert times in plan


def test_rows_that_repeat_a_question_are_counted(tmp_path, drllm):
    file = tmp_path / "sums.jsonl"
    row = {"question": "What is %d + 0?", "choices": ["a", "b"], "answer": 0}
    file.write_text("".join(json.dumps(row) % (number % 98) + "\n" for number in range(100)))
    output = drllm("shrink smollm2-135m", file, tmp_path / "out", status=1).out
    assert "held out; 2 of 100 rows repeat a text, left out" in " ".join(output.split())


def test_the_first_line_bounds_no_accuracy_where_nothing_is_graded(tmp_path):
    plan = _describe_plan(read_rows(tmp_path, {"prompt": "Say %d."}), ShrinkConfig())
    assert "points" not in plan
    assert plan.startswith("the loss may rise by at most 0.05 nats a token, and no answers")


@pytest.fixture
def failed_record(record):
    """A record of which the first candidate isn't shown to lose less than half a point."""
    model = record.candidates[0]
    test = judge_task("sums", model.tasks["sums"].against_full, replace(LIMITS, max_drop=0.5))
    trial = Trial(name=model.name, tasks=(replace(test, needed=440),))
    return replace(record, trials=(trial,), chosen=None)


def test_what_is_not_shown_names_its_questions(failed_record):
    assert "not excluded on held-out questions of sums. " in failed_record.verdict
    assert "About 440 held-out questions would probably show it" in failed_record.verdict
    assert "four times" not in failed_record.verdict


def test_a_loss_that_is_shown_is_a_plain_no(record):
    model = record.candidates[1]  # its text loses 0.4 nats a token
    test = judge_task("sums", model.tasks["sums"].against_full, LIMITS)
    trial = Trial(name=model.name, tasks=(test,))
    verdict = replace(record, trials=(trial,), chosen=None).verdict
    assert verdict.startswith("NO: 4 of 6 layers: an increase of the next-token loss by 0.400")
    assert "questions would" not in verdict


def test_what_is_not_shown_of_a_file_says_how_many_questions_the_file_needs(failed_record):
    verdict = replace(failed_record, files=("sums",)).verdict
    assert "if the differences stay the same: four times as many in the file, 1,800. " in verdict


def test_what_is_shown_names_its_questions_and_its_texts(record):
    texts = {"stories": TextScores(loss=3.0)}
    models = tuple(replace(model, texts=texts) for model in record.models)
    verdict = replace(record, models=models).verdict
    assert verdict.endswith("on held-out questions of sums and held-out texts of stories (95 %).")


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("shrink x q.jsonl out", ShrinkConfig),
        ("export --path p --output-dir out", ExportConfig),
    ],
)
def test_epsilon_is_another_name_of_the_largest_loss_of_accuracy(command, settings):
    words = [*command.split(), "--epsilon", "2"]
    assert parse(words).get_settings(settings).max_drop == 2


def test_a_full_model_that_answers_nothing_right_ends_a_shrink_with_status_1(
    drllm, model_folder, tmp_path
):
    row = {"question": "What is %d + 0?", "answer": "forty-two", "grader": "exact"}
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) % number + "\n" for number in range(160)))
    output = tmp_path / "out"
    words = (model_folder(), file, output, "--device", "cpu", "--max-drop", "60")
    out = " ".join(drllm("shrink", *words, status=1).out.split())
    assert "NOT SHOWN: the full model answers none of 30 questions of sums right: to" in out
    assert not output.exists()
    assert not output.with_name("out.work").exists()
