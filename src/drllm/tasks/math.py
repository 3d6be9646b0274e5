r"""Questions whose answer is a number in `\boxed{}`; `builtin_arithmetic` needs no data.

Owns the way such questions are asked and the seeded making of problems in five levels, from one
step to percentages and linear equations. Leaves grading to `grading`. Loads no torch.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.records import split_of
from drllm.tasks.base import Example, Prompt, Task, check_split

TEMPLATE = "{question}\n\nGive the final answer only, as \\boxed{{answer}}, with no explanation."
OTHER_TEMPLATES = (
    "Solve this problem and write nothing but the result in \\boxed{{}}.\n\nProblem: {question}",
    "Question: {question}\nReply with the final answer in the form \\boxed{{answer}} and no other "
    "words.",
)
ANSWER_TOKENS = 15
"""Most tokens of an answer; no room for a chain of thought (Dr.LLM section 4)."""

PROBLEMS_PER_KIND = 32
SEED = 0


class BoxedTask(Task):
    r"""A task whose answers are generated in `\boxed{}`; a subclass brings the questions."""

    rewards = ("boxed",)

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return how the question is asked: the answer alone, in a box.

        Raises:
            TaskError: Another reward than `boxed`.
        """
        self.check_reward(reward)
        return boxed_prompt(example, TEMPLATE)

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the question in two other templates.

        Raises:
            TaskError: Another reward than `boxed`.

        Source: ours (docs/differences.md, D-05).
        """
        self.check_reward(reward)
        return tuple(boxed_prompt(example, template) for template in OTHER_TEMPLATES)


def boxed_prompt(example: Example, template: str) -> Prompt:
    r"""Return a chat prompt that asks for the answer in `\boxed{}`."""
    return Prompt(
        text=template.format(question=example.question),
        reward="boxed",
        answer=example.answer,
        chat=True,
        max_new_tokens=ANSWER_TOKENS,
    )


class BuiltinArithmetic(BoxedTask):
    """Short problems in five levels, the same on every machine."""

    name = "builtin_arithmetic"
    description = "arithmetic in five levels, answers in a box, made by rule (needs no data)"

    def examples(self, split: str, data_dir: Path | None = None) -> list[Example]:
        """Return the problems of one split, in a fixed order that mixes the levels.

        Args:
            split: `search`, `fit`, `select` or `test`.
            data_dir: Not needed, and not looked at.

        Raises:
            TaskError: An unknown split.
        """
        check_split(split)
        return [
            Example(
                id=f"arithmetic-{number}",
                task=self.name,
                question=row["query"],
                answer=row["gt_ans"],
            )
            for number, row, its_split in _problems()
            if its_split == split
        ]


def rows(split: str) -> list[dict[str, Any]]:
    """Return the problems of one split in the schema of DART-Math.

    Returns:
        Objects with `query`, `gt_ans` (text) and `level` (1 to 5).

    Source: the schema is that of DART-Math (arXiv 2407.13690); the problems are ours.
    """
    check_split(split)
    return [dict(row) for _, row, its_split in _problems() if its_split == split]


# --- problems ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem before its wording is used.

    Attributes:
        numbers: What identifies it within its kind, in an order that its wording doesn't change.
        query: The text.
        answer: A whole number.
    """

    numbers: tuple[int, ...]
    query: str
    answer: int


@functools.cache
def _problems() -> tuple[tuple[int, dict[str, Any], str], ...]:
    """Return number, row and split of every problem, mixed.

    The numbers of a kind of problem decide the split, so that no split repeats another's problem
    in other words.
    """
    made = []
    for name, (level, make) in KINDS.items():
        rng = random.Random(f"{SEED} {name}")
        seen: set[tuple[int, ...]] = set()
        while len(seen) < PROBLEMS_PER_KIND:
            problem = make(rng)
            if problem.numbers not in seen:
                seen.add(problem.numbers)
                row = {"query": problem.query, "gt_ans": str(problem.answer), "level": level}
                made.append((row, split_of(f"{name}: {problem.numbers}", "own")))
    random.Random(SEED).shuffle(made)
    return tuple((number, row, split) for number, (row, split) in enumerate(made))


def _sum(rng: random.Random) -> Problem:
    low, high = sorted((rng.randint(2, 49), rng.randint(2, 49)))
    first, second = rng.sample((low, high), 2)
    query = rng.choice(
        (
            f"What is {first} + {second}?",
            f"Add {first} and {second}.",
            f"A box holds {first} red and {second} blue marbles. How many marbles does it hold?",
        )
    )
    return Problem((low, high), query, low + high)


def _difference(rng: random.Random) -> Problem:
    low, high = sorted(rng.sample(range(2, 80), 2))
    query = rng.choice(
        (
            f"What is {high} - {low}?",
            f"Subtract {low} from {high}.",
            f"Mia has {high} stickers and gives away {low}. How many stickers does she have left?",
        )
    )
    return Problem((low, high), query, high - low)


