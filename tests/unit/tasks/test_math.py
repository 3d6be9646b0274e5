"""`builtin_arithmetic`: right answers, five levels, disjoint splits."""

from __future__ import annotations

import re
import subprocess
import sys
from fractions import Fraction

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.base import get_task
from drllm.tasks.grading import grade
from drllm.tasks.math import BUILTIN_ARITHMETIC, rows

ALL = [row for split in SPLITS for row in rows(split)]


def solve(query: str) -> Fraction | None:
    """Work a problem out from its text, on another way than the one that made it."""
    numbers = [Fraction(number) for number in re.findall(r"\d+", query)]
    if match := re.fullmatch(r"(?:What is|Compute) ([-+*/() \d]+)[?.]", query):
        return Fraction(eval(match.group(1)))  # digits and operators only
    if match := re.search(r"(\d+)x \+ (\d+) (?:=|equal to) (?:(\d+)x \+ )?(\d+)", query):
        more, constant, fewer, total = (Fraction(group or 0) for group in match.groups())
        return (total - constant) / (more - fewer)
    patterns = {
        r"^Add|marbles": lambda a, b: a + b,
        r"^Subtract \d+ from \d+\.": lambda a, b: b - a,
        r"stickers": lambda a, b: a - b,
        r"times|bags": lambda a, b: a * b,
        r"divided by \d+\?$|dealt": lambda a, *b: a / b[-1],
        r"packs|^Multiply": lambda a, b, c: a * b + c,
        r"^Subtract .* multiply": lambda a, b, c: (b - a) * c,
        r"% of": lambda a, b: a * b / 100,
        r"mean|average": lambda a, b, c: (a + b + c) / 3,
        r"^A number": lambda a, b, c: (c - b) / a,
        r"ticket": lambda price, share, count: price * (1 - share / 100) * count,
        r"to \d+x": lambda a, b, c, d: (d - b) / (a - c),
    }
    if match := re.search(r"(\d+)\^(\d+) is divided by (\d+)", query):
        base, exponent, divisor = map(int, match.groups())
        return Fraction(base**exponent % divisor)
    for pattern, rule in patterns.items():
        if re.search(pattern, query):
            return Fraction(rule(*numbers))
    return None


def test_every_answer_is_right() -> None:
    wrong = [row for row in ALL if solve(row["query"]) != int(row["gt_ans"])]
    assert not wrong


def test_there_are_enough_problems_of_every_level_in_every_split() -> None:
    assert len(ALL) >= 300
    for split in SPLITS:
        assert {row["level"] for row in rows(split)} == {1, 2, 3, 4, 5}
    assert len(rows("test")) >= 60
    assert len(rows("search")) >= 150


def test_no_problem_is_in_two_splits_in_the_same_or_other_words() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for split in SPLITS:
        for row in rows(split):
            # Words that only one wording uses are left out: what is asked, of which numbers.
            kind = str(row["level"]), row["gt_ans"], *sorted(re.findall(r"\d+", row["query"]))
            assert seen.setdefault(kind, split) == split, row["query"]
    assert len({row["query"] for row in ALL}) == len(ALL)


def test_an_example_has_query_and_answer_of_its_row() -> None:
    examples = BUILTIN_ARITHMETIC.examples("test")
    assert [(e.question, e.answer) for e in examples] == [
        (row["query"], row["gt_ans"]) for row in rows("test")
    ]
    assert len({e.id for split in SPLITS for e in BUILTIN_ARITHMETIC.examples(split)}) == len(ALL)


def test_problems_are_asked_for_a_boxed_answer_in_three_ways() -> None:
    asked = BUILTIN_ARITHMETIC.examples("test")[0]
    prompts = [
        BUILTIN_ARITHMETIC.prompt(asked, "boxed"),
        *BUILTIN_ARITHMETIC.retests(asked, "boxed"),
    ]
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert asked.question in prompt.text
        assert "\\boxed{" in prompt.text
        assert prompt.chat
        assert grade(prompt, f"\\boxed{{{asked.answer}}}") == 1.0
        assert grade(prompt, asked.answer) == 0.0


def test_every_process_makes_the_same_problems() -> None:
    code = "from drllm.tasks.math import rows; print(rows('test'))"
    made = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert made.strip() == str(rows("test"))


def test_what_does_not_fit_is_refused() -> None:
    assert get_task("builtin_arithmetic") is BUILTIN_ARITHMETIC
    asked = BUILTIN_ARITHMETIC.examples("test")[0]
    for ask in (BUILTIN_ARITHMETIC.prompt, BUILTIN_ARITHMETIC.retests):
        with pytest.raises(TaskError, match="it takes boxed"):
            ask(asked, "letter")
    with pytest.raises(TaskError, match="unknown split"):
        BUILTIN_ARITHMETIC.examples("train")
