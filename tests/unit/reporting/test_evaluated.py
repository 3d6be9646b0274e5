"""The tables of a test, by the values that a reader sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from drllm.reporting.provenance import command


def table(text: str, caption: str) -> list[list[str]]:
    """Return the cells of the table of a caption, its header first."""
    after = text.replace("\u00a0", " ").split(f"*{caption}", 1)[1].split("\n\n", 2)[1]
    rows = [line.strip("| ").split(" | ") for line in after.splitlines()]
    return [rows[0], *rows[2:]]


def change(folder: Any, change: Callable[[dict[str, Any]], Any], task: str = "arc_easy") -> None:
    path = folder.path / "eval" / f"{task}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def replace_systems(folder: Any, **fields: dict[str, Any]) -> None:
    """Give systems other values, by name."""

    def apply(values: dict[str, Any]) -> None:
        for row in values["systems"]:
            row.update(fields.get(row["name"].replace(" ", "_"), {}))

    change(folder, apply)


@pytest.fixture
def folder(make_folder: Any) -> Any:
    made = make_folder()
    made.evaluation(questions=60, accuracies=(0.7, 0.5, 0.5))
    return made


# --- one task ----------------------------------------------------------------------------------


def test_what_was_asked_stands_before_the_numbers(folder, text_of):
    text = text_of(folder.path).replace("\u00a0", " ")
    assert (
        "Measured: smollm2-135m (4 layers) on arc_easy, test split, 60 questions, options are "
        "scored, metric acc, no worked examples."
    ) in text


def test_the_table_of_systems_holds_every_number(folder, text_of):
    header, base, routed, permuted, last = table(text_of(folder.path), "arc_easy, 60 questions")
    assert header[-6:] == [
        "gold log-probability, nats",
        "next-token loss, nats",
        "won",
        "lost",
        "McNemar p",
        "draws",
    ]
    assert base[:3] == ["base", "70.0 %", "58.4 to 81.6 %"]
    assert base[5:] == ["−1.200", "3.800", "–", "–", "–", "1"]
    assert routed[6] == "3.900"
    assert int(routed[7]) - int(routed[8]) == -12
    assert permuted[-1] == "10"
    assert last[7:] == ["2", "20", "0.001", "1"]


def test_sources_and_what_each_was_fitted_on_are_shown(folder, text_of):
    rows = table(text_of(folder.path), "What the systems are")
    assert rows[0] == ["system", "what it does", "source", "fitted on", "routes unchanged"]
    assert rows[1] == ["base", "what base means", "–", "–", "–"]
    assert rows[3] == [
        "permuted routes",
        "what permuted routes means",
        "the paper of permuted routes",
        "nothing",
        "2.0 %",
    ]


def test_what_is_not_compared_is_named_with_the_reason(folder, text_of):
    assert table(text_of(folder.path), "Not compared")[1] == [
        "LayerSkip",
        "needs weights of its own",
    ]


def test_all_metrics_are_there_where_there_are_several(folder, text_of):
    rows = table(text_of(folder.path), "All that lm-evaluation-harness says of the answers")
    assert rows[:2] == [["system", "acc", "acc_norm"], ["base", "0.7000", "0.3500"]]
    replace_systems(
        folder, **{n: {"metrics": {"acc": 0.5}} for n in ("base", "routed", "last_layers")}
    )
    replace_systems(folder, permuted_routes={"metrics": {}})
    assert "All that lm-evaluation-harness" not in text_of(folder.path)


def test_a_reader_sees_at_a_glance_whom_routing_beats(folder, text_of):
    differences = {
        "accuracy": {"mean": 0.25, "interval": [0.1, 0.4], "shown": "higher"},
        "gold_logprob": {"mean": 0.5, "interval": [-0.1, 1.1], "shown": None},
        "text_loss": {"mean": 0.2, "interval": [0.1, 0.3], "shown": "higher"},
    }
    replace_systems(folder, last_layers={"routed_against": differences, "reads_question": True})
    header, permuted, last = table(text_of(folder.path), "The routed model less each baseline")
    assert header[:2] == ["baseline", "routed, by accuracy"]
    assert permuted[:2] == ["permuted routes", "○ not shown"]
    assert permuted[-1] == "no"
    assert last == [
        "last layers",
        "▲ better",
        "+25.0 (+10.0 to +40.0)",
        "○ not shown",
        "+0.500 (−0.100 to +1.100)",
        "▼ worse",
        "+0.200 (+0.100 to +0.300)",
        last[7],
        "yes",
    ]


def test_verdicts_are_withheld_where_base_may_be_guessing(folder, text_of):
    change(folder, lambda values: values.update(chance=0.65))
    _, permuted, last = table(text_of(folder.path), "The routed model less each baseline")
    for row in (permuted, last):
        assert row[1] == row[3] == "– no verdict"
        assert row[5] in ("▲ better", "○ not shown")  # whoever guesses still reads texts


@pytest.mark.parametrize(("corrected", "shown"), [(0.06, True), (0.02, False), (None, False)])
def test_corrected_p_values_stand_below_the_table_where_they_differ(
    folder, text_of, corrected, shown
):
    replace_systems(folder, routed={"mcnemar_p": 0.02, "mcnemar_p_holm": corrected})
    assert ("(Holm): routed p = 0.060." in text_of(folder.path)) == shown


@pytest.mark.parametrize("half", [0.0, 0.04])
def test_an_interval_without_width_is_said_to_be_no_certainty(folder, text_of, half):
    replace_systems(folder, permuted_routes={"interval": [0.5 - half, 0.5 + half]})
    assert ("no sign of certainty" in text_of(folder.path)) == (half == 0)


def test_seconds_are_the_evaluation_s_own_and_said_to_be_no_latency(folder, text_of):
    text = text_of(folder.path)
    header, base, *_ = table(text, "The evaluation's own time, measured")
    assert header == ["task", "system", "seconds, one draw", "seconds a question"]
    assert base == ["arc_easy", "base", "12.3", "0.206"]
    assert "neither a latency nor a throughput" in text


def test_what_is_derived_is_shown_apart_and_said_to_be_derived(folder, text_of):
    text = text_of(folder.path)
    header, base, *_ = table(text, "Layer executions a forward pass, counted; FLOPs")
    assert header[5:8] == ["GFLOPs with weights", "GFLOPs of attention", "K/V bytes a token"]
    assert base == ["arc_easy", "base", "4.00", "–", "0.0 %", "6", "0.08", "3 072"]
    assert "follow from the model's shape and the routes and were not measured" in text
    replace_systems(folder, base={"prompt_flops": None, "kv_bytes_per_token": None})
    assert table(text_of(folder.path), "Layer executions")[1][5:8] == ["–", "–", "–"]


def test_measured_time_stands_apart_with_its_machine_and_its_rounds(folder, text_of):
    assert "own time were not measured: there is no latency.json" in text_of(folder.path)
    folder.latency()
    text = text_of(folder.path)
    derived, measured = text.split("### Counted and derived")[1].split("### Measured")
    assert "Time of base and routed" not in derived
    machine = "Linux x86_64, Processor 9000, 2 cores; cpu, float32, 2 threads"
    assert f"Measured on {machine}." in measured.replace("\u00a0", " ")
    header, *rows = table(
        text, "Time of base and routed, measured: medians of 3 interleaved rounds"
    )
    assert header[:5] == ["what, rows of the batch", "base, ms", "routed, ms", "routed / base",
                          "lowest to highest"]  # fmt: skip
    assert [row[0] for row in rows] == [
        f"{phase}, {size}" for phase in ("reading", "decoding") for size in (1, 4, 16)
    ]
    # By hand: medians of 100, 120, 110 and 90, 120, 90.2 ms; ratios 0.9, 1.0, 0.82; 16 tokens.
    routers = "3.00 (2.00 to 5.00)"
    assert rows[0][1:] == ["110", "90.2", "0.900", "0.820 to 1.000", "145", "177", "3.50", routers]
    assert rows[3][1:] == ["55.0", "45.1", "0.900", "0.820 to 1.000", "36.4", "44.3", "3.50", "–"]
    every = table(text, "All rounds of all systems, measured")
    assert every[2] == ["routed", "what routed is", "reading, 1", "3.50", "90.2", "177",
                        "90.0; 120; 90.2"]  # fmt: skip
    assert "were not measured: there is no latency.json" not in text


# --- other kinds of tasks ----------------------------------------------------------------------


def test_generated_answers_have_decoding_and_no_log_probability(folder, text_of):
    change(folder, lambda values: values.update(kind="generated", metric="exact_match", chance=0.0))
    nothing = {"gold_logprob": None}
    for name in ("base", "routed", "permuted_routes", "last_layers"):
        replace_systems(folder, **{name: {**nothing, "decode_executions": 3.5}})
    text = text_of(folder.path)
    assert "answers are generated, metric exact_match" in text
    assert table(text, "arc_easy, 60 questions")[1][5] == "–"
    assert table(text, "Layer executions a forward pass")[1][3] == "3.50"


def test_grades_are_named_by_their_metric_and_count_no_wins(make_folder, text_of):
    folder = make_folder()
    folder.evaluation(accuracies=(0.7, 0.5, 0.5))
    change(folder, lambda values: values.update(metric="f1"))
    replace_systems(folder, routed={"won": None, "lost": None, "mcnemar_p": None})
    text = text_of(folder.path)
    assert table(text, "arc_easy, 60 questions")[0][1] == "f1"
    assert "Answers are graded by f1, so that none is simply won or lost." in text
    assert "Won and lost count questions" not in text
    assert "keep their grade under routing" in text


def test_a_run_without_baselines_has_no_comparison_with_them(folder, text_of):
    change(folder, lambda values: values.update(systems=values["systems"][:2]))
    text = text_of(folder.path)
    assert "The routed model less each baseline" not in text
    assert "permuted" not in text.split("## Routes")[0]
    assert "| routed |" in text


def test_a_handful_of_questions_makes_a_report(make_folder, text_of):
    folder = make_folder()
    folder.evaluation(questions=2, accuracies=(0.5, 0.5, 0.5), depths=(0.1,))
    assert "2 questions" in text_of(folder.path)


# --- several tasks -----------------------------------------------------------------------------


@pytest.fixture
def two(make_folder: Any, text_of: Any) -> str:
    folder = make_folder()
    folder.evaluation(accuracies=(0.7, 0.3, 0.3))
    folder.evaluation(task="guessed", questions=20, accuracies=(0.3, 0.4, 0.3))
    change(folder, lambda values: values["systems"].pop(3), "guessed")
    text: str = text_of(folder.path)
    return text


def test_the_tasks_stand_side_by_side_with_their_verdicts(two):
    header, first, second = table(two, "The tasks at a glance.")
    assert header[6:] == [
        "routed against base",
        "against its permuted routes",
        "best fixed baseline",
        "against it",
    ]
    assert first[:5] == ["arc_easy", "60", "yes (25.0 %)", "70.0 %", "30.0 %"]
    assert first[6:8] == ["▼ worse", "○ not shown"]
    assert first[8] == "last layers, 15.0 %"
    assert second[2] == "not shown (25.0 %)"
    assert second[6:] == ["– no verdict"] * 2 + ["–", "– not tested"]


@pytest.mark.parametrize(
    ("caption", "base", "last"),
    [
        ("Accuracy in percent", "70.0 (58.4 to 81.6)", "15.0 (6.0 to 24.0)"),
        ("Gold log-probability, nats a question", "−1.200", "−1.200"),
        ("Next-token loss, nats a token", "3.800", "4.600"),
    ],
)
def test_each_quantity_has_a_table_of_tasks_by_systems(two, caption, base, last):
    header, first, second = table(two, caption)
    assert header == ["task", "base", "routed", "permuted routes", "last layers"]
    assert [first[1], first[4]] == [base, last]
    assert [second[0], second[4]] == ["guessed", "–"]


def test_every_task_has_its_sections_below_it_and_its_sentence_above(two):
    headings = [line for line in two.splitlines() if line.startswith("#")]
    first, second = headings.index("## arc_easy"), headings.index("## guessed")
    parts = [
        "### Systems compared",
        "### Questions that change",
        "### Routes",
        "### Example questions",
    ]
    assert headings[first + 1 : second] == parts
    assert headings[second + 1 : second + 5] == parts
    assert headings[second + 5] == "## Routes by task"
    for task in ("arc_easy", "guessed"):
        section = two.split(f"\n## {task}\n\n")[1].split("\n### ")[0]
        assert section.startswith(f"**On {task}, with")
        assert f"on {task}, test split" in section
        assert "- No difference between routed and base is shown." in section
    assert "Findings" not in two.split("\n## arc_easy\n")[0]


def test_routes_by_task_and_layer_are_shown(two):
    assert table(two, "Routes by task")[1][:2] == ["arc_easy", "60"]
    rows = table(two, "Share of the questions whose route skips each layer")
    assert rows[0] == ["layer", "arc_easy", "guessed"]
    assert len(rows) == 1 + 4


# --- provenance --------------------------------------------------------------------------------


def test_hashes_of_what_the_files_were_made_from_are_shown(folder, text_of):
    rows = table(text_of(folder.path), "What these files were made from in turn")
    assert rows[1] == ["eval/arc_easy.json", "routers.safetensors", "5" * 64]


def test_the_command_that_repeats_the_evaluation_is_shown(folder, text_of):
    text = text_of(folder.path)
    assert "Command that repeats the evaluation\n" in text
    assert (
        "drllm evaluate --model smollm2-135m --dtype float32 --device cpu "
        "--attn-implementation sdpa --routers routers --tasks arc_easy --seed 7\n"
    ) in text
    change(folder, lambda values: values.pop("runtime"))
    text = text_of(folder.path)
    assert "Command that repeats the evaluation (the dtype and the device aren't recorded)" in text
    assert (
        "drllm evaluate --model smollm2-135m --routers routers --tasks arc_easy --seed 7\n" in text
    )


def test_how_the_base_model_ran_is_shown_once_for_files_that_agree(folder, text_of):
    folder.evaluation(task="arc_challenge")
    rows = table(text_of(folder.path), "How the base model ran")
    files = "eval/arc_challenge.json, eval/arc_easy.json"
    assert rows[1:] == [[files, "float32", "cpu", "sdpa", "–", "–"]]
    folder.latency()
    rows = table(text_of(folder.path), "How the base model ran")
    machine = "Linux x86_64, Processor 9000, 2 cores"
    assert rows[2:] == [["eval/latency.json", "float32", "cpu", "sdpa", "2", machine]]
    for task in ("arc_easy", "arc_challenge"):
        change(folder, lambda values: values.pop("runtime"), task)
    (folder.path / "eval" / "latency.json").unlink()
    assert "How the base model ran" not in text_of(folder.path)


def test_settings_of_every_kind_can_stand_in_a_command():
    config = {"tasks": "a,b", "chat": True, "epsilon": 2.0, "search": "my runs/search.jsonl"}
    assert command({"routers": "r", "config": config}) == (
        "drllm evaluate --routers r --tasks a,b --chat true --search 'my runs/search.jsonl' "
        "--epsilon 2.0"
    )


def test_equal_settings_are_shown_once(make_folder, text_of):
    folder = make_folder()
    folder.search()
    folder.supervision()
    assert text_of(folder.path).count("Settings of search.jsonl, supervision.jsonl") == 1
