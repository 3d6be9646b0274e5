"""One task of a task folder: its questions as requests, and what answers to them are worth."""

from __future__ import annotations

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
from lm_eval.tasks import TaskManager

from drllm.errors import ModelError, TaskError
from drllm.evaluation.baselines.fitting.measures import log_share
from drllm.evaluation.lm_eval.folders import HarnessTask
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.requests import Request
from drllm.evaluation.lm_eval.scoring import Answer
from drllm.evaluation.lm_eval.stock import golds_of
from drllm.listener import quiet

Key: TypeAlias = tuple[str, int]
"""Which question: the harness' task, and the row's number there."""

FEWSHOT_SEED = 1234
"""The harness' own, so that its command line draws the same worked examples."""


class AskedTask:
    """The questions of one task, as the harness renders them: `keys`, requests and rows of each.

    The source is the folder that the task was written to, or the harness' own tasks, of which the
    questions at some places are asked. With `chat` worked examples are turns.
    """

    def __init__(
        self,
        written: HarnessTask,
        source: Path | Mapping[str, Any],
        lm: RoutedLM,
        *,
        chat: bool,
        places: Mapping[str, list[int]] | None = None,
    ) -> None:
        self.written = written
        self._lm = lm
        self._tasks: dict[str, Any] = {}
        self.keys: list[Key] = []
        self.instances: list[list[Instance]] = []
        self.docs: list[Mapping[str, Any]] = []
        # The harness and `datasets` tell how they read a task, in bars of their own.
        with quiet("lm_eval"), redirect_stderr(io.StringIO()):
            if isinstance(source, Path):
                manager = TaskManager(include_path=str(source), include_defaults=False)
                self._tasks |= manager.load([written.harness_name])["tasks"]
            else:
                self._tasks |= {name: source[name] for name in written.leaves}
            for name, task in self._tasks.items():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(
                    samples=places[name] if places else None,
                    rank=0,
                    world_size=1,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=lm.apply_chat_template if chat else None,
                    tokenizer_name=lm.tokenizer_name if chat else "",
                )
        for name, task in self._tasks.items():
            for doc_id, instances in itertools.groupby(task.instances, lambda each: each.doc_id):
                self.keys.append((name, doc_id))
                self.instances.append(sorted(instances, key=lambda each: each.idx))
                self.docs.append(self.instances[-1][0].doc)

    @property
    def has_options(self) -> bool:
        """Whether options are scored; else answers are generated."""
        return self.written.kind == "choices"

    @property
    def ids(self) -> list[str]:
        """Our id of each question."""
        ours = (example.id for example in self.written.examples)
        return [str(doc.get("drllm_id", own)) for doc, own in zip(self.docs, ours, strict=True)]

    def digest(self) -> str:
        """Return a hash of all that is asked and of what the answers are graded by."""
        args = [[instance.args for instance in instances] for instances in self.instances]
        text = json.dumps([self.keys, args, self.docs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def requests(self) -> list[list[Request]]:
        """Return each question's options as tokens after its context."""
        return [[self._lm.request_of(each) for each in instances] for instances in self.instances]

    def prompts(self) -> list[str]:
        """Return what the model reads of each question, rendered."""
        return [str(instances[0].args[0]) for instances in self.instances]

    @functools.cached_property
    def prompt_tokens(self) -> list[list[int]]:
        """The same as tokens."""
        return [self._lm.tok_encode(prompt) for prompt in self.prompts()]

    def gold(self, place: int) -> int:
        """Return which option of the question at a place is right, the first of several."""
        return self._golds(place)[0]

    def _golds(self, place: int) -> list[int]:
        name, _ = self.keys[place]
        if found := golds_of(self._tasks[name], self.docs[place]):
            return found
        raise TaskError(f"{name} has no right option in row {place}; leave the task out")

    def text(self, place: int) -> Request:
        """Return a question with its right answer as a text whose next-token loss can be read.

        With options it is the question and the right one, all but its first token predicted;
        where answers are generated, the right answer after the question (for GSM8K a worked
        solution), which alone is predicted.
        """
        if self.has_options:
            request = self._lm.request_of(self.instances[place][self.gold(place)])
            tokens = [*request.context, *request.continuation]
            return Request(self.keys[place], tokens[:1], tokens[1:])
        name, doc_id = self.keys[place]
        task = self._tasks[name]
        answer = task.doc_to_target(self.docs[place])
        first = answer[0] if isinstance(answer, list) else answer
        args = str(self.instances[place][0].args[0]), task.config.target_delimiter + str(first)
        return self._lm.request_of(Instance("loglikelihood", {}, args, 0, (name, doc_id, 1)))

    def check(self, place: int, answers: Sequence[Answer]) -> None:
        """Refuse log-probabilities of the question at a place that are not finite."""
        for logprob, _ in answers:
            if not math.isfinite(logprob):
                raise ModelError(
                    f"a log-probability of question {self.ids[place]} is {logprob}; load the model "
                    f"with --dtype float32"
                )

    def grade(self, answers: Sequence[Sequence[Answer | str]]) -> list[dict[str, float]]:
        """Return, for each question, what the harness says of its answers: metrics by name."""
        for instances, given in zip(self.instances, answers, strict=True):
            for instance, answer in zip(instances, given, strict=True):
                instance.resps, instance.filtered_resps = [answer], {}
        for task in self._tasks.values():
            task.apply_filters()
        graded = []
        for (name, _), doc, instances in zip(self.keys, self.docs, self.instances, strict=True):
            answered = [each.filtered_resps[self.written.filter] for each in instances]
            metrics = self._tasks[name].process_results(doc, answered)
            scores = {m: float(v) for m, v in metrics.items() if isinstance(v, (bool, int, float))}
            if not 0 <= scores.get(self.written.metric, -1.0) <= 1:
                raise TaskError(
                    f"task {name!r} scores an answer {metrics.get(self.written.metric)} by "
                    f"{self.written.metric}, not from 0 to 1; 'drllm lm-eval run' takes it"
                )
            graded.append(scores)
        return graded

    def answer(self, place: int, answers: Sequence[Answer | str]) -> int | str:
        """Return the option that a question was answered with, from 0, or the text generated."""
        sums = [answer[0] for answer in answers if not isinstance(answer, str)]
        if not sums:
            return str(answers[0])
        if self.written.metric == "acc_norm":  # as the harness chooses
            choices = self._tasks[self.keys[place][0]].doc_to_choice(self.docs[place])
            sums = [total / len(text) for total, text in zip(sums, choices, strict=True)]
        return sums.index(max(sums))

    def gold_logprob(self, place: int, answers: Sequence[Answer | str]) -> float:
        """Return the gold option's log-probability among the options of a question, in nats."""
        sums = [answer[0] for answer in answers if not isinstance(answer, str)]
        first, *others = (log_share(sums, gold) for gold in self._golds(place))
        return math.log(sum(map(math.exp, (first, *others)))) if others else first
