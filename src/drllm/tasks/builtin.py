"""Questions that need no data: `builtin_facts` and `builtin_arithmetic`, the same on every machine.

The facts and the wordings are in `data/`, written for this project; how they become questions is
here: wording, distractors, the place of the right option, numbers, splits. Loads no torch.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from drllm.records import read_json, split_of
from drllm.tasks.base import Example, Task, check_split, register
from drllm.tasks.forms import BOXED, Options
from drllm.tasks.published.readers import with_options

DATA = Path(__file__).parent / "data"
NUM_CHOICES = 4
PROBLEMS_PER_KIND = 32
SEED = 0


# --- facts ---------------------------------------------------------------------------------------


class Relation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of fact. Distractors are other answers of the same relation.

    Attributes:
        name: Short; part of the question's id and of the fact's identity.
        facts: Subject → answer.
        forward: Wordings that give the subject (`{subject}`) and ask for the answer.
        backward: Wordings that give the answer (`{answer}`) and ask for the subject; only where
            no two subjects share an answer.
        also: Subject → other answers of the table that are right or arguable for it. They are
            never its distractors, nor is the subject a distractor for them.
    """

    name: str
    facts: dict[str, str]
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    also: dict[str, frozenset[str]] = {}


@functools.cache
def relations() -> tuple[Relation, ...]:
    """Return the tables of facts."""
    return read_json(DATA / "facts.json", tuple[Relation, ...])


@register
class BuiltinFacts(Task):
    """Four-way questions on general knowledge."""

    name = "builtin_facts"
    description = "general knowledge, four options, made from tables of our own (needs no data)"
    form = Options()

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in a fixed order that mixes the relations."""
        return list(_facts(check_split(split)))


@functools.cache
def _facts(split: str) -> tuple[Example, ...]:
    """Return the questions of one split.

    A fact (relation and subject) has one split, whichever way round it is asked. The right option
    stands equally often in each place.
    """
    made = [
        (relation, subject, backward)
        for relation in relations()
        for subject in relation.facts
        if split_of(f"{relation.name}: {subject}", "own") == split
        for backward in (False, True)
        if (relation.backward if backward else relation.forward)
    ]
    rng = random.Random(f"{SEED} {split}")
    rng.shuffle(made)
    places = _places(rng)
    return tuple(_question(*fact, place=next(places)) for fact in made)


def _places(rng: random.Random) -> Iterator[int]:
    """Yield places of the right option: every four of them are all places in random order."""
    while True:
        yield from rng.sample(range(NUM_CHOICES), NUM_CHOICES)


def _question(relation: Relation, subject: str, backward: bool, *, place: int) -> Example:
    answer = relation.facts[subject]
    direction = "backward" if backward else "forward"
    rng = random.Random(f"{SEED} {relation.name} {subject} {direction}")
    wording = rng.choice(relation.backward if backward else relation.forward)
    choices = rng.sample(distractors(relation, subject, backward), NUM_CHOICES - 1)
    choices.insert(place, subject if backward else answer)
    question = wording.format(subject=subject, answer=answer)
    return with_options(
        question[0].upper() + question[1:],
        tuple(choices),
        place,
        row_id=f"{relation.name}-{subject}-{direction}".replace(" ", "_"),
        task=BuiltinFacts.name,
    )


def distractors(relation: Relation, subject: str, backward: bool) -> list[str]:
    """Return the wrong options that a question on a fact may have, in the table's order.

    Args:
        relation: The kind of fact.
        subject: What the fact is about.
        backward: The answer is given and the subject is asked for.
    """
    answer = relation.facts[subject]
    if backward:
        return [
            other
            for other, its_answer in relation.facts.items()
            if its_answer != answer and answer not in relation.also.get(other, ())
        ]
    wrong = dict.fromkeys(relation.facts.values())  # each answer once, in order
    return [
        other for other in wrong if other != answer and other not in relation.also.get(subject, ())
    ]


# --- arithmetic ----------------------------------------------------------------------------------

Drawn: TypeAlias = tuple[tuple[int, ...], int, Mapping[str, int]]
"""A problem before it is worded: what identifies it within its kind, whatever its wording; its
answer; and the numbers that the wordings name."""


@register
class BuiltinArithmetic(Task):
    """Short problems in five levels, from one step to percentages and linear equations."""

    name = "builtin_arithmetic"
    description = "arithmetic in five levels, answers in a box, made by rule (needs no data)"
    form = BOXED

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the problems of one split, in a fixed order that mixes the levels."""
        check_split(split)
        return [example for _, example, its_split in problems() if its_split == split]


