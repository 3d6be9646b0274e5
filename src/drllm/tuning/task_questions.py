"""The questions of a task as a tuning scores them: tokenised, part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from drllm.config import TuneConfig
from drllm.model.load import BaseModel
from drllm.records.static_paths import FIT, PARTS, SELECT, TEST
from drllm.tasks.examples import Example, Prompt, choose
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.objectives import GOLD, LOSS, choose_objective, make_prompt
from drllm.tuning.path_scorer import Item, make_items, make_text_items

NUM_TEXTS = 100  # maximum questions of a part on whose texts the next-token loss is measured
TEXTS_OF = "texts of "
"""A prefix for the name of a part. `texts of PART` is a part too: its items are the questions of
PART with their right answers, as texts that are scored by their next-token loss."""


@dataclass(frozen=True, eq=False)
class TaskQuestions:
    """The questions of one task.

    Attributes:
        key: The name with the task's number, since two tasks may have the same name.
        name: The task's name.
        objective: The task's objective, see `objectives`.
        is_divided: As in `TaskSplits`.
        chance: The accuracy of guessing; 0 if no options are compared.
        items: Part → its questions. The parts are `fit`, `select`, `test`, and the texts of
            `select` and `test`.
        prompts: Part → the prompts to generate answers to; empty if no answers are generated.
    """

    key: str
    name: str
    objective: str
    is_divided: bool
    chance: float
    items: Mapping[str, Sequence[Item]]
    prompts: Mapping[str, Sequence[Prompt]]

    @property
    def is_generated(self) -> bool:
        """Whether accuracy is measured by generating and grading answers."""
        return bool(self.prompts)

    def digest_values(self) -> list[object]:
        """Return the values for the digest by which a tuning recognises what the model reads.

        They are the tokens that are scored, and how answers are asked for and graded.
        """
        values: list[object] = [self.key]
        for part, items in self.items.items():
            values.append(part)
            for item in items:
                request = item.request
                continuations = [tuple(tokens) for tokens in request.continuations]
                tokens = (tuple(request.context), continuations, tuple(request.num_unscored))
                values.append((tokens, item.gold))
        for part, prompts in self.prompts.items():
            values += [part, *prompts]
        return values

    def objective_on(self, part: str) -> str:
        """Return the objective that a part is scored by: `LOSS` on texts, else the task's own."""
        return LOSS if part.startswith(TEXTS_OF) else self.objective


def tokenize_task(
    base: BaseModel, splits: TaskSplits, config: TuneConfig, number: int
) -> TaskQuestions:
    """Tokenise the questions of a task.

    Args:
        base: The model; its weights aren't needed.
        splits: The task with its questions.
        config: The settings.
        number: The task's number.

    Raises:
        ModelError: A question doesn't fit the model's context.
    """
    objective = choose_objective(splits.task, config)
    prompts: dict[str, list[Prompt]] = {}
    items: dict[str, list[Item]] = {}
    for part in PARTS:
        examples = _choose_examples(splits, part, config)
        prompts[part] = [make_prompt(splits.task, example, objective) for example in examples]
        items[part] = make_items(base, prompts[part], objective)
    for part in (SELECT, TEST):
        texts = choose(prompts[part], NUM_TEXTS, config.seed)
        items[TEXTS_OF + part] = make_text_items(base, texts)
    generates_answers = config.grade_answers and splits.is_generated(objective)
    return TaskQuestions(
        key=f"{splits.task.name} {number}",
        name=splits.task.name,
        objective=objective,
        is_divided=splits.is_divided,
        chance=_find_chance(splits, objective),
        items=items,
        prompts=prompts if generates_answers else {},
    )


def _choose_examples(splits: TaskSplits, part: str, config: TuneConfig) -> list[Example]:
    """Return the questions of a part: all of `fit`, else at most `num_judged` of them.

    The questions of `fit` are in random order, since the search begins with the first ones.
    """
    examples = splits.examples[part]
    if part != FIT:
        return choose(examples, config.num_judged, config.seed)
    order = np.random.RandomState(config.seed).permutation(len(examples))
    return [examples[place] for place in order]


def _find_chance(splits: TaskSplits, objective: str) -> float:
    """Return the accuracy of guessing; 0 if no options are compared."""
    if objective != GOLD:
        return 0.0
    return fmean(1 / len(example.choices) for example in splits.examples[SELECT])
