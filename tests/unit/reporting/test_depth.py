"""Depths in a report: the curve in numbers and drawings, and every way that a choice can end."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from drllm.records.results import Seeds, Spread
from drllm.reporting import figures
from drllm.reporting.drawing import LIGHT, svg
from drllm.reporting.evaluated import outstanding


@pytest.fixture(scope="module")
def evaluation(run: Any) -> Any:
    """One task of 12 layers with a curve of two depths."""
    return run.evaluations[0]


def test_a_system_has_its_depths_and_the_one_it_was_trained_for(evaluation):
    placed = figures.by_system(evaluation)
    assert list(placed) == ["routed", "permuted routes", "last layers"]
    trained = evaluation.system("routed").executions
    executions = [each.executions for each in placed["routed"]]
    assert executions == pytest.approx(sorted([9.6, 10.8, trained]))


def test_quantities_that_nobody_knows_are_not_drawn(evaluation):
    assert [m.key for m in figures.known(evaluation)] == ["accuracy", "gold_logprob", "text_loss"]

    def without_gold(one: Any) -> Any:
        against = one.against_base
        return replace(one, against_base=against and replace(against, gold_logprob=None))

    generated = replace(
        evaluation,
        systems=tuple(map(without_gold, evaluation.systems)),
        curve=tuple(map(without_gold, evaluation.curve)),
    )
    assert [m.key for m in figures.known(generated)] == ["accuracy", "text_loss"]
    assert len(figures.depth_curve(generated, ["routed"], LIGHT).axes) == 2


def test_drawn_points_are_the_numbers_with_their_intervals(evaluation):
    figure = figures.depth_curve(evaluation, outstanding(evaluation), LIGHT)
    panel = figure.axes[0]
    lines = {line.get_label(): line for line in panel.get_lines()}
    placed = figures.by_system(evaluation)["routed"]
    assert lines["routed"].get_ydata() == pytest.approx(
        [100 * each.against_base.accuracy.mean for each in placed]
    )
    assert lines["routed"].get_xdata() == pytest.approx(
        [each.executions for each in placed],
        abs=0.2,  # side by side
    )
    ends = panel.collections[0].get_segments()[0][:, 1]
    assert ends == pytest.approx([100 * end for end in placed[0].against_base.accuracy.interval])


def test_systems_that_stand_out_differ_in_more_than_colour():
    assert all(len(set(looks)) == len(figures.LOOKS) for looks in zip(*figures.LOOKS, strict=True))


def test_the_legend_stands_outside_the_panels_and_names_others_once(evaluation):
    figure = figures.depth_curve(evaluation, outstanding(evaluation), LIGHT)
    figure.canvas.draw()
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == ["last layers", "permuted routes", "routed"]
    top = legend.get_window_extent().y1
    assert all(top <= panel.get_window_extent().y0 for panel in figure.axes)
    [legend] = figures.depth_curve(evaluation, ["routed"], LIGHT).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["each other baseline", "routed"]


@pytest.mark.parametrize("measure", figures.MEASURES, ids=lambda each: each.key)
def test_every_baseline_has_a_panel_against_the_routed_model(evaluation, measure):
    figure = figures.one_by_one(evaluation, measure, LIGHT)
    shown = [panel.get_title() for panel in figure.axes if panel.get_visible()]
    assert shown == ["permuted routes", "last layers"]


def test_a_curve_of_the_routed_model_alone_can_be_drawn(evaluation):
    alone = replace(
        evaluation,
        systems=evaluation.systems[:2],
        curve=tuple(point for point in evaluation.curve if point.system in ("base", "routed")),
    )
    drawn = svg(lambda colours: figures.depth_curve(alone, ["routed"], colours), "alone")
    assert ">routed<" in drawn


def test_systems_are_named_beside_their_intervals(evaluation):
    axes = figures.accuracy_of_systems(evaluation, LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "base",
        "routed",
        "permuted routes",
        "last layers",
    ]
    low, high = evaluation.systems[1].interval
    assert axes.collections[1].get_segments()[0][:, 0] == pytest.approx([100 * low, 100 * high])


def test_only_what_is_shown_has_a_full_dot(evaluation):
    figure = figures.routed_against(evaluation, LIGHT)
    accuracy, gold, loss = (
        [line.get_fillstyle() for line in panel.get_lines() if line.get_marker() == "o"]
        for panel in figure.axes
    )
    found = [system.routed_against for system in evaluation.baselines]
    assert accuracy == ["full" if each.accuracy.is_better is not None else "none" for each in found]
    assert gold == ["none", "none"]
    assert loss == ["none", "full"]


def choice_of(folder: Any, text_of: Any, choice: Any, **changes: Any) -> tuple[str, str]:
    """Return what is said before the section on a choice, and the section."""
    folder.evaluation(choice=choice, changes=changes)
    before, section = text_of(folder.path).replace("\u00a0", " ").split("## Certified choice")
    return before, section.split("\n## ")[0]


def test_the_choice_is_said_by_itself_with_every_trial(folder, text_of, whole):
    choice = whole["choice"]
    findings = ["Something else.", *choice.sentences()]
    result, section = choice_of(folder, text_of, choice, findings=findings)
    assert section.startswith(f"\n\n**{choice.verdict()}**\n")
    assert f"- {choice.verdict()}" in result
    for sentence in choice.sentences()[:-1]:
        assert sentence not in result
        assert section.count(sentence) == 1


def test_a_choice_of_nothing_has_no_trials(folder, text_of, whole):
    nothing = replace(whole["choice"], trials=(), confirmation=None, obstacle="Too few questions")
    _, section = choice_of(folder, text_of, nothing)
    assert section.startswith("\n\n**None is certified: too few questions.**")
    assert "|" not in section


def test_worked_answers_have_columns_of_their_own(folder, text_of, whole):
    choice = whole["choice"]
    worked = replace(choice.trials[0].texts, num_texts=50, increase=0.031, maximum=None)
    trials = tuple(replace(trial, worked=worked, failures=("x",)) for trial in choice.trials)
    held = replace(choice, worked_answers="gsm8k", trials=trials, confirmation=None)
    _, section = choice_of(folder, text_of, held)
    header, *rows = re.findall(r"^\| (?:setting|routed).*$", section, re.MULTILINE)
    assert header.endswith("| worked answers | their next-token loss, nats | at most, nats |")
    assert [row.split(" | ")[-3:] for row in rows] == [["50", "+0.031", "– |"]] * 2


def test_seeds_stand_in_a_table_of_their_own(evaluation, folder, text_of):
    row = Seeds(
        setting="10 % saved",
        num_seeds=3,
        accuracy=Spread.of([0.45, 0.5, 0.55]),
        executions=Spread.of([10.7, 10.8, 10.9]),
        gold_logprob=None,
        text_loss=None,
        against_base=replace(evaluation.curve[1].against_base, text_loss=None),
        against_permuted=None,
    )
    folder.evaluation(changes={"seeds": [msgspec.to_builtins(row)]})
    said = text_of(folder.path).replace("\u00a0", " ")
    section = said.split("## Routers of several seeds")[1].split("\n## ")[0]
    assert "| 10 % saved | 3 | 10.80 (10.70 to 10.90) | 50.0 (45.0 to 55.0) | 5.0 |" in section
    assert section.rstrip().endswith("| −0.150 (−0.350 to +0.050) | – | – |")
