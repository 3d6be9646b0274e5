"""Questions that need no data: `builtin_facts` and `builtin_arithmetic`, the same on every machine.

Facts and problems are in `data/`, written for this project. How facts become questions is here:
wording, distractors, the place of the right option, splits. Loads no torch.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import msgspec

from drllm.records import read_json, read_json_lines, split_of
from drllm.tasks.base import Example, Task, check_split, with_options
from drllm.tasks.forms import BOXED, Options
from drllm.tasks.registry import register

DATA = Path(__file__).parent / "data"
NUM_CHOICES = 4
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
    stands equally often in each place: every four of them are all places in random order.
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
    places: list[int] = []
    while len(places) < len(made):
        places += rng.sample(range(NUM_CHOICES), NUM_CHOICES)
    return tuple(_question(*fact, place) for fact, place in zip(made, places, strict=False))


def _question(relation: Relation, subject: str, backward: bool, place: int) -> Example:
    answer = relation.facts[subject]
    direction = "backward" if backward else "forward"
    rng = random.Random(f"{SEED} {relation.name} {subject} {direction}")
    wording = rng.choice(relation.backward if backward else relation.forward)
    choices = rng.sample(distractors(relation, subject, backward), NUM_CHOICES - 1)
    choices.insert(place, subject if backward else answer)
    question = wording.format(subject=subject, answer=answer)
    row_id = f"{relation.name}-{subject}-{direction}".replace(" ", "_")
    question = question[0].upper() + question[1:]
    return with_options(question, tuple(choices), place, row_id, BuiltinFacts.name)


def distractors(relation: Relation, subject: str, backward: bool) -> list[str]:
    """Return the wrong options that a question on a fact may have, in the table's order.

    Where it is asked `backward`, the answer is given and the subject is asked for.
    """
    answer = relation.facts[subject]
    if backward:
        return [
            other
            for other, its_answer in relation.facts.items()
            if its_answer != answer and answer not in relation.also.get(other, ())
        ]
    right = {answer, *relation.also.get(subject, ())}
    return [other for other in dict.fromkeys(relation.facts.values()) if other not in right]


# --- arithmetic ----------------------------------------------------------------------------------


class Problem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A problem of `arithmetic.jsonl`, in the schema of DART-Math and with its split.

    Problems of one kind with the same numbers are in one split, in whatever words.

    The answer is a whole number; levels go from 1 (one step) to 5 (discounts, linear equations,
    remainders of powers).
    """

    query: str
    gt_ans: str
    level: int
    split: str


@functools.cache
def problems() -> tuple[Problem, ...]:
    """Return the problems of all levels and splits, mixed."""
    return tuple(each for _, each in read_json_lines(DATA / "arithmetic.jsonl", Problem))


@register
class BuiltinArithmetic(Task):
    """Short problems in five levels, made by rule; a test works each of them out."""

    name = "builtin_arithmetic"
    description = "arithmetic in five levels, answers in a box, made by rule (needs no data)"
    form = BOXED

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the problems of one split, in a fixed order that mixes the levels."""
        check_split(split)
        return [
            Example(id=f"arithmetic-{n}", task=self.name, question=each.query, answer=each.gt_ans)
            for n, each in enumerate(problems())
            if each.split == split
        ]
