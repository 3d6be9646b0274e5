"""Grading in task folders: our three rules through a row, and SQuAD's two metrics."""

import json

import pytest

from drllm.evaluation.lm_eval.graders import graded, shown, squad, squad_shown, write_grading
from drllm.tasks.examples import Prompt


def row(*answers: str):
    return {"grading": json.dumps(answers)}


@pytest.mark.parametrize(
    ("prompt", "right", "wrong", "example"),
    [
        (Prompt(text="?", reward="boxed", answer="1/2"), r"\boxed{0.5}", "1/2", r"\boxed{1/2}"),
        (Prompt(text="?", reward="letter", answer="G", letters="ABCDEFG"), "G.", "F or G", "G"),
        (
            Prompt(text="?", reward="exact", answer="ice", other_answers=("cold water",)),
            "Cold water.\nSurely",
            "ice water",
            "ice",
        ),
    ],
    ids=lambda value: value.reward if isinstance(value, Prompt) else "",
)
def test_a_row_carries_all_that_grading_needs(prompt, right, wrong, example):
    doc = {"grading": write_grading(prompt)}
    assert graded(doc, [right]) == {"exact_match": 1.0}
    assert graded(doc, [wrong]) == {"exact_match": 0.0}
    assert graded(doc, [""]) == {"exact_match": 0.0}
    assert shown(doc) == example
    assert graded(doc, [shown(doc)]) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("answers", "text", "exact", "f1"),
    [
        (("the Green River", "a river"), " Green River!", 1.0, 1.0),
        (("the Green River", "a river"), "river", 1.0, 1.0),
        (("the Green River",), "by a green river", 0.0, 0.8),
        (("the Green River",), "the lake", 0.0, 0.0),
        (("1990's",), "1990s", 1.0, 1.0),
        (("river river",), "river", 0.0, 2 / 3),
        (("the Green River",), "", 0.0, 0.0),
        (("the Green River",), "unanswerable", 0.0, 0.0),
        ((), " Unanswerable.", 1.0, 1.0),
        ((), "", 1.0, 1.0),
        ((), "a lake", 0.0, 0.0),
        ((), "it is unanswerable", 0.0, 0.0),
        (("the", "river"), "", 0.0, 0.0),
    ],
)
def test_squads_metrics_ignore_articles_marks_and_case(answers, text, exact, f1):
    assert squad(row(*answers), [text]) == {"exact": exact, "f1": pytest.approx(f1)}


def test_squads_metrics_are_those_of_transformers_where_it_has_them():
    theirs = pytest.importorskip("transformers.data.metrics.squad_metrics")
    golds = ("the Green River", "A river, by-and-by", "  an 'x' ", "U.S.")
    texts = ("", "green river", "by a river", "river by and by", "US", "x x", "the")
    for gold in golds:
        for text in texts:
            assert squad(row(gold), [text]) == {
                "exact": float(theirs.compute_exact(gold, text)),
                "f1": pytest.approx(float(theirs.compute_f1(gold, text))),
            }


def test_the_answer_shown_to_a_squad_question_is_the_first_or_the_word_for_none():
    assert squad_shown(row("by the river", "a river")) == "by the river"
    assert squad_shown(row()) == "unanswerable"
