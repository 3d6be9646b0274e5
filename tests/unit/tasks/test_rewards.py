"""Grades, verdicts on unfinished answers, and the scoring of options."""

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drllm.tasks.examples import Prompt
from drllm.tasks.rewards import first_boxed, grade, normalise, score_choices, verdict

PROMPTS = {
    "letter": Prompt(text="?", reward="letter", answer="B", letters="ABCD"),
    "boxed": Prompt(text="?", reward="boxed", answer="12"),
    "exact": Prompt(text="?", reward="exact", answer="New York"),
    "several": Prompt(text="?", reward="exact", answer="York", other_answers=("New York", "New")),
}
# Pieces that answers are made of, so that random texts come near every rule's borders.
PIECES = st.lists(
    st.one_of(
        st.sampled_from(list('AbBE3é. \n_(-{}\\"\r\t\ufffdßx!')),
        st.sampled_from(["12", "**", "\\boxed", "\\{", "\\}", "\\boxed{12}", "\\boxed {1"]),
        st.sampled_from(["New", "new york", "York"]),
    ),
    max_size=8,
).map("".join)


RIGHT = {
    "letter": [
        *("B", "The answer is (B).", "**B**", "_B_", "B, not A"),
        "Because B is right",  # a letter inside a word doesn't stand alone
        "E or B",  # E is no option here
    ],
    "boxed": [
        *("\\boxed{12}", "so \\boxed {12.0} it is", "\\boxed{12} or \\boxed{13}"),
        *("\\boxed{\\frac{24}{2}}", "\\boxed{x = 12}"),
    ],
    "exact": ["New York", "\n  new   york.\nIt is a city", "**New York**", '"New York"!'],
    "several": ["york.", "New York", "new"],
}
WRONG = {
    "letter": ["A, not B", "b", "B2", "", "none"],
    "boxed": [
        *("\\boxed{13} or \\boxed{12}", "\\boxed{12", "12", "\\boxed{}"),
        "\\\\boxed{12}",  # a line break, then the word "boxed"
    ],
    "exact": ["New York City", "York", "", "It is\nNew York"],
    "several": ["New New York", "Yorkshire"],
}


@pytest.mark.parametrize("reward", sorted(PROMPTS))
def test_what_comes_first_decides_apart_from_marks_and_notation(reward):
    for text in RIGHT[reward]:
        assert grade(PROMPTS[reward], text) == 1.0, text
    for text in WRONG[reward]:
        assert grade(PROMPTS[reward], text) == 0.0, text


def test_a_box_ends_where_its_own_brace_closes():
    assert first_boxed(r"{a} \boxed{\{1, {2}\}} \boxed{3}") == r"\{1, {2}\}"
    assert first_boxed(r"\boxed{ \boxed{5} and") == "5"
    assert first_boxed(r"} \boxed{7}") == "7"
    assert first_boxed(r"\boxed{\}") is None


def test_a_minus_sign_and_a_decimal_point_are_part_of_an_exact_answer():
    assert grade(Prompt(text="?", reward="exact", answer="-5"), "5") == 0.0
    assert grade(Prompt(text="?", reward="exact", answer=".5"), "5") == 0.0


@given(PIECES)
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("reward", sorted(PROMPTS))
@given(begun=PIECES, more=PIECES)
@settings(max_examples=400, deadline=None)
@example(begun="B", more="ecause")
@example(begun="B\ufffd", more="A")
@example(begun="\\boxed{1", more="2}")
@example(begun="new york", more=" city")
@example(begun="new york.", more=" Really")
def test_no_continuation_changes_a_verdict(reward, begun, more):
    prompt = PROMPTS[reward]
    decided = verdict(prompt, begun, finished=False)
    # The replacement characters of an unfinished character give way to what it turns out to be.
    stable = begun.rstrip("\ufffd")
    if decided is not None:
        assert grade(prompt, stable + more) == decided
        assert grade(prompt, stable) == decided


@pytest.mark.parametrize("reward", sorted(PROMPTS))
@given(text=PIECES)
@settings(max_examples=300, deadline=None)
def test_an_open_verdict_has_continuations_either_way(reward, text):
    """The verdict comes as early as it can: while it is open, both grades can still happen."""
    prompt = PROMPTS[reward]
    if verdict(prompt, text, finished=False) is not None:
        return
    stable = text.rstrip("\ufffd")
    right = {
        "letter": ["", " B ", "x B "],
        # Open boxes, with one digit in them or a half-written command, can all be closed.
        "boxed": [tail + " \\boxed{12} " for tail in ("", "x", "{")],
        "exact": ["New York"[start:] for start in range(9)] + [" York", " new york", '"', "\n"],
    }
    right["several"] = right["exact"]
    wrong = {"letter": " A ", "boxed": " \\boxed{13} "}.get(reward, "qq")
    assert any(grade(prompt, stable + more) == 1.0 for more in right[reward])
    assert any(grade(prompt, stable + more) == 0.0 for more in (wrong, "x" + wrong))


def test_an_answer_is_decided_long_before_it_ends():
    assert verdict(PROMPTS["letter"], "B", finished=False) is None
    assert verdict(PROMPTS["letter"], "B.", finished=False) == 1.0
    assert verdict(PROMPTS["boxed"], "\\boxed{12}", finished=False) == 1.0
    assert verdict(PROMPTS["exact"], "London", finished=False) == 0.0
    assert verdict(PROMPTS["exact"], "New York\n", finished=False) == 1.0
    assert verdict(PROMPTS["several"], "New", finished=False) is None
    assert verdict(PROMPTS["several"], "New J", finished=False) == 0.0


def options(*texts: str, gold, normalised=False):
    return Prompt(
        text="?",
        reward="loglikelihood",
        answer=texts[gold],
        continuations=tuple(f" {text}" for text in texts),
        gold=gold,
        normalised=normalised,
    )


def test_the_margin_is_the_gold_score_minus_the_best_other():
    assert score_choices([-4.0, -1.5, -2.0], options("a", "b", "c", gold=1)) == (1.0, 0.5)
    assert score_choices([-4.0, -1.5, -2.0], options("a", "b", "c", gold=0)) == (0.0, -2.5)
    assert score_choices([-1.0, -1.0], options("a", "b", gold=0)) == (1.0, 0.0)
    assert score_choices([-1.0, -1.0], options("a", "b", gold=1)) == (0.0, 0.0)


@given(
    st.lists(
        st.tuples(st.text("abcß ", min_size=1, max_size=9), st.floats(-50, -0.01)),
        min_size=2,
        max_size=5,
    ),
    st.data(),
)
def test_normalised_scores_pick_what_acc_norm_of_the_harness_picks(choices, data):
    gold = data.draw(st.integers(0, len(choices) - 1))
    prompt = options(*(text for text, _ in choices), gold=gold, normalised=True)
    logprobs = [value for _, value in choices]
    # lm_eval.api.task.ConfigurableTask.process_results, for multiple_choice
    lengths = numpy.array([float(len(text)) for text, _ in choices])
    assert score_choices(logprobs, prompt)[0] == float(
        numpy.argmax(numpy.array(logprobs) / lengths) == gold
    )


def test_an_answer_to_a_prompt_whose_options_are_scored_is_not_graded():
    with pytest.raises(ValueError, match="loglikelihood"):
        grade(options("a", "b", gold=0), "a")
