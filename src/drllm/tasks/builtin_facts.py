"""`builtin_facts`: four-way questions made from the project's own tables; needs no data.

Owns how a fact becomes a question: wording, distractors, place of the right option, split. Leaves
the facts to `fact_tables*` and the ways of asking to `multiple_choice`. Loads no torch.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drllm.records import split_of
from drllm.tasks.base import Example, check_split
from drllm.tasks.fact_tables import NUMBERS, SCIENCE, Relation
from drllm.tasks.fact_tables_life import ANIMALS, BODY, THINGS, WORDS
from drllm.tasks.fact_tables_places import CULTURE, PLACES
from drllm.tasks.multiple_choice import LETTERS, MultipleChoiceTask, labelled_example

RELATIONS: tuple[Relation, ...] = (
    *SCIENCE,
    *NUMBERS,
    *ANIMALS,
    *BODY,
    *THINGS,
    *WORDS,
    *PLACES,
    *CULTURE,
)
NUM_CHOICES = 4
SEED = 0
NAME = "builtin_facts"


class BuiltinFacts(MultipleChoiceTask):
    """Four-way questions on general knowledge, the same on every machine."""

    name = NAME
    description = "general knowledge, four options, made from tables of our own (needs no data)"

    def examples(self, split: str, data_dir: Path | None = None) -> list[Example]:
        """Return the questions of one split, in a fixed order that mixes the relations.

        Args:
            split: `search`, `fit`, `select` or `test`.
            data_dir: Not needed, and not looked at.

        Raises:
            TaskError: An unknown split.
        """
        check_split(split)
        return [labelled_example(row, self.name) for row in rows(split)]


@functools.cache
def rows(split: str) -> tuple[dict[str, Any], ...]:
    """Return the questions of one split as rows of the ARC schema.

    A fact (relation and subject) has one split, whichever way round it is asked. The right option
    stands equally often in each place.

    Source: ours.
    """
    made = [
        (relation, subject, backward)
        for relation in RELATIONS
        for subject in relation.facts
        if split_of(f"{relation.name}: {subject}", "own") == split
        for backward in _directions(relation)
    ]
    rng = random.Random(f"{SEED} {split}")
    rng.shuffle(made)
    places = _places(rng)
    return tuple(_row(*fact, place=next(places)) for fact in made)


def _directions(relation: Relation) -> list[bool]:
    return [
        backward for backward in (False, True) if (relation.forward, relation.backward)[backward]
    ]


def _places(rng: random.Random) -> Iterator[int]:
    """Yield places of the right option: every four of them are all places in random order."""
    while True:
        yield from rng.sample(range(NUM_CHOICES), NUM_CHOICES)


def _row(relation: Relation, subject: str, backward: bool, *, place: int) -> dict[str, Any]:
    answer = relation.facts[subject]
    direction = "backward" if backward else "forward"
    rng = random.Random(f"{SEED} {relation.name} {subject} {direction}")
    wording = rng.choice(relation.backward if backward else relation.forward)
    right = subject if backward else answer
    choices = rng.sample(distractors(relation, subject, backward), NUM_CHOICES - 1)
    choices.insert(place, right)
    question = wording.format(subject=subject, answer=answer)
    return {
        "id": f"{relation.name}-{subject}-{direction}".replace(" ", "_"),
        "question": question[0].upper() + question[1:],
        "choices": {"text": choices, "label": list(LETTERS[:NUM_CHOICES])},
        "answerKey": LETTERS[place],
    }


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


BUILTIN_FACTS = BuiltinFacts()
