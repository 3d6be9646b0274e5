"""The sections on search, targets and routers show the stages' own counts."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from drllm.metrics import by_layer, hit_ratios, ratios
from drllm.paths import Decision
from drllm.records import TriedPath
from drllm.reporting.blocks import Columns, Figure, Table, Text
from drllm.reporting.drawing import LIGHT, svg
from drllm.reporting.learned import sections
from drllm.reporting.numbers import NBSP
from drllm.reporting.run import read_run
from drllm.supervision.summary import edit_effects


def flat(blocks):
    for block in blocks:
        if isinstance(block, Columns):
            for group in block.groups:
                yield from flat(group)
        else:
            yield block


@pytest.fixture(scope="module")
def learned(run):
    return sections(run)


def part(found, title):
    (section,) = [section for section in found if section.title == title]
    return list(flat(section.blocks))


def table(blocks, start):
    (found,) = [b for b in blocks if isinstance(b, Table) and b.caption.startswith(start)]
    return {row[0]: [cell.replace(NBSP, " ") for cell in row[1:]] for row in found.rows}


def test_a_copy_of_a_question_is_told_and_counts_once(run):
    copy = replace(run.search[0], task="another", id="copy")
    copied = sections(dataclasses.replace(run, search=[*run.search, copy], sources=[]))
    (text, *_) = part(copied, "What the search found")
    assert text.text.startswith("40 questions and 1 copies of them were searched, ")
    right = sum(record.full.reward >= 1 for record in run.search)
    assert f"The full path answers {right} (" in text.text
    assert table(part(copied, "What the search found"), "Of 40 questions")


def test_the_worst_single_skip_is_a_layer_that_matters(learned):
    rows = table(part(learned, "What the search found"), "Skipping one layer")
    assert list(rows)[-1] in {"0", "1", "11"}
    assert next(iter(rows)) not in {"0", "1", "11"}


def figure_of(blocks, name):
    (found,) = [block for block in blocks if isinstance(block, Figure) and block.name == name]
    return found


def test_every_layer_is_in_the_picture(run, learned):
    systems = run.layers.parts["validation"]
    figure = figure_of(part(learned, "Router metrics"), "router layers")
    assert by_layer(systems) in figure.alt
    labels, hits, skips = figure.draw(LIGHT).axes
    assert len(labels.patches) == 2 * run.num_layers
    for axes, key, scale in ((hits, "accuracy", 100), (skips, "f1_skip", 1)):
        (dots,) = axes.lines
        known = [hit_ratios(confusion)[key] for confusion in systems["routers"].confusion]
        assert list(dots.get_ydata()) == [scale * value for value in known if value is not None]


def test_the_curves_show_the_best_baseline_of_each_metric(run, learned):
    systems = run.layers.parts["validation"]
    scores = {name: ratios(counts) for name, counts in systems.items() if name != "routers"}
    panels = figure_of(part(learned, "Router metrics"), "router metrics").draw(LIGHT).axes
    assert [axes.get_ylabel() for axes in panels[:2]] == ["macro-F1", "labels hit"]
    for axes, key in zip(panels, ("macro_f1", "accuracy"), strict=False):
        dashed = axes.lines[-1]
        best = max(scores, key=lambda name: scores[name][key])
        assert dashed.get_ydata()[0] == scores[best][key]
        assert dashed.get_label() == best.replace("_", " ")


def said_of_reliability(blocks):
    (said,) = [b.text for b in blocks if isinstance(b, Text) and "calibration error" in b.text]
    return said.replace(NBSP, " ")


def test_it_is_drawn_how_far_probabilities_can_be_believed(run, learned):
    blocks = part(learned, "Router metrics")
    (axes,) = figure_of(blocks, "router reliability").draw(LIGHT).axes
    _, before, after = axes.lines
    measured = (run.calibration.reliability_before, run.calibration.reliability_after)
    for line, points in zip((before, after), measured, strict=True):
        drawn = [*zip(line.get_xdata(), line.get_ydata(), strict=True)]
        assert drawn == [(each.confidence, each.hits) for each in points]
        assert len(points) == 15
    assert after.get_label() == "temperature 1.25"


def test_routers_that_have_their_temperature_in_the_weights_say_so(run):
    config = {"training": {"settings": {"calibrate": True}}}
    cold = replace(run.calibration, temperature=0.8)
    found = sections(dataclasses.replace(run, calibration=cold, router_config=config))
    said = said_of_reliability(part(found, "Router metrics"))
    assert "are not sure enough" in said
    assert said.endswith("decisions and is in the weights.")


def test_without_held_out_targets_the_missing_validation_is_said(folder):
    folder.routers(validation=False)
    blocks = part(sections(read_run(folder.path)), "Router metrics")
    texts = [block.text for block in blocks if isinstance(block, Text)]
    assert "No targets were held out, so there are no validation metrics." in texts
    (found,) = [b for b in blocks if isinstance(b, Table) and not b.folded]
    assert found.caption.startswith("On 40 targets trained on")
    assert texts[0].startswith("No targets were held out, so nothing says whether")
    assert not any("calibration error" in text for text in texts)


def test_a_single_epoch_can_be_drawn(folder):
    folder.routers(epochs=1)
    blocks = part(sections(read_run(folder.path)), "Router metrics")
    drawn = figure_of(blocks, "router metrics").draw
    assert svg(drawn, "metrics").startswith("<svg viewBox=")


def searched(run, *paths):
    return replace(
        run.search[0],
        num_layers=3,
        paths=tuple(
            TriedPath(
                decisions=decisions,
                simulation=0,
                reward=reward,
                margin=margin,
                executions=float(sum(decisions)),
            )
            for decisions, reward, margin in paths
        ),
    )


def test_effects_count_only_paths_with_that_single_edit(run):
    two, other = ((0, 0, 1), 0.0, -9.0), ((2, 1, 1), 1.0, 0.75)
    records = [
        searched(run, ((1, 1, 1), 1.0, 0.5), ((0, 1, 1), 0.0, -0.5), two, other),
        searched(run, ((1, 1, 1), 0.0, -0.25), ((0, 1, 1), 1.0, 0.25)),
    ]
    (skip,) = edit_effects(records, Decision.SKIP)
    assert (skip.layer, skip.questions, skip.reward, skip.margin) == (0, 2, 0.0, -0.25)
    (repeat,) = edit_effects(records, Decision.REPEAT)
    assert (repeat.layer, repeat.questions, repeat.reward, repeat.margin) == (0, 1, 0.0, 0.25)


def test_an_effect_without_margins_has_none(run):
    records = [searched(run, ((1, 1, 1), 1.0, None), ((1, 0, 1), 0.0, None))]
    (effect,) = edit_effects(records, Decision.SKIP)
    assert (effect.reward, effect.margin) == (-1.0, None)
