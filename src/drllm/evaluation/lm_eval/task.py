"""A task as lm-evaluation-harness renders it: of a task folder of ours, or its own by any name."""

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
from drllm.tasks.harness import FEWSHOT_SEED, LmEvalTask, gold_indices, load_harness_tasks
from drllm.tuning.judge import log_share

Key: TypeAlias = tuple[str, int]  # which question: the harness' task, and the row's number there


class AskedTask:
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
        # The harness and `datasets` tell how they read a task, in bars of their own.
        with quiet("lm_eval"), redirect_stderr(io.StringIO()):
            for name, task in self._tasks.items():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(
                    samples=written.places.get(name),
                    rank=0,
                    world_size=1,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=lm.apply_chat_template if chat else None,
                    tokenizer_name=lm.tokenizer_name if chat else "",
                )
        groups = (
            group
            for task in self._tasks.values()
            for _, group in itertools.groupby(task.instances, lambda each: each.doc_id)
        )
        self.instances = [sorted(group, key=lambda each: each.idx) for group in groups]
        self.keys = [(first.task_name, first.doc_id) for first, *_ in self.instances]
        self.docs = [first.doc for first, *_ in self.instances]

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

    def requests(self) -> list[list[HarnessRequest]]:
        """Return each question's options as tokens after its context."""
        return [[self._lm.request_of(each) for each in instances] for instances in self.instances]

    def prompts(self) -> list[str]:
        """Return what the model reads of each question, rendered."""
        return [str(instances[0].args[0]) for instances in self.instances]

    @functools.cached_property
    def prompt_tokens(self) -> list[list[int]]:
        """The same as tokens."""
        return [self._lm.tok_encode(prompt) for prompt in self.prompts()]

    def golds(self, place: int) -> list[int]:
        """Return which options of the question at a place are right, one at least."""
        name, _ = self.keys[place]
        if found := gold_indices(self._tasks[name], self.docs[place]):
            return found
        raise TaskError(f"{name} has no right option in row {place}; leave the task out")

    def text(self, place: int) -> HarnessRequest:
        """Return a question with its right answer as a text whose next-token loss can be read.

        With options it is the question and the right one, all but its first token predicted;
        where answers are generated, the right answer after the question (for GSM8K a worked
        solution), which alone is predicted; the question where there is no right answer.
        """
        if self.has_options:
            request = self._lm.request_of(self.instances[place][self.golds(place)[0]])
            tokens = [*request.context, *request.continuation]
            return HarnessRequest(self.keys[place], tokens[:1], tokens[1:])
        name, doc_id = self.keys[place]
        task = self._tasks[name]
        answer = task.doc_to_target(self.docs[place])
        first = answer[0] if isinstance(answer, list) else answer
        if not str(first):  # of a prompt alone, which a function grades
            tokens = self.prompt_tokens[place]
            return HarnessRequest(self.keys[place], tokens[:1], tokens[1:])
        args = str(self.instances[place][0].args[0]), task.config.target_delimiter + str(first)
        return self._lm.request_of(Instance("loglikelihood", {}, args, 0, (name, doc_id, 1)))

    def grade(self, answers: Sequence[Sequence[OptionScore | str]]) -> list[dict[str, float]]:
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

    def answer(self, place: int, answers: Sequence[OptionScore | str]) -> int | str:
        """Return the option that a question was answered with, from 0, or the text generated."""
        sums = [answer[0] for answer in answers if not isinstance(answer, str)]
        if not sums:
            return str(answers[0])
        if self.written.metric == "acc_norm":  # as the harness chooses
            choices = self._tasks[self.keys[place][0]].doc_to_choice(self.docs[place])
            sums = [total / len(text) for total, text in zip(sums, choices, strict=True)]
        return sums.index(max(sums))

    def gold_logprob(self, place: int, answers: Sequence[OptionScore | str]) -> float:
        """Return the gold option's log-probability among the options of a question, in nats."""
        sums = [answer[0] for answer in answers if not isinstance(answer, str)]
        first, *others = (log_share(sums, gold) for gold in self.golds(place))
        return math.log(sum(map(math.exp, (first, *others)))) if others else first


def asked_of(
    task: LmEvalTask, split: str | None, limit: int | None, seed: int, num_fewshot: int | None
) -> HarnessTask:
    """Return a task of the harness with the questions that are asked, and as many worked examples.

    They are all that it reports, or those of a split, where something is fitted on the others.
    """
    note = "asked as lm-evaluation-harness has it, on the questions that it reports"
    questions = task.reported
    if split is not None and not task.reports_test_alone:
        own = {example.id for example in task.examples(split)}
        questions = [each for each in questions if each[2].id in own]
        note += f": {len(questions)} of {len(task.reported)}, since others are to be fitted on"
    drawn, shots = choose(questions, limit, seed), []
    places: dict[str, list[int]] = {}
    for leaf, place, _ in drawn:
        places.setdefault(leaf, []).append(place)
    for leaf in places:
        shots.append(task.shots_of[leaf] if num_fewshot is None else num_fewshot)
        task.tasks[leaf].set_config("num_fewshot", shots[-1])
    [first, *_] = task.tasks.values()
    return HarnessTask(
        name=task.name,
        harness_name=task.name,
        leaves={leaf: len(own) for leaf, own in places.items()},
        metric=task.metric,
        filter=first._filters[0].name,
        kind=task.kind,  # type: ignore[arg-type]
        examples=tuple(example for *_, example in drawn),
        num_fewshot=max(shots),
        notes=(note,),
        places=places,
    )
