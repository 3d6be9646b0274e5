"""Depths in a report: the curve in numbers and drawings, and every way that a choice can end."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from drllm.reporting import curves
from drllm.reporting.blocks import Table
from drllm.reporting.depth import sections
from drllm.reporting.drawing import LIGHT, svg
from drllm.reporting.numbers import signed
from drllm.reporting.verdicts import outstanding


@pytest.fixture
def evaluation(run: Any) -> Any:
    """One task of 12 layers with a curve of two depths."""
    return run.evaluations[0]


def test_the_curve_stands_in_numbers(run, text_of, make_folder, whole):
    folder = make_folder(num_layers=12, seed=3)
    folder.evaluation(**whole)
    text = text_of(folder.path).replace("\u00a0", " ")
    rows = text.split("*The depth curve in numbers*")[1].strip().split("\n\n")[0].splitlines()
    assert len(rows) == 2 + 1 + 3 * 2
    assert rows[2] == "| base | – | 12.00 | 0.0 % | 55.0 % | – | – | – |"
    points = run.evaluations[0].curve[1].against_base.accuracy
    assert rows[3].startswith("| routed | 10 % saved | 10.80 | 10.0 % | 50.0 % | −5.0 (")
    assert points.mean == pytest.approx(-0.05)
    assert rows[3].endswith("| −0.150 (−0.300 to +0.100) | +0.150 (+0.100 to +0.200) |")


def test_the_routed_model_stands_against_every_baseline_at_every_depth(
    run, text_of, make_folder, whole
):
    folder = make_folder(num_layers=12, seed=3)
    folder.evaluation(**whole)
    text = text_of(folder.path).replace("\u00a0", " ")
    rows = text.split("*The routed model less each baseline, depth by depth")[1].splitlines()
    found = [row.split(" | ") for row in rows if row.startswith(("| 10 %", "| 20 %"))]
    assert [(row[0][2:], row[1]) for row in found] == [
        ("10 % saved", "permuted routes"),
        ("10 % saved", "last layers"),
        ("20 % saved", "permuted routes"),
        ("20 % saved", "last layers"),
    ]
    last = next(p for p in run.evaluations[0].curve if p.name == "last layers, 10 % saved")
    assert found[1][3].startswith(signed(100 * last.routed_against.accuracy.mean, 1))


def test_a_curve_of_before_the_baselines_were_compared_by_depth_has_no_such_table(evaluation):
    older = tuple(replace(point, routed_against=None) for point in evaluation.curve)
    (section, *_) = sections(replace(evaluation, curve=older))
    captions = [block.caption for block in section.blocks if isinstance(block, Table)]
    assert captions == ["The depth curve in numbers"]


def test_a_system_has_its_depths_and_the_one_it_was_trained_for(evaluation):
    placed = curves.by_system(evaluation)
    assert list(placed) == ["routed", "permuted routes", "last layers"]
    trained = evaluation.system("routed").executions
    executions = [each.executions for each in placed["routed"]]
    assert executions == pytest.approx(sorted([9.6, 10.8, trained]))


def test_quantities_that_nobody_knows_are_not_drawn(evaluation):
    assert [m.key for m in curves.known(evaluation)] == ["accuracy", "gold_logprob", "text_loss"]

    def without_gold(one: Any) -> Any:
        against = one.against_base
        return replace(one, against_base=against and replace(against, gold_logprob=None))

    generated = replace(
        evaluation,
        systems=tuple(map(without_gold, evaluation.systems)),
        curve=tuple(map(without_gold, evaluation.curve)),
    )
    assert [m.key for m in curves.known(generated)] == ["accuracy", "text_loss"]
    assert len(curves.depth_curve(generated, ["routed"], LIGHT).axes) == 2


def test_drawn_points_are_the_numbers_with_their_intervals(evaluation):
    figure = curves.depth_curve(evaluation, outstanding(evaluation), LIGHT)
    panel = figure.axes[0]
    lines = {line.get_label(): line for line in panel.get_lines()}
    placed = curves.by_system(evaluation)["routed"]
    assert lines["routed"].get_ydata() == pytest.approx(
        [100 * each.differences.accuracy.mean for each in placed]
    )
    assert lines["routed"].get_xdata() == pytest.approx(
        [each.executions for each in placed],
        abs=0.2,  # side by side
    )
    ends = panel.collections[0].get_segments()[0][:, 1]
    assert ends == pytest.approx([100 * end for end in placed[0].differences.accuracy.interval])


def test_systems_that_stand_out_differ_in_more_than_colour(evaluation):
    assert len({look[0] for look in curves.LOOKS}) == len(curves.LOOKS)
    assert len({look[1] for look in curves.LOOKS}) == len(curves.LOOKS)
    assert len({look[2] for look in curves.LOOKS}) == len(curves.LOOKS)


def test_the_legend_stands_outside_the_panels(evaluation):
    figure = curves.depth_curve(evaluation, outstanding(evaluation), LIGHT)
    figure.canvas.draw()
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == ["last layers", "permuted routes", "routed"]
    top = legend.get_window_extent().y1
    assert all(top <= panel.get_window_extent().y0 for panel in figure.axes)


def test_others_are_faint_lines_with_one_name(evaluation):
    figure = curves.depth_curve(evaluation, ["routed"], LIGHT)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["each other baseline", "routed"]


@pytest.mark.parametrize("measure", curves.MEASURES, ids=lambda each: each.key)
def test_every_baseline_has_a_panel_against_the_routed_model(evaluation, measure):
    figure = curves.one_by_one(evaluation, measure, LIGHT)
    shown = [panel.get_title() for panel in figure.axes if panel.get_visible()]
    assert shown == ["permuted routes", "last layers"]


def test_a_curve_of_the_routed_model_alone_can_be_drawn(evaluation):
    alone = replace(
        evaluation,
        systems=evaluation.systems[:2],
        curve=tuple(point for point in evaluation.curve if point.system in ("base", "routed")),
    )
    drawn = svg(lambda colours: curves.depth_curve(alone, ["routed"], colours), "alone")
    assert ">routed<" in drawn


def test_systems_are_named_beside_their_intervals(evaluation):
    axes = curves.accuracy_of_systems(evaluation, LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "base",
        "routed",
        "permuted routes",
        "last layers",
    ]
    low, high = evaluation.systems[1].interval
    assert axes.collections[1].get_segments()[0][:, 0] == pytest.approx([100 * low, 100 * high])


def test_only_what_is_shown_has_a_full_dot(evaluation):
    figure = curves.routed_against(evaluation, LIGHT)
    accuracy, gold, loss = (
        [line.get_fillstyle() for line in panel.get_lines() if line.get_marker() == "o"]
        for panel in figure.axes
    )
    found = [system.routed_against for system in evaluation.baselines]
    assert accuracy == ["full" if each.accuracy.shown else "none" for each in found]
    assert gold == ["none", "none"]
    assert loss == ["none", "full"]
    guessing = replace(evaluation, chance=0.9)
    panels = curves.routed_against(guessing, LIGHT).axes
    assert {line.get_fillstyle() for line in panels[0].get_lines()[:2]} == {"none"}


# --- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        ("certified", "Certified: routed, 10 % saved (5.40 executions a forward pass)."),
        ("the first fails", "None is certified. The first setting tried fails already."),
        (
            "fails on other questions",
            "None is certified. What was chosen, routed, 10 % saved, fails on the questions that "
            "it was tested on once.",
        ),
        (
            "not tested on others",
            "None is certified. What was chosen, routed, 10 % saved, wasn't tested on other "
            "questions.",
        ),
        (
            "nothing to try",
            "None is certified. Less than 10 points is too little at n = 60.",
        ),
    ],
)
def test_every_end_of_a_choice_is_said_as_plainly(make_folder, text_of, choices, ending, sentence):
    folder = make_folder()
    folder.evaluation(choice=choices[ending])
    section = text_of(folder.path).split("## Certified choice")[1].replace("\u00a0", " ")
    assert section.startswith(f"\n\n**{sentence}**\n")
    assert "less than 10 points of accuracy lost, and a next-token loss less than 0.05" in section
    assert "\n- 60 questions can certify a loss below 5.00 points at best.\n" in section


def test_trials_say_where_they_were_and_why_they_fail(make_folder, text_of, choices):
    folder = make_folder()
    folder.evaluation(choice=choices["certified"])
    section = text_of(folder.path).split("## Certified choice")[1]
    rows = re.findall(r"^\| routed.*$", section, re.MULTILINE)
    assert rows == [
        "| routed, 10 % saved | select | yes | – | 5.40 | 60 | 2 | 3 | 8.25 | 40 | +0.020 "
        "| +0.040 |",
        "| routed, 20 % saved | select | no | next-token loss up to 0.080 nats a token higher is "
        "not excluded | 4.80 | 60 | 2 | 3 | 8.25 | 40 | +0.020 | +0.040 |",
        "| routed, 10 % saved | test, once | yes | – | 5.40 | 60 | 4 | 4 | 8.25 | 40 | +0.020 "
        "| +0.040 |",
    ]


def test_a_report_says_that_worked_answers_were_not_looked_at(make_folder, text_of, choices):
    folder = make_folder()
    folder.evaluation(choice=choices["certified"])
    result, section = text_of(folder.path).replace("\u00a0", " ").split("## Certified choice")
    assert "5.40 executions a forward pass; worked answers weren't looked at." in result
    assert "higher on the questions' own texts; worked answers weren't looked at." in section
    assert "| worked answers |" not in section


def test_a_report_shows_worked_answers_beside_the_questions_own_texts(
    make_folder, text_of, choices
):
    worked = {"num_texts": 50, "loss_increase": 0.031, "greatest_increase": None}
    trials = [{**trial, "worked": worked} for trial in choices["certified"]["trials"]]
    held = {**choices["certified"], "worked_answers": "gsm8k", "trials": trials}
    held["confirmation"] = {**held["confirmation"], "worked": {**worked, "num_texts": 60}}
    folder = make_folder()
    folder.evaluation(choice=held)
    result, section = text_of(folder.path).replace("\u00a0", " ").split("## Certified choice")
    assert "worked answers" not in result
    assert "on the questions' own texts and on worked answers of gsm8k." in section
    header, *rows = re.findall(r"^\| (?:setting|routed).*$", section, re.MULTILINE)
    assert header.endswith("| worked answers | their next-token loss, nats | at most, nats |")
    assert [row.split(" | ")[-3:] for row in rows] == [
        ["50", "+0.031", "– |"],
        ["50", "+0.031", "– |"],
        ["60", "+0.031", "– |"],
    ]


def test_depths_of_what_is_tested_on_select_are_chosen_on_fit(make_folder, text_of, choices):
    folder = make_folder()
    folder.evaluation(choice=choices["certified"], changes={"split": "select"})
    section = text_of(folder.path).split("## Certified choice")[1]
    rows = re.findall(r"^\| routed.*$", section, re.MULTILINE)
    assert [row.split(" | ")[1] for row in rows] == ["fit", "fit", "select, once"]


def test_a_choice_made_on_another_tasks_questions_says_whose(make_folder, text_of, choices):
    folder = make_folder()
    held = {**choices["certified"], "chosen_on": "arc_easy (select)"}
    folder.evaluation(choice=held)
    section = text_of(folder.path).split("## Certified choice")[1]
    rows = re.findall(r"^\| routed.*$", section, re.MULTILINE)
    where = ["arc_easy (select)", "arc_easy (select)", "test, once"]
    assert [row.split(" | ")[1] for row in rows] == where


def test_what_the_choice_says_is_not_said_again_among_the_findings(make_folder, text_of, choices):
    folder = make_folder()
    findings = ["Something else.", *choices["certified"]["sentences"]]
    folder.evaluation(choice=choices["certified"], changes={"findings": findings})
    result, section = text_of(folder.path).split("## Certified choice")
    assert "- Something else." in result
    assert "can certify a loss below" not in result
    assert section.count("can certify a loss below") == 1


# --- several seeds -----------------------------------------------------------------------------

ROW = {
    "setting": "10 % saved",
    "num_seeds": 3,
    "accuracy": {"mean": 0.5, "lowest": 0.45, "highest": 0.55, "deviation": 0.05},
    "executions": {"mean": 10.8, "lowest": 10.7, "highest": 10.9, "deviation": 0.1},
    "against_base": {
        "accuracy": {"mean": -0.05, "interval": [-0.1, 0.01], "shown": None},
        "gold_logprob": {"mean": -0.2, "interval": [-0.3, -0.1], "shown": "lower"},
        "text_loss": None,
    },
    "against_permuted": None,
}


def test_seeds_stand_in_a_table_of_their_own(make_folder, text_of, whole):
    folder = make_folder(num_layers=12, seed=3)
    folder.evaluation(**whole, changes={"seeds": [ROW]})
    text = text_of(folder.path).replace("\u00a0", " ")
    section = text.split("## Routers of several seeds")[1].split("\n## ")[0]
    assert (
        "| 10 % saved | 3 | 10.80 (10.70 to 10.90) | 50.0 (45.0 to 55.0) | 5.0 | "
        "−5.0 (−10.0 to +1.0) | −0.200 (−0.300 to −0.100) | – | – |"
    ) in section


def test_one_seed_has_no_such_section(make_folder, text_of, whole):
    folder = make_folder(num_layers=12, seed=3)
    folder.evaluation(**whole)
    assert "several seeds" not in text_of(folder.path)