def _product(rng: random.Random) -> Problem:
    low, high = sorted((rng.randint(2, 12), rng.randint(2, 12)))
    first, second = rng.sample((low, high), 2)
    query = rng.choice(
        (
            f"What is {first} times {second}?",
            f"Compute {first} * {second}.",
            f"There are {first} bags with {second} apples each. How many apples are there?",
        )
    )
    return Problem((low, high), query, low * high)


def _quotient(rng: random.Random) -> Problem:
    divisor, result = rng.randint(2, 12), rng.randint(2, 12)
    total = divisor * result
    query = rng.choice(
        (
            f"What is {total} divided by {divisor}?",
            f"Compute {total} / {divisor}.",
            f"{total} cards are dealt equally to {divisor} players. How many does each one get?",
        )
    )
    return Problem((divisor, result), query, result)


def _two_steps(rng: random.Random) -> Problem:
    factor, other, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 30)
    query = rng.choice(
        (
            f"What is {factor} * {other} + {more}?",
            f"Tom buys {factor} packs of {other} pens and finds {more} more pens at home. "
            f"How many pens does he have?",
            f"Multiply {factor} by {other}, then add {more}. What is the result?",
        )
    )
    return Problem((factor, other, more), query, factor * other + more)


def _brackets(rng: random.Random) -> Problem:
    low, high = sorted(rng.sample(range(2, 20), 2))
    factor = rng.randint(2, 9)
    query = rng.choice(
        (
            f"What is ({high} - {low}) * {factor}?",
            f"Subtract {low} from {high} and multiply the result by {factor}.",
        )
    )
    return Problem((low, high, factor), query, (high - low) * factor)


def _percent(rng: random.Random) -> Problem:
    share = rng.choice((5, 10, 20, 25, 30, 40, 50, 60, 75, 80))
    whole = 20 * rng.randint(1, 30)
    query = rng.choice(
        (
            f"What is {share}% of {whole}?",
            f"{share}% of the {whole} pupils of a school walk to school. How many pupils walk?",
        )
    )
    return Problem((share, whole), query, whole * share // 100)


def _mean(rng: random.Random) -> Problem:
    first, second, third = (rng.randint(1, 40) for _ in range(3))
    third += -(first + second + third) % 3  # the sum becomes a multiple of 3
    query = rng.choice(
        (
            f"What is the mean of {first}, {second} and {third}?",
            f"Three boxes weigh {first} kg, {second} kg and {third} kg. What is their average "
            f"weight in kg?",
        )
    )
    numbers = tuple(sorted((first, second, third)))
    return Problem(numbers, query, sum(numbers) // 3)


def _equation(rng: random.Random) -> Problem:
    factor, solution, constant = rng.randint(2, 12), rng.randint(1, 15), rng.randint(1, 30)
    total = factor * solution + constant
    query = rng.choice(
        (
            f"Solve {factor}x + {constant} = {total} for x.",
            f"What is x if {factor}x + {constant} = {total}?",
            f"A number is multiplied by {factor} and {constant} is added; the result is {total}. "
            f"What is the number?",
        )
    )
    return Problem((factor, solution, constant), query, solution)


def _discount(rng: random.Random) -> Problem:
    price, share, count = 20 * rng.randint(1, 10), rng.choice((10, 20, 25, 50)), rng.randint(2, 5)
    reduced = price * (100 - share) // 100
    query = (
        f"A ticket costs {price} dollars. With a discount of {share}%, how many dollars do "
        f"{count} tickets cost?"
    )
    return Problem((price, share, count), query, reduced * count)


def _both_sides(rng: random.Random) -> Problem:
    more, fewer = sorted(rng.sample(range(2, 12), 2), reverse=True)
    solution, constant = rng.randint(1, 12), rng.randint(1, 20)
    total = (more - fewer) * solution + constant
    query = rng.choice(
        (
            f"Solve {more}x + {constant} = {fewer}x + {total} for x.",
            f"For which x is {more}x + {constant} equal to {fewer}x + {total}?",
        )
    )
    return Problem((more, fewer, solution, constant), query, solution)


def _remainder(rng: random.Random) -> Problem:
    base, exponent, divisor = rng.randint(2, 9), rng.randint(2, 5), rng.randint(3, 11)
    query = f"What is the remainder when {base}^{exponent} is divided by {divisor}?"
    return Problem((base, exponent, divisor), query, pow(base, exponent, divisor))


KINDS: dict[str, tuple[int, Callable[[random.Random], Problem]]] = {
    "sum": (1, _sum),
    "difference": (1, _difference),
    "product": (2, _product),
    "quotient": (2, _quotient),
    "two steps": (3, _two_steps),
    "brackets": (3, _brackets),
    "percent": (4, _percent),
    "mean": (4, _mean),
    "equation": (4, _equation),
    "discount": (5, _discount),
    "both sides": (5, _both_sides),
    "remainder": (5, _remainder),
}
"""Kind → level and maker. A kind's name is part of its problems' identity."""

BUILTIN_ARITHMETIC = BuiltinArithmetic()
