"""Render and grade a task by lm-evaluation-harness: one of a task folder of ours, or its own."""

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

Key: TypeAlias = tuple[str, int]  # which question: the harness' task, and the row's number there


class RenderedTask:
    """The questions of one task, as the harness renders them: `keys`, requests and rows of each.

    The source is the folder that the task was written to, or the harness' own tasks. With `chat`
    worked examples are turns.
    """

    def __init__(
        self, written: HarnessTask, source: Path | Mapping[str, Any], lm: RoutedLM, *, chat: bool
    ) -> None:
        self.written = written
        self._lm = lm
        if isinstance(source, Path):
            source = load_harness_tasks(f"{source / written.harness_name}.yaml")
        # Copies, since a task holds the requests of those that were built last.
        self._tasks = {name: copy.copy(source[name]) for name in written.leaves}
        self._build_requests(chat)
        self.instances: list[list[Instance]] = []  # each question's, in the order of its options
        for task in self._tasks.values():
            for _, group in itertools.groupby(task.instances, lambda instance: instance.doc_id):
                self.instances.append(sorted(group, key=lambda instance: instance.idx))
        self.keys = [(first.task_name, first.doc_id) for first, *_ in self.instances]
        self.docs = [first.doc for first, *_ in self.instances]

    def _build_requests(self, chat: bool) -> None:
        """Have the harness build the requests; it and `datasets` would draw bars of their own."""
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
        """Whether options are scored; else answers are generated."""
        return self.written.kind == "choices"

    @property
    def ids(self) -> list[str]:
        """Our id of each question."""
        return [
            str(doc.get("drllm_id", example.id))
            for doc, example in zip(self.docs, self.written.examples, strict=True)
        ]

    def digest(self) -> str:
        """Return a hash of all requests, and of what the answers are graded by."""
        args = [[instance.args for instance in instances] for instances in self.instances]
        text = json.dumps([self.keys, args, self.docs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def requests(self) -> list[list[HarnessRequest]]:
        """Return each question's options as tokens after its context."""
        return [
            [self._lm.request_of(instance) for instance in instances]
            for instances in self.instances
        ]

    def prompts(self) -> list[str]:
        """Return what the model reads of each question, rendered."""
        return [str(instances[0].args[0]) for instances in self.instances]

    @functools.cached_property
    def prompt_tokens(self) -> list[list[int]]:
        """The prompts as tokens."""
        return [self._lm.tok_encode(prompt) for prompt in self.prompts()]

    def golds(self, place: int) -> list[int]:
        """Return which options of the question at a place are right, one at least."""
        name, _ = self.keys[place]
        golds = find_gold_indices(self._tasks[name], self.docs[place])
        if not golds:
            raise TaskError(f"{name} has no right option in row {place}; leave the task out")
        return golds

    def text(self, place: int) -> HarnessRequest:
        """Return a question with its right answer as a text whose next-token loss can be read.

        With options it is the question and the right one, all but its first token predicted;
        where answers are generated, the right answer after the question (for GSM8K a worked
        solution), which alone is predicted; the question where there is no right answer.
        """
        key = self.keys[place]
        instances = self.instances[place]
        if self.has_options:
            request = self._lm.request_of(instances[self.golds(place)[0]])
            return _predict_all(key, [*request.context, *request.continuation])
        name, doc_id = key
        task = self._tasks[name]
        answer = task.doc_to_target(self.docs[place])
        if isinstance(answer, list):
            answer = answer[0]
        if not str(answer):  # of a prompt alone, which a function grades
            return _predict_all(key, self.prompt_tokens[place])
        continuation = task.config.target_delimiter + str(answer)
        arguments = (str(instances[0].args[0]), continuation)
        return self._lm.request_of(Instance("loglikelihood", {}, arguments, 0, (name, doc_id, 1)))

    def grade(self, answers: Sequence[Sequence[OptionScore | str]]) -> list[dict[str, float]]:
        """Have the harness grade the answers to each question; return its metrics by name."""
        for instances, own_answers in zip(self.instances, answers, strict=True):
            for instance, answer in zip(instances, own_answers, strict=True):
                instance.resps = [answer]
                instance.filtered_resps = {}
        for task in self._tasks.values():
            task.apply_filters()
        return [self._grade(place) for place in range(len(self.keys))]

    def _grade(self, place: int) -> dict[str, float]:
        """Return the metrics of a question whose answers are filtered."""
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
        """Return the option that a question was answered with, from 0, or the text generated."""
        sums = _logprobs_of(answers)
        if not sums:
            return str(answers[0])
        if self.written.metric == "acc_norm":  # as the harness chooses
            name, _ = self.keys[place]
            options = self._tasks[name].doc_to_choice(self.docs[place])
            sums = [total / len(text) for total, text in zip(sums, options, strict=True)]
        return sums.index(max(sums))

    def gold_logprob(self, place: int, answers: Sequence[OptionScore | str]) -> float:
        """Return the gold option's log-probability among the options of a question, in nats.

        Of several gold options it is that of their sum.
        """
        sums = _logprobs_of(answers)
        shares = [log_share(sums, gold) for gold in self.golds(place)]
        if len(shares) == 1:
            return shares[0]
        return math.log(sum(math.exp(share) for share in shares))


def _predict_all(key: Key, tokens: Sequence[int]) -> HarnessRequest:
    """Return a text of which all tokens but the first are predicted."""
    return HarnessRequest(key, tokens[:1], tokens[1:])


def _logprobs_of(answers: Sequence[OptionScore | str]) -> list[float]:
    """Return the options' log-probabilities; none of generated answers."""
    return [answer[0] for answer in answers if not isinstance(answer, str)]


def draw_stock_task(
    task: LmEvalTask, split: str | None, limit: int | None, seed: int, num_fewshot: int | None
) -> HarnessTask:
    """Draw the questions of a task of the harness, and set how many worked examples it shows.

    They are drawn from all that it reports, or from those of a split, where something is fitted on
    the others.
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
