"""The sections on search, targets and routers show the stages' own counts."""

from __future__ import annotations

import dataclasses

import pytest

from drllm.reporting.blocks import Columns, Figure, Table, Text
from drllm.reporting.drawing import svg
from drllm.reporting.learned import sections
from drllm.reporting.numbers import NBSP
from drllm.reporting.run import read_run


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


def test_the_yield_is_that_of_the_manifest_before_and_after_the_retest(run, learned):
    rows = table(part(learned, "What the search found"), "Of 40 questions")
    for name, key in (("valid", "valid"), ("saving", "saving"), ("improving", "improving")):
        (cells,) = [cells for row, cells in rows.items() if row.startswith(name)]
        before = run.summary[f"{key}_before_retest"]
        after = run.summary[f"{key}_after_retest"]
        assert cells == [
            f"{before} ({100 * before / 40:.1f} %)",
            f"{after} ({100 * after / 40:.1f} %)",
        ]
        assert 40 > before >= after > 0  # the fixture has something to show


def test_a_copy_of_a_question_is_told_and_counts_once(run):
    copy = dataclasses.replace(run.search[0], task="another", id="copy")
    copied = dataclasses.replace(run, search=(*run.search, copy), summary={})
    (text, *_) = part(sections(copied), "What the search found")

    assert text.text.startswith("40 questions and 1 copies of them were searched, ")
    right = sum(record.full.reward >= 1 for record in run.search)
    assert f"The full path answers {right} (" in text.text
    assert table(part(sections(copied), "What the search found"), "Of 40 questions")


def test_every_reason_for_a_missing_target_is_listed(run, learned):
    rows = table(part(learned, "What the search found"), "Questions without a target")
    assert list(rows) == list(run.summary["rejected"])
    counts = [int(cells[0].split()[0]) for cells in rows.values()]
    assert counts == list(run.summary["rejected"].values())
    assert sum(counts) + len(run.supervision) == 40


def test_the_worst_single_skip_is_a_layer_that_matters(learned):
    rows = table(part(learned, "What the search found"), "Skipping one layer")
    assert list(rows)[-1] in {"0", "1", "11"}
    assert next(iter(rows)) not in {"0", "1", "11"}


def test_label_counts_are_those_of_the_targets(run, learned):
    rows = table(part(learned, "Targets"), "Labels")
    counts = [int(cells[0].split()[0]) for cells in rows.values()]
    assert counts == run.summary["class_counts"]


def test_routers_stand_beside_decisions_that_ignore_the_question(run, learned):
    blocks = part(learned, "Router metrics")
    (found,) = [b for b in blocks if isinstance(b, Table) and not b.folded]
    assert list(found.header) == [
        "metric",
        "routers, train",
        "routers, validation",
        "always execute",
        "most frequent label a layer",
    ]
    rows = table(blocks, "Routers after epoch 25")
    executed = run.summary["class_counts"][1] / sum(run.summary["class_counts"])
    assert rows["F1 execute"][2] == f"{2 * executed / (1 + executed):.3f}"
    assert rows["F1 skip"][2] == "0.000"
    share = f"{100 * executed:.1f}{NBSP}% of the labels"
    assert any(isinstance(block, Text) and share in block.text for block in blocks)


def test_without_held_out_targets_the_missing_validation_is_said(make_folder):
    folder = make_folder()
    folder.everything()
    folder.routers(validation=False)
    blocks = part(sections(read_run(folder.path)), "Router metrics")
    texts = [block.text for block in blocks if isinstance(block, Text)]
    assert "No targets were held out, so there are no validation metrics." in texts
    (found,) = [b for b in blocks if isinstance(b, Table) and not b.folded]
    assert "routers, validation" not in found.header


def test_a_single_epoch_can_be_drawn(make_folder):
    folder = make_folder()
    folder.everything()
    folder.routers(epochs=1)
    blocks = part(sections(read_run(folder.path)), "Router metrics")
    (figure,) = [block for block in blocks if isinstance(block, Figure)]
    assert svg(figure.draw, "metrics").startswith("<svg viewBox=")
