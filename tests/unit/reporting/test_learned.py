"""The sections on search, targets and routers show the stages' own counts."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from drllm.metrics import by_layer, ratios
from drllm.paths import Decision
from drllm.records import TriedPath
from drllm.reporting.blocks import Figure, Table, Text
from drllm.reporting.drawing import LIGHT, svg
from drllm.reporting.learned import sections
from drllm.reporting.numbers import NBSP, plain
from drllm.reporting.run import read_run
from drllm.supervision.summary import edit_effects


def part(found, title):
    (section,) = [section for section in found if section.title == title]
    return list(section.blocks)


def said(blocks):
    return " ".join(b.text for b in blocks if isinstance(b, Text)).replace(NBSP, " ")


def table(blocks, start):
    (found,) = [b for b in blocks if isinstance(b, Table) and b.caption.startswith(start)]
    return {row[0]: [cell.replace(NBSP, " ") for cell in row[1:]] for row in found.rows}


@pytest.fixture(scope="module")
def learned(run):
    return sections(run)


def test_a_copy_of_a_question_is_told_and_counts_once(run):
    copy = replace(run.search[0], task="another", id="copy")
    copied = sections(dataclasses.replace(run, search=[*run.search, copy], sources=[]))
    blocks = part(copied, "Search and targets")
    assert said(blocks).startswith("40 questions and 1 copies of them were searched, ")
    right = sum(record.full.reward >= 1 for record in run.search)
    assert f"The full path answers {right} (" in said(blocks)
    assert table(blocks, "Of 40 questions")


def test_the_worst_single_skip_is_named(run, learned):
    worst = min(edit_effects(run.search, Decision.SKIP), key=lambda e: (e.reward, -e.layer))
    assert f", worst {worst.layer} (−" in said(part(learned, "Search and targets"))


def test_routers_stand_beside_decisions_that_ignore_the_question(run, learned):
    systems = run.layers.parts["validation"]
    blocks = part(learned, "Router metrics")
    assert by_layer(systems) in said(blocks)
    rows = table(blocks, "On 12 held-out targets")
    expected = [plain(ratios(counts)["macro_f1"], 3) for counts in systems.values()]
    assert rows["macro-F1"] == expected
    (drawn,) = [block for block in blocks if isinstance(block, Figure)]
    for axes, key in zip(drawn.draw(LIGHT, 4.2).axes, ("macro_f1", "accuracy"), strict=False):
        scores = {name: ratios(each)[key] for name, each in systems.items() if name != "routers"}
        assert axes.lines[-1].get_ydata()[0] == max(scores.values())


def test_routers_that_have_their_temperature_in_the_weights_say_so(run):
    config = {"training": {"settings": {"calibrate": True}}}
    cold = replace(run.calibration, temperature=0.8)
    found = sections(dataclasses.replace(run, calibration=cold, router_config=config))
    text = said(part(found, "Router metrics"))
    assert "are not sure enough" in text
    assert text.endswith("same decisions and is in the weights.")


def test_without_held_out_targets_the_missing_validation_is_said(folder):
    folder.routers(validation=False)
    blocks = part(sections(read_run(folder.path)), "Router metrics")
    assert "No targets were held out, so there are no validation metrics." in said(blocks)
    assert "calibration error" not in said(blocks)
    assert table(blocks, "On 40 targets trained on")


def test_a_single_epoch_can_be_drawn(folder):
    folder.routers(epochs=1)
    blocks = part(sections(read_run(folder.path)), "Router metrics")
    (drawn,) = [block for block in blocks if isinstance(block, Figure)]
    assert svg(drawn.draw, "metrics").startswith("<svg viewBox=")


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
