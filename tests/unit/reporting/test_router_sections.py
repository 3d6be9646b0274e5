"""The sections on search, targets and routers show the stages' own counts."""

import dataclasses

import pytest
from msgspec.structs import replace

from drllm.agreement import compare_by_layer, compute_metrics
from drllm.paths import Decision
from drllm.reporting.drawing import LIGHT, draw_svg
from drllm.reporting.numbers import write_number
from drllm.reporting.router_sections import MIN_QUESTIONS, router_section, search_section
from drllm.reporting.run import read_run
from drllm.supervision.summary import edit_effects
from run_folder import section_text


def test_a_copy_of_a_question_is_told_and_counts_once(run):
    copy = replace(run.search[0], task="another", id="copy")
    copied = dataclasses.replace(run, search=[*run.search, copy], sources=[])
    text = section_text([search_section(copied)])
    assert text.startswith("40 questions and 1 copies of them were searched, ")
    right = sum(record.full.reward >= 1 for record in run.search)
    assert f"The full path answers {right} (" in text
    assert "*Of 40 questions, how many have such a path." in text


def test_the_worst_single_skip_is_named(run):
    worst, change = edit_effects(run.search, Decision.SKIP, MIN_QUESTIONS)[-1]
    assert change < 0
    assert f", worst {worst} (−" in section_text([search_section(run)])


def test_routers_stand_beside_decisions_that_ignore_the_question(run):
    systems = run.layers.parts["validation"]
    section = router_section(run)
    text = section_text([section])
    assert compare_by_layer(systems) in text
    scores = {name: compute_metrics(counts) for name, counts in systems.items()}
    cells = [write_number(values["macro_f1"], 3) for values in scores.values()]
    assert f"| macro-F1 | {' | '.join(cells)} |" in text.split("*On 12 held-out targets")[1]
    del scores["routers"]
    axes_by_metric = section.blocks[0].draw(LIGHT, 4.2).axes
    for axes, metric in zip(axes_by_metric, ("macro_f1", "accuracy"), strict=False):
        best = max(values[metric] for values in scores.values())
        assert axes.lines[-1].get_ydata()[0] == best


@pytest.mark.parametrize("validation", [True, False])
def test_a_single_epoch_is_drawn_and_missing_validation_is_said(folder, validation):
    folder.routers(epochs=1, validation=validation)
    section = router_section(read_run(folder.path))
    assert draw_svg(section.blocks[0].draw, "metrics").startswith("<svg viewBox=")
    text = section_text([section])
    sentence = "No targets were held out, so there are no validation metrics."
    assert (sentence in text) == (not validation)
    assert ("*On 40 targets trained on" in text) == (not validation)
