"""Let lm-evaluation-harness ("the harness") render the questions of a task.

The task is one of drllm's tasks, as task objects (see `objects`), or one of the harness' own.
"""

import copy
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.leaves import HarnessTask
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import HarnessRequest
from drllm.tasks.examples import choose
from drllm.tasks.harness import FEWSHOT_SEED, LmEvalTask, find_gold_indices
from drllm.work.listener import quiet

Key: TypeAlias = tuple[str, int]
"""Identifies a question: the name of the harness' task, and the number of the question's row."""


class RenderedTask:
    """The questions of one task, as the harness renders them.

    The harness' task is a group if the set has several parts. The order of the questions is the
    same in all lists, and methods take a question's place in this order.

    Args:
        task: The task, described for the harness.
        leaves: Name of a leaf → the harness' task. There may be more than the task's leaves.
        lm: The model that answers.
        chat: Whether to apply the chat template, with worked examples as turns.

    Attributes:
        keys: The key of each question.
        instances: The harness' requests of each question, in the order of its options.
        docs: The row of each question.
        leaves: Name of a leaf → the harness' task, only those of the task.
    """

    def __init__(
        self, task: HarnessTask, leaves: Mapping[str, Any], lm: RoutedLM, *, chat: bool
    ) -> None:
        self.task = task
        # Copies, since a task of the harness stores the requests that it built last.
        self.leaves = {name: copy.copy(leaves[name]) for name in task.leaves}
        self._lm = lm
        self._chat = chat
        _build_requests(self.leaves, task.places, lm, chat=chat)
        self.instances = _group_instances(self.leaves)
        first_instances = [instances[0] for instances in self.instances]
        self.keys: list[Key] = [(first.task_name, first.doc_id) for first in first_instances]
        self.docs = [first.doc for first in first_instances]

    @property
    def has_options(self) -> bool:
        """Whether options are scored; otherwise answers are generated."""
        return self.task.kind == "choices"

    @property
    def ids(self) -> list[str]:
        """The id of each question in drllm; the rows of drllm's tasks have it."""
        pairs = zip(self.docs, self.task.examples, strict=True)
        return [str(doc.get("drllm_id", example.id)) for doc, example in pairs]

    def digest(self) -> str:
        """Return a hash of everything that determines scores: all requests and all rows."""
        args = [[instance.args for instance in instances] for instances in self.instances]
        text = json.dumps([self.keys, args, self.docs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def requests(self) -> list[list[HarnessRequest]]:
        """Return the requests of each question as tokens, one request for each option."""
        return [
            [self._lm.encode_request(instance) for instance in instances]
            for instances in self.instances
        ]

    def prompts(self) -> list[str]:
        """Return each question's prompt, rendered as the model reads it."""
        return [str(instances[0].args[0]) for instances in self.instances]

    @functools.cached_property
    def prompt_tokens(self) -> list[list[int]]:
        """The prompts as tokens."""
        return [self._lm.tok_encode(prompt) for prompt in self.prompts()]

    def golds(self, place: int) -> list[int]:
        """Return the numbers of a question's right options, at least one, from 0."""
        name, _ = self.keys[place]
        golds = find_gold_indices(self.leaves[name], self.docs[place])
        if not golds:
            raise TaskError(f"{name} has no right option in row {place}; leave the task out")
        return golds

    def text(self, place: int) -> HarnessRequest:
        """Return the text of a question on which the next-token loss is measured.

        If the question has options, the text is the prompt and the right option, and the loss is
        over all tokens but the first. If answers are generated, the text is the prompt and the
        right answer (for GSM8K a worked solution), and the loss is over the answer alone. Without a
        right answer, the text is the prompt, and the loss is over all tokens but the first.
        """
        key = self.keys[place]
        if self.has_options:
            gold = self.golds(place)[0]
            request = self._lm.encode_request(self.instances[place][gold])
            return _predict_all(key, [*request.context, *request.continuation])
        answer = self._find_right_answer(place)
        if not answer:  # the task has no right answers, but a function that grades
            return _predict_all(key, self.prompt_tokens[place])
        prompt = str(self.instances[place][0].args[0])
        if self._chat:
            # The template ends where the answer begins, often in white space, which the harness
            # would count as a part of the answer.
            context = self.prompt_tokens[place]
            return HarnessRequest(
                key, context, self._lm.tok_encode(prompt + answer)[len(context) :]
            )
        name, doc_id = key
        delimiter = self.leaves[name].config.target_delimiter
        instance = Instance("loglikelihood", {}, (prompt, delimiter + answer), 0, (name, doc_id, 1))
        return self._lm.encode_request(instance)

    def _find_right_answer(self, place: int) -> str:
        """Return the first right answer to a question whose answer is generated, or ""."""
        name, _ = self.keys[place]
        answer = self.leaves[name].doc_to_target(self.docs[place])
        if isinstance(answer, list):
            answer = answer[0]
        return str(answer)


def _build_requests(
    leaves: Mapping[str, Any], places: Mapping[str, list[int]], lm: RoutedLM, *, chat: bool
) -> None:
    """Make the harness build the requests of all leaves, without its progress bars.

    Args:
        leaves: The harness' tasks, which store their requests.
        places: Name of a leaf → the places of its questions to ask; a leaf without places asks all.
        lm: The model that answers.
        chat: Whether to apply the chat template.
    """
    template = None
    tokenizer_name = ""
    if chat:
        template = lm.apply_chat_template
        tokenizer_name = lm.tokenizer_name
    with quiet("lm_eval"), redirect_stderr(io.StringIO()):
        for name, leaf in leaves.items():
            leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
            leaf.build_all_requests(
                samples=places.get(name),
                rank=0,
                world_size=1,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=template,
                tokenizer_name=tokenizer_name,
            )


def _group_instances(leaves: Mapping[str, Any]) -> list[list[Instance]]:
    """Return the requests that the leaves have built, by question, in the order of the options."""
    groups = []
    for leaf in leaves.values():
        for _, group in itertools.groupby(leaf.instances, lambda instance: instance.doc_id):
            groups.append(sorted(group, key=lambda instance: instance.idx))
    return groups


def _predict_all(key: Key, tokens: Sequence[int]) -> HarnessRequest:
    """Make a request that predicts all tokens of a text but the first."""
    return HarnessRequest(key, tokens[:1], tokens[1:])


def draw_stock_task(
    task: LmEvalTask, split: str | None, limit: int | None, seed: int, num_fewshot: int | None
) -> HarnessTask:
    """Draw the questions of one of the harness' own tasks, and set its worked examples.

    Args:
        task: The task, or a group of tasks of the harness.
        split: Draw only from this split, since something is fitted on the other questions. None
            draws from all questions that the harness reports.
        limit: Maximum number of questions; None takes all.
        seed: Seed of the drawing.
        num_fewshot: Worked examples before each question; None takes the task's own number.
    """
    note = "prompted as in lm-evaluation-harness, on the questions that it reports"
    questions = task.reported
    if split is not None and not task.has_only_test:
        ids = {example.id for example in task.examples(split)}
        questions = [question for question in questions if question[2].id in ids]
        note += f": {len(questions)} of {len(task.reported)}, since others are to be fitted on"
    questions = choose(questions, limit, seed)
    places: dict[str, list[int]] = {}  # of the questions, by the harness' task
    for leaf, place, _ in questions:
        places.setdefault(leaf, []).append(place)
    num_shots = dict(task.num_shots)
    if num_fewshot is not None:
        num_shots = dict.fromkeys(places, num_fewshot)
    for leaf in places:
        task.tasks[leaf].set_config("num_fewshot", num_shots[leaf])
    first_task = next(iter(task.tasks.values()))
    return HarnessTask(
        name=task.name,
        harness_name=task.name,
        leaves={leaf: len(leaf_places) for leaf, leaf_places in places.items()},
        metric=task.metric,
        filter=first_task._filters[0].name,
        kind=task.kind,  # type: ignore[arg-type]
        examples=tuple(example for *_, example in questions),
        num_fewshot=max(num_shots[leaf] for leaf in places),
        notes=(note,),
        places=places,
    )
