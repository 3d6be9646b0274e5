"""The drawing of what static paths keep: accuracy and next-token loss beside base's."""

import dataclasses
from typing import Any

import pytest
from msgspec.structs import replace

from drllm.reporting.drawing import LIGHT, NARROW, WIDE
from drllm.reporting.path_figure import can_draw_paths, draw_paths
from drllm.reporting.sections import build_document
from run_folder import add_paths


@pytest.fixture
def paths(run: Any) -> Any:
    """A result of base and two paths."""
    return add_paths(run.evaluations[0], 2, routed=False)


def test_every_system_has_a_row_with_its_numbers_and_intervals(paths):
    accuracy_axes, loss_axes = draw_paths(paths, LIGHT, WIDE).axes
    assert [text.get_text() for text in accuracy_axes.get_yticklabels()] == [
        "base\nall 12 layers",
        "skip2\n10 layers",
        "skip1\n11 layers",
    ]
    accuracy_lines, loss_lines = accuracy_axes.get_lines(), loss_axes.get_lines()
    for row, system in enumerate(paths.systems):
        interval, dot = accuracy_lines[2 * row : 2 * row + 2]
        assert list(interval.get_xdata()) == pytest.approx([100 * end for end in system.interval])
        assert list(dot.get_xdata()) == pytest.approx([100 * system.accuracy])
        interval, dot = loss_lines[2 * row : 2 * row + 2]
        assert list(dot.get_xdata()) == pytest.approx([system.text_loss])
        ends = [system.text_loss, system.text_loss]
        if system.against_base is not None:
            ends = [paths.base.text_loss + end for end in system.against_base.text_loss.interval]
        assert list(interval.get_xdata()) == pytest.approx(ends)


def test_in_a_narrow_figure_the_panels_are_below_each_other(paths):
    above, below = draw_paths(paths, LIGHT, NARROW).axes
    assert above.get_subplotspec().colspan == below.get_subplotspec().colspan


def test_the_report_of_paths_alone_has_this_figure(run, paths):
    report = build_document([dataclasses.replace(run, evaluations=[paths])])
    assert "What each path keeps" in [section.title for section in report.sections]


def test_beside_routers_or_without_a_loss_there_is_another_figure(run, paths):
    assert can_draw_paths(paths)
    assert not can_draw_paths(run.evaluations[0])
    without_loss = [replace(system, text_loss=None) for system in paths.systems]
    assert not can_draw_paths(replace(paths, systems=tuple(without_loss)))
