"""The tables of a test, by the values that a reader sees."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from drllm.reporting.evaluated import outstanding, over_tasks, rivals
from drllm.reporting.sections import command
from drllm.statistics.verdicts import judge_counts


def table(text: str, caption: str) -> list[list[str]]:
    """Return the cells of the table of a caption, its header first."""
    after = text.replace("\u00a0", " ").split(f"*{caption}", 1)[1].split("\n\n", 2)[1]
    rows = [line.strip("| ").split(" | ") for line in after.splitlines()]
    return [rows[0], *rows[2:]]


def replace_systems(folder: Any, **fields: dict[str, Any]) -> None:
    """Give systems other values, by name."""

    def apply(values: dict[str, Any]) -> None:
        for row in values["systems"]:
            row.update(fields.get(row["name"].replace(" ", "_"), {}))

    folder.change("eval/arc_easy.json", apply)


@pytest.fixture
def folder(folder: Any) -> Any:
    folder.evaluation(accuracies=(0.7, 0.5, 0.5))
    return folder


@pytest.mark.parametrize("corrected", [0.06, None])
def test_corrected_p_values_stand_below_the_table(folder, text_of, corrected):
    def correct(values: dict[str, Any]) -> None:
        values["systems"][1]["against_base"]["accuracy"].update(p=0.02, p_corrected=corrected)

    folder.change("eval/arc_easy.json", correct)
    assert ("(Holm): routed p = 0.060." in text_of(folder.path)) == (corrected is not None)


def test_an_interval_without_width_is_said_to_be_no_certainty(folder, text_of):
    assert "no sign of certainty" not in text_of(folder.path)
    replace_systems(folder, permuted_routes={"interval": [0.5, 0.5]})
    assert "no sign of certainty" in text_of(folder.path)


def test_what_is_not_known_or_measured_of_costs_is_a_dash_and_said(folder, text_of):
    replace_systems(folder, base={"prompt_flops": None, "kv_bytes_per_token": None})
    text = text_of(folder.path)
    assert table(text, "Layer executions")[1][5:8] == ["–", "–", "–"]
    assert "own time were not measured: there is no latency.json" in text


def test_generated_answers_have_decoding_and_no_log_probability(folder, text_of):
    folder.change(
        "eval/arc_easy.json", lambda v: v.update(kind="generated", metric="exact_match", chance=0.0)
    )
    generated = {"gold_logprob": None, "decode_executions": 3.5}
    names = ("base", "routed", "permuted_routes", "last_layers")
    replace_systems(folder, **dict.fromkeys(names, generated))
    text = text_of(folder.path)
    assert "answers are generated, metric exact_match" in text
    assert table(text, "arc_easy, 60 questions")[1][5] == "–"
    assert table(text, "Layer executions a forward pass")[1][3] == "3.50"


def test_grades_are_named_by_their_metric_and_count_no_wins(folder, text_of):
    folder.grade()
    text = text_of(folder.path)
    assert table(text, "arc_easy, 60 questions")[0][1] == "f1"
    assert "Answers are graded by f1, so that none is simply won or lost." in text


def test_a_run_without_baselines_has_no_comparison_with_them(folder, text_of):
    folder.change("eval/arc_easy.json", lambda v: v.update(systems=v["systems"][:2]))
    text = text_of(folder.path)
    assert "The routed model less each baseline" not in text
    assert "| routed |" in text


def test_a_handful_of_questions_makes_a_report(new_folder, text_of):
    folder = new_folder()
    folder.evaluation(questions=2, accuracies=(0.5, 0.5, 0.5), depths=(0.1,))
    assert "2 questions" in text_of(folder.path)


def test_rivals_run_as_much_and_are_no_controls(run):
    (evaluation,) = run.evaluations
    base, routed, permuted, last = evaluation.systems
    near = replace(last, name="near", executions=routed.executions + 0.1, gold_logprob=-0.5)
    far = replace(last, name="far", executions=routed.executions + 0.2)
    reader = replace(last, name="reader", reads_question=True)
    found = replace(evaluation, systems=(base, routed, permuted, last, near, far, reader))
    assert [each.name for each in rivals(found)] == ["near", "last layers"]
    assert [each.name for each in rivals(found, read_question=True)] == ["reader"]
    assert outstanding(found) == ["routed", "permuted routes", "near", "reader"]
    assert rivals(replace(evaluation, systems=(base,))) == []


@pytest.fixture(scope="module")
def two(new_folder: Any, text_of: Any) -> str:
    folder = new_folder()
    folder.evaluation(accuracies=(0.7, 0.3, 0.3))
    folder.evaluation(task="guessed", questions=20, accuracies=(0.3, 0.4, 0.3))
    folder.change("eval/guessed.json", lambda values: values["systems"].pop(3))
    text: str = text_of(folder.path)
    return text


def test_tasks_are_counted_by_what_is_shown_on_them(run):
    (evaluation,) = run.evaluations
    worse = judge_counts(2, 40, 60)
    routed = evaluation.routed
    lost = replace(routed, against_base=replace(routed.against_base, accuracy=worse))
    other = replace(
        evaluation, task="other", systems=(evaluation.base, lost, *evaluation.systems[2:])
    )
    accuracy, loss, permuted = over_tasks([evaluation, other])
    first = evaluation.routed.against_base.accuracy.label
    assert accuracy == (
        f"The routed model, by accuracy against base: {first} on 1 (arc_easy); worse on 1 (other)."
    )
    assert loss.endswith("worse on 2 (arc_easy, other).")
    assert permuted.startswith("The routed model, by accuracy against its own routes permuted: ")
    assert over_tasks([replace(evaluation, systems=(evaluation.base,))]) == []


def test_the_tasks_stand_side_by_side_with_their_verdicts(two):
    header, first, second = table(two, "The tasks at a glance.")
    assert header[6:8] == ["routed against base", "against its permuted routes"]
    assert header[8:] == ["best fixed baseline", "against it"]
    assert first[:5] == ["arc_easy", "60", "yes (25.0 %)", "70.0 %", "30.0 %"]
    assert first[6] == "worse"
    assert first[8] == "last layers, 15.0 %"
    assert second[2] == "not shown (25.0 %)"
    assert second[6:] == ["no verdict", "no verdict", "–", "–"]


@pytest.mark.parametrize(
    ("caption", "base", "last"),
    [
        ("Accuracy in percent", "70.0 (57.5 to 80.1 %)", "15.0 (8.1 to 26.1 %)"),
        ("Gold log-probability, nats a question", "−1.200", "−1.200"),
        ("Next-token loss, nats a token", "3.800", "4.600"),
    ],
)
def test_each_quantity_has_a_table_of_tasks_by_systems(two, caption, base, last):
    header, first, second = table(two, caption)
    assert header == ["task", "base", "routed", "permuted routes", "last layers"]
    assert [first[1], first[4]] == [base, last]
    assert [second[0], second[4]] == ["guessed", "–"]


def test_every_task_has_its_sections_below_it_and_its_findings_above(two):
    headings = [line for line in two.splitlines() if line.startswith("#")]
    first = headings.index("## arc_easy")
    titles = ("Systems compared", "Questions that change", "Routes", "Example questions")
    parts = [f"### {title}" for title in titles]
    expected = ["## arc_easy", *parts, "## guessed", *parts, "## Routes by task"]
    assert headings[first : first + 11] == expected
    for task in ("arc_easy", "guessed"):
        section = two.split(f"\n## {task}\n\n")[1].split("\n### ")[0]
        assert section.startswith("**No difference between routed and base is shown.**")
        assert f"on {task}, test split" in section
    assert table(two, "Routes by task")[1][:2] == ["arc_easy", "60"]
    rows = table(two, "Share of the questions whose route skips each layer")
    assert rows[0] == ["layer", "arc_easy", "guessed"]
    assert len(rows) == 1 + 4


def test_settings_of_every_kind_can_stand_in_a_command():
    config = {"tasks": "a,b", "chat": True, "epsilon": 2.0, "search": "my runs/search.jsonl"}
    assert command({"routers": "r", "config": config}) == (
        "drllm evaluate --routers r --tasks a,b --chat true --search 'my runs/search.jsonl' "
        "--epsilon 2.0"
    )
