"""Let lm-evaluation-harness render and grade tasks: drllm's task folders, or its own tasks."""

import copy
import functools
import hashlib
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.folders import HarnessTask
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import HarnessRequest, OptionScore
from drllm.listener import quiet
from drllm.tasks.examples import choose
from drllm.tasks.harness import FEWSHOT_SEED, LmEvalTask, find_gold_indices, load_harness_tasks
from drllm.tuning.path_scorer import log_share

Key: TypeAlias = tuple[str, int]
"""Identifies a question: the name of the harness' task, and the number of the question's row."""


class RenderedTask:
    """The questions of one task, as the harness renders and grades them.

    Args:
        written: The task.
        source: The folder that the task was written to, or the harness' own tasks.
        lm: The model that answers.
        chat: Whether to apply the chat template, with worked examples as turns.

    Attributes:
        keys: The key of each question.
        instances: Each question's requests, in the order of its options.
        docs: Each question's row.
    """

    def __init__(
        self, written: HarnessTask, source: Path | Mapping[str, Any], lm: RoutedLM, *, chat: bool
    ) -> None:
        self.written = written
        self._lm = lm
        if isinstance(source, Path):
            source = load_harness_tasks(f"{source / written.harness_name}.yaml")
        # Copies, since a task of the harness stores the requests that it built last.
        self._tasks = {name: copy.copy(source[name]) for name in written.leaves}
        self._build_requests(chat)
        self.instances: list[list[Instance]] = []
        for task in self._tasks.values():
            for _, group in itertools.groupby(task.instances, lambda instance: instance.doc_id):
                self.instances.append(sorted(group, key=lambda instance: instance.idx))
        self.keys = [(first.task_name, first.doc_id) for first, *_ in self.instances]
        self.docs = [first.doc for first, *_ in self.instances]

    def _build_requests(self, chat: bool) -> None:
        """Make the harness build the requests, without its progress bars."""
        with quiet("lm_eval"), redirect_stderr(io.StringIO()):
            for name, task in self._tasks.items():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(
                    samples=self.written.places.get(name),
                    rank=0,
                    world_size=1,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=self._lm.apply_chat_template if chat else None,
                    tokenizer_name=self._lm.tokenizer_name if chat else "",
                )

    @property
    def has_options(self) -> bool:
        """Whether options are scored; otherwise answers are generated."""
        return self.written.kind == "choices"

    @property
    def ids(self) -> list[str]:
        """The id of each question in drllm."""
        return [
            str(doc.get("drllm_id", example.id))
            for doc, example in zip(self.docs, self.written.examples, strict=True)
        ]

    def digest(self) -> str:
        """Return a hash of all requests and of the rows by which answers are graded."""
        args = [[instance.args for instance in instances] for instances in self.instances]
        text = json.dumps([self.keys, args, self.docs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def requests(self) -> list[list[HarnessRequest]]:
        """Return each question's requests, one for each option, as tokens."""
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
        """Return the right options of the question at a place, at least one."""
        name, _ = self.keys[place]
        golds = find_gold_indices(self._tasks[name], self.docs[place])
        if not golds:
            raise TaskError(f"{name} has no right option in row {place}; leave the task out")
        return golds

    def text(self, place: int) -> HarnessRequest:
        """Return a question with its right answer, as a text to measure the next-token loss on.

        With options the text is the question and the right option, and all tokens but the first are
        predicted. With generated answers only the right answer is predicted (for GSM8K a worked
        solution). Without a right answer the text is the question.
        """
        key = self.keys[place]
        instances = self.instances[place]
        if self.has_options:
            request = self._lm.encode_request(instances[self.golds(place)[0]])
            return _predict_all(key, [*request.context, *request.continuation])
        name, doc_id = key
        task = self._tasks[name]
        answer = task.doc_to_target(self.docs[place])
        if isinstance(answer, list):
            answer = answer[0]
        if not str(answer):  # there is no right answer; a function grades answers
            return _predict_all(key, self.prompt_tokens[place])
        continuation = task.config.target_delimiter + str(answer)
        arguments = (str(instances[0].args[0]), continuation)
        instance = Instance("loglikelihood", {}, arguments, 0, (name, doc_id, 1))
        return self._lm.encode_request(instance)

    def grade(self, answers: Sequence[Sequence[OptionScore | str]]) -> list[dict[str, float]]:
        """Let the harness grade the answers to each question; return its metrics by name."""
        for instances, question_answers in zip(self.instances, answers, strict=True):
            for instance, answer in zip(instances, question_answers, strict=True):
                instance.resps = [answer]
                instance.filtered_resps = {}
        for task in self._tasks.values():
            task.apply_filters()
        return [self._grade(place) for place in range(len(self.keys))]

    def _grade(self, place: int) -> dict[str, float]:
        """Return the metrics of one question, after the harness has filtered the answers."""
        name, _ = self.keys[place]
        metric = self.written.metric
        instances = self.instances[place]
        filtered = [instance.filtered_resps[self.written.filter] for instance in instances]
        metrics = self._tasks[name].process_results(self.docs[place], filtered)
        scores = {}
        for key, value in metrics.items():
            if isinstance(value, (bool, int, float)):
                scores[key] = float(value)
        if not 0 <= scores.get(metric, -1.0) <= 1:
            raise TaskError(
                f"task {name!r} scores an answer {metrics.get(metric)} by {metric}, not from 0 to "
                f"1; 'drllm lm-eval run' takes it"
            )
        return scores

    def answer(self, place: int, answers: Sequence[OptionScore | str]) -> int | str:
        """Return the option that the model chose, from 0, or the text that it generated."""
        sums = _read_logprobs(answers)
        if not sums:
            return str(answers[0])
        if self.written.metric == "acc_norm":  # as the harness chooses
            name, _ = self.keys[place]
            options = self._tasks[name].doc_to_choice(self.docs[place])
            sums = [logprob / len(text) for logprob, text in zip(sums, options, strict=True)]
        return sums.index(max(sums))

    def gold_logprob(self, place: int, answers: Sequence[OptionScore | str]) -> float:
        """Return the gold option's log-probability among a question's options, in nats.

        The probabilities of several gold options are added.
        """
        sums = _read_logprobs(answers)
        shares = [log_share(sums, gold) for gold in self.golds(place)]
        if len(shares) == 1:
            return shares[0]
        return math.log(sum(math.exp(share) for share in shares))


def _predict_all(key: Key, tokens: Sequence[int]) -> HarnessRequest:
    """Make a text into a request that predicts all its tokens but the first."""
    return HarnessRequest(key, tokens[:1], tokens[1:])


def _read_logprobs(answers: Sequence[OptionScore | str]) -> list[float]:
    """Return the log-probabilities of scored options; an empty list for generated answers."""
    return [answer[0] for answer in answers if not isinstance(answer, str)]


def draw_stock_task(
    task: LmEvalTask, split: str | None, limit: int | None, seed: int, num_fewshot: int | None
) -> HarnessTask:
    """Draw the questions of one of the harness' own tasks, and set its worked examples.

    Args:
        task: The task.
        split: Draw only from this split, since something is fitted on the other questions. None
            draws from all questions that the harness reports.
        limit: Maximum number of questions; None takes all.
        seed: Seed of the drawing.
        num_fewshot: Worked examples before each question; None takes the task's own number.
    """
    note = "asked as lm-evaluation-harness has it, on the questions that it reports"
    questions = task.reported
    if split is not None and not task.reports_test_alone:
        ids = {example.id for example in task.examples(split)}
        questions = [question for question in questions if question[2].id in ids]
        note += f": {len(questions)} of {len(task.reported)}, since others are to be fitted on"
    drawn = choose(questions, limit, seed)
    places: dict[str, list[int]] = {}
    for leaf, place, _ in drawn:
        places.setdefault(leaf, []).append(place)
    shots = {}
    for leaf in places:
        shots[leaf] = task.shots_of[leaf] if num_fewshot is None else num_fewshot
        task.tasks[leaf].set_config("num_fewshot", shots[leaf])
    first = next(iter(task.tasks.values()))
    return HarnessTask(
        name=task.name,
        harness_name=task.name,
        leaves={leaf: len(leaf_places) for leaf, leaf_places in places.items()},
        metric=task.metric,
        filter=first._filters[0].name,
        kind=task.kind,  # type: ignore[arg-type]
        examples=tuple(example for *_, example in drawn),
        num_fewshot=max(shots.values()),
        notes=(note,),
        places=places,
    )
