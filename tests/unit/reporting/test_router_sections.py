"""The sections on search, targets and routers show the stages' own counts."""

import dataclasses

import pytest
from msgspec.structs import replace

from drllm.agreement import compare_by_layer, compute_metrics
from drllm.paths import Decision
from drllm.reporting.blocks import Document
from drllm.reporting.drawing import LIGHT, draw_svg
from drllm.reporting.numbers import NBSP, plain
from drllm.reporting.router_sections import MIN_QUESTIONS
from drllm.reporting.run import read_run
from drllm.reporting.sections import learning_sections
from drllm.reporting.stage import to_markdown
from drllm.supervision.summary import edit_effects


def text(found, title):
    """Return what a section says, as Markdown."""
    whole = to_markdown(Document("", "", [], found), "figures").replace(NBSP, " ")
    return whole.split(f"## {title}\n")[1].split("\n## ")[0]


def curves(found):
    (section,) = [section for section in found if section.title == "Router metrics"]
    return section.blocks[0].draw


@pytest.fixture(scope="module")
def found(run):
    return learning_sections(run)


def test_a_copy_of_a_question_is_told_and_counts_once(run):
    copy = replace(run.search[0], task="another", id="copy")
    copied = learning_sections(dataclasses.replace(run, search=[*run.search, copy], sources=[]))
    said = text(copied, "Search and targets")
    assert said.strip().startswith("40 questions and 1 copies of them were searched, ")
    right = sum(record.full.reward >= 1 for record in run.search)
    assert f"The full path answers {right} (" in said
    assert "*Of 40 questions, how many have such a path." in said


def test_the_worst_single_skip_is_named(run, found):
    worst, change = edit_effects(run.search, Decision.SKIP, MIN_QUESTIONS)[-1]
    assert change < 0
    assert f", worst {worst} (−" in text(found, "Search and targets")


def test_routers_stand_beside_decisions_that_ignore_the_question(run, found):
    systems = run.layers.parts["validation"]
    said = text(found, "Router metrics")
    assert compare_by_layer(systems) in said
    cells = [plain(compute_metrics(counts)["macro_f1"], 3) for counts in systems.values()]
    assert f"| macro-F1 | {' | '.join(cells)} |" in said.split("*On 12 held-out targets")[1]
    for axes, key in zip(curves(found)(LIGHT, 4.2).axes, ("macro_f1", "accuracy"), strict=False):
        scores = {
            name: compute_metrics(each)[key] for name, each in systems.items() if name != "routers"
        }
        assert axes.lines[-1].get_ydata()[0] == max(scores.values())


def test_without_held_out_targets_the_missing_validation_is_said(folder):
    folder.routers(validation=False)
    said = text(learning_sections(read_run(folder.path)), "Router metrics")
    assert "No targets were held out, so there are no validation metrics." in said
    assert "*On 40 targets trained on" in said


def test_a_single_epoch_can_be_drawn(folder):
    folder.routers(epochs=1)
    drawn = curves(learning_sections(read_run(folder.path)))
    assert draw_svg(drawn, "metrics").startswith("<svg viewBox=")