@functools.cache
def problems() -> tuple[tuple[int, Example, str], ...]:
    """Return level (1 to 5), question and split of every problem, mixed.

    The numbers of a kind of problem decide the split, so that no split repeats another's problem
    in other words.
    """
    made = []
    kinds = read_json(DATA / "arithmetic.json", dict[str, dict[str, Any]])
    for kind, draw in KINDS.items():
        level, wordings = kinds[kind]["level"], kinds[kind]["wordings"]
        rng = random.Random(f"{SEED} {kind}")
        seen: set[tuple[int, ...]] = set()
        while len(seen) < PROBLEMS_PER_KIND:
            numbers, answer, named = draw(rng)
            # One wording is taken without a draw, which would change all numbers after it.
            wording = rng.choice(wordings) if len(wordings) > 1 else wordings[0]
            if numbers not in seen:
                seen.add(numbers)
                query = wording.format(**named)
                made.append((level, query, str(answer), split_of(f"{kind}: {numbers}", "own")))
    random.Random(SEED).shuffle(made)
    return tuple(
        (
            level,
            Example(
                id=f"arithmetic-{number}",
                task=BuiltinArithmetic.name,
                question=query,
                answer=answer,
            ),
            split,
        )
        for number, (level, query, answer, split) in enumerate(made)
    )


def _sum(rng: random.Random) -> Drawn:
    low, high = sorted((rng.randint(2, 49), rng.randint(2, 49)))
    first, second = rng.sample((low, high), 2)
    return (low, high), low + high, {"first": first, "second": second}


def _difference(rng: random.Random) -> Drawn:
    low, high = sorted(rng.sample(range(2, 80), 2))
    return (low, high), high - low, {"low": low, "high": high}


def _product(rng: random.Random) -> Drawn:
    low, high = sorted((rng.randint(2, 12), rng.randint(2, 12)))
    first, second = rng.sample((low, high), 2)
    return (low, high), low * high, {"first": first, "second": second}


def _quotient(rng: random.Random) -> Drawn:
    divisor, result = rng.randint(2, 12), rng.randint(2, 12)
    return (divisor, result), result, {"total": divisor * result, "divisor": divisor}


def _two_steps(rng: random.Random) -> Drawn:
    factor, other, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 30)
    named = {"factor": factor, "other": other, "more": more}
    return (factor, other, more), factor * other + more, named


def _brackets(rng: random.Random) -> Drawn:
    low, high = sorted(rng.sample(range(2, 20), 2))
    factor = rng.randint(2, 9)
    named = {"low": low, "high": high, "factor": factor}
    return (low, high, factor), (high - low) * factor, named


def _percent(rng: random.Random) -> Drawn:
    share = rng.choice((5, 10, 20, 25, 30, 40, 50, 60, 75, 80))
    whole = 20 * rng.randint(1, 30)
    return (share, whole), whole * share // 100, {"share": share, "whole": whole}


def _mean(rng: random.Random) -> Drawn:
    first, second, third = (rng.randint(1, 40) for _ in range(3))
    third += -(first + second + third) % 3  # the sum becomes a multiple of 3
    numbers = tuple(sorted((first, second, third)))
    return numbers, sum(numbers) // 3, {"first": first, "second": second, "third": third}


def _equation(rng: random.Random) -> Drawn:
    factor, solution, constant = rng.randint(2, 12), rng.randint(1, 15), rng.randint(1, 30)
    named = {"factor": factor, "constant": constant, "total": factor * solution + constant}
    return (factor, solution, constant), solution, named


def _discount(rng: random.Random) -> Drawn:
    price, share, count = 20 * rng.randint(1, 10), rng.choice((10, 20, 25, 50)), rng.randint(2, 5)
    answer = price * (100 - share) // 100 * count
    return (price, share, count), answer, {"price": price, "share": share, "count": count}


def _both_sides(rng: random.Random) -> Drawn:
    more, fewer = sorted(rng.sample(range(2, 12), 2), reverse=True)
    solution, constant = rng.randint(1, 12), rng.randint(1, 20)
    total = (more - fewer) * solution + constant
    named = {"more": more, "fewer": fewer, "constant": constant, "total": total}
    return (more, fewer, solution, constant), solution, named


def _remainder(rng: random.Random) -> Drawn:
    base, exponent, divisor = rng.randint(2, 9), rng.randint(2, 5), rng.randint(3, 11)
    numbers = (base, exponent, divisor)
    return numbers, pow(*numbers), {"base": base, "exponent": exponent, "divisor": divisor}


KINDS: dict[str, Callable[[random.Random], Drawn]] = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "quotient": _quotient,
    "two steps": _two_steps,
    "brackets": _brackets,
    "percent": _percent,
    "mean": _mean,
    "equation": _equation,
    "discount": _discount,
    "both sides": _both_sides,
    "remainder": _remainder,
}
"""How the numbers of each kind of problem in `arithmetic.json` are drawn."""
