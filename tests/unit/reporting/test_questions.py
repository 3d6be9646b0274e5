"""Questions that change, with both models' answers, and the routes taken on them."""

import re

import pytest
from msgspec.structs import replace

from drllm.records.results import Sample, SampleOutcome
from drllm.reporting.changed_questions import ROWS
from drllm.reporting.drawing import LIGHT
from drllm.reporting.evaluation_sections import build_sections
from run_folder import section_text, table_rows

ROUTE = (1, 0, 2, *[1] * 9)
OPTIONS = ("it bends", "it sinks", "it rings", "it glows")


def answer(number, scores, question="case", **answers):
    """Return question `number` with a score of base and of routed; answers are by system."""
    text = f"{question} {number}"
    outcomes = {}
    for name, score in zip(("base", "routed"), scores, strict=True):
        chosen = answers.get(name)
        outcomes[name] = SampleOutcome(
            correct=score, gold_logprob=None, decisions=ROUTE, answer=chosen
        )
    about = {"id": text, "task": "arc_easy", "question": text}
    return Sample(**about, choices=OPTIONS, gold=number % 4, systems=outcomes)


@pytest.fixture
def changed(run):
    """A function that returns the section on 20 questions, right for both but for some."""
    [evaluation] = run.evaluations

    def render(scores, graded=False, **texts):
        samples = [answer(n, scores.get(n, (1, 1)), **texts) for n in range(20)]
        result = replace(evaluation, samples=tuple(samples))
        if graded:
            against = result.routed.against_base
            grades = replace(against, accuracy=replace(against.accuracy, won=None))
            result = replace(
                result, systems=(result.base, replace(result.routed, against_base=grades))
            )
        return section_text(build_sections(run, result), "Questions won and lost")

    return render


def test_won_and_lost_questions_stand_with_both_answers(changed):
    text = changed({3: (0, 1), 5: (1, 0), 7: (1, 0), 8: (0, 0)}, base=1, routed=3)
    counts = "Of 20 questions 1 are won (better with routing) and 2 lost"
    assert f"{counts}; 16 stay right, 1 stay wrong." in text
    assert [row[:3] for row in table_rows(text, "question")[1:]] == [
        ["case 3", "won", "it glows"],
        ["case 5", "lost", "it sinks"],
        ["case 7", "lost", "it glows"],
    ]
    assert "base it sinks; routed it glows" in text


def test_the_first_of_many_are_shown_and_the_others_counted(changed):
    text = changed(dict.fromkeys(range(ROWS + 2), (0, 1)))
    assert len(re.findall(r"case \d+", text)) == ROWS
    assert "The others (2) are in eval/samples.jsonl." in text
    assert "base wrong; routed right" in text  # where the answers aren't known


def test_no_change_has_no_table(changed):
    text = changed({})
    assert "20 stay right, 0 stay wrong" in text
    assert "|" not in text


def test_grades_that_change_are_compared_as_grades(changed):
    text = changed({3: (0.2, 0.9), 4: (0.9, 0.2)}, graded=True, base="so", routed="or so")
    assert "1 are won (better with routing) and 1 lost; 18 keep their grade." in text
    assert "| so (graded 0.20) | or so (graded 0.90) |" in text


def test_long_questions_are_cut_between_words(changed):
    _, [cell, *_] = table_rows(changed({3: (0, 1)}, question="several words " * 20), "question")
    assert re.fullmatch(r"several words several .* words …|several words .* several …", cell)
    assert len(cell) <= 120


def test_routes_are_drawn_by_layer_with_what_the_routers_were_trained_for(run):
    [evaluation] = run.evaluations
    result = replace(evaluation, samples=tuple(answer(n, (1, 1)) for n in range(20)))
    sections = {section.title: section for section in build_sections(run, result)}
    [axes] = sections["Routes by layer"].blocks[0].draw(LIGHT, 4.2).axes
    heights = [bar.get_height() for bar in axes.patches]
    for place, decision in enumerate((0, 1, 2)):  # skipped, executed, repeated
        drawn = heights[12 * place : 12 * (place + 1)]
        assert drawn == [100 * (choice == decision) for choice in ROUTE]
    assert len(heights) == 36
    assert len(axes.collections[0].get_segments()) == 12
