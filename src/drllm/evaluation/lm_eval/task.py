"""A task as lm-evaluation-harness renders it: of a task folder of ours, or its own by any name."""

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

import datasets
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from drllm.errors import TaskError, nearest_name
from drllm.evaluation.lm_eval.folders import HarnessTask, name_for_harness
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import Answer, Request
from drllm.listener import quiet
from drllm.tasks.base import Example, Task, choose, with_options
from drllm.tasks.registry import task_names
from drllm.tuning.judge import log_share

Key: TypeAlias = tuple[str, int]
"""Which question: the harness' task, and the row's number there."""

FEWSHOT_SEED = 1234
"""The harness' own, so that its command line draws the same worked examples."""
KINDS = {"multiple_choice": "choices", "generate_until": "generated"}
"""What the harness asks of a model, of which we evaluate these."""
PREFERRED = ("acc", "exact_match")
"""Metrics that count where a task has them; else its first one does."""


class AskedTask:
    """The questions of one task, as the harness renders them: `keys`, requests and rows of each.

    The source is the folder that the task was written to, or the harness' own tasks. With `chat`
    worked examples are turns.
    """

    def __init__(
        self,
        written: HarnessTask,
        source: Path | Mapping[str, Any],
        lm: RoutedLM,
        *,
        chat: bool,
    ) -> None:
        self.written = written
        self._lm = lm
        if isinstance(source, Path):
            source = _loaded(f"{source / written.harness_name}.yaml")
        self._tasks = {name: source[name] for name in written.leaves}
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

    def golds(self, place: int) -> list[int]:
        """Return which options of the question at a place are right, one at least."""
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
            request = self._lm.request_of(self.instances[place][self.golds(place)[0]])
            tokens = [*request.context, *request.continuation]
            return Request(self.keys[place], tokens[:1], tokens[1:])
        name, doc_id = self.keys[place]
        task = self._tasks[name]
        answer = task.doc_to_target(self.docs[place])
        first = answer[0] if isinstance(answer, list) else answer
        args = str(self.instances[place][0].args[0]), task.config.target_delimiter + str(first)
        return self._lm.request_of(Instance("loglikelihood", {}, args, 0, (name, doc_id, 1)))

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
        first, *others = (log_share(sums, gold) for gold in self.golds(place))
        return math.log(sum(map(math.exp, (first, *others)))) if others else first


# --- tasks of the harness itself -----------------------------------------------------------------


class StockTask(Task):
    """A task of the harness, or all of a group or of a task file, by what its `--tasks` takes.

    It has no questions besides those that it reports, so that nothing is fitted or chosen on them.

    Raises:
        TaskError: An unknown name, questions that can't be fetched, or a task that doesn't score
            options or generate answers.
    """

    def __init__(self, name: str) -> None:
        self.tasks = _loaded(name)
        self.name = name_for_harness(name.removesuffix(".yaml").split("/")[-1])
        self.description = f"{name} of lm-evaluation-harness"
        self._shots = {leaf: task.config.num_fewshot or 0 for leaf, task in self.tasks.items()}
        kinds = {task.OUTPUT_TYPE for task in self.tasks.values()}
        metrics = [list(task.aggregation()) for task in self.tasks.values()]
        shared = [metric for metric in metrics[0] if all(metric in each for each in metrics)]
        wanted = "multiple_choice (options) or generate_until (answers) with a metric in common"
        if len(kinds) > 1 or not kinds <= KINDS.keys() or not shared:
            fit = [leaf for leaf, task in self.tasks.items() if task.OUTPUT_TYPE in KINDS]
            alone = f"; name one of {', '.join(fit)}" if fit and len(self.tasks) > 1 else ""
            raise TaskError(
                f"task {name!r} asks for {' and '.join(sorted(map(str, kinds)))}; 'evaluate' takes "
                f"{wanted}{alone}; 'drllm lm-eval run --model drllm' has the rest"
            )
        forbidden = ("UNSAFE_CODE", "MULTIMODAL")
        if any(getattr(task, each, False) for task in self.tasks.values() for each in forbidden):
            raise TaskError(f"task {name!r} runs code or shows images, which 'evaluate' doesn't")
        self.kind = KINDS[kinds.pop()]
        self.metric = next((metric for metric in PREFERRED if metric in shared), shared[0])
        self._examples = [
            (leaf, place, self._example(leaf, place, doc))
            for leaf, task in self.tasks.items()
            for place, doc in enumerate(task.eval_docs)
        ]

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions that the harness reports, as `test`; a TaskError for the others."""
        if split != "test":
            raise TaskError(
                f"task {self.name!r} is the harness' own and has only the questions that it "
                f"reports, none for {split!r}; name another task's questions as fitted_on, or "
                f"leave out what needs them"
            )
        return [example for _, _, example in self._examples]

    def asked(self, limit: int | None, seed: int, num_fewshot: int | None) -> HarnessTask:
        """Return the task with the questions that are asked, and as many worked examples."""
        drawn, shots = choose(self._examples, limit, seed), []
        places: dict[str, list[int]] = {}
        for leaf, place, _ in drawn:
            places.setdefault(leaf, []).append(place)
        for leaf in places:
            shots.append(self._shots[leaf] if num_fewshot is None else num_fewshot)
            self.tasks[leaf].set_config("num_fewshot", shots[-1])
        [first, *_] = self.tasks.values()
        return HarnessTask(
            name=self.name,
            harness_name=self.name,
            leaves={leaf: len(own) for leaf, own in places.items()},
            metric=self.metric,
            filter=first._filters[0].name,
            kind=self.kind,  # type: ignore[arg-type]
            examples=tuple(example for *_, example in drawn),
            num_fewshot=max(shots),
            notes=("asked as lm-evaluation-harness has it, on the questions that it reports",),
            places=places,
        )

    def _example(self, leaf: str, place: int, doc: Mapping[str, Any]) -> Example:
        """Return a question as far as results show it."""
        task, own_id = self.tasks[leaf], f"{leaf}-{place}"
        text, target = task.doc_to_text(doc), task.doc_to_target(doc)
        if self.kind == "generated":
            first = target[0] if isinstance(target, list) and target else target
            return Example(id=own_id, task=self.name, question=str(text), answer=str(first))
        choices = tuple(map(str, task.doc_to_choice(doc)))
        [gold, *_] = golds_of(task, doc) or [0]
        question = str(target if task.multiple_input else text)
        return with_options(question, choices, gold, own_id, self.name)


def golds_of(task: Any, doc: Mapping[str, Any]) -> list[int]:
    """Return which options of a question are right by the harness; none where none of them is."""
    gold, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
    if task.multiple_input:
        gold = task.doc_to_text(doc)
    found = gold if isinstance(gold, list) else [gold]
    places = [choices.index(one) if one in choices else one for one in found]
    return [one for one in places if isinstance(one, int) and 0 <= one < len(choices)]


_of_the_harness = functools.cache(TaskManager)
"""Its own tasks; to list them it reads thousands of files, which takes seconds."""


def _loaded(name: str) -> dict[str, Any]:
    """Return the harness' tasks that a name stands for, with their questions."""
    with quiet("lm_eval", "huggingface_hub", "datasets"), redirect_stderr(io.StringIO()):
        if name.endswith(".yaml") and (file := Path(name)).is_file():
            # All of its folder, since a group there names its neighbours; and by its name there,
            # since a group that is loaded by its path has its list of tasks for a name.
            manager = TaskManager(include_path=file.parent, include_defaults=False)
            places = {str(each.yaml_path): own for own, each in manager.task_index.items()}
            name = places.get(str(file), name)
        elif name not in (manager := _of_the_harness()).task_index:
            raise TaskError(
                f"{nearest_name('task', name, {*task_names(), *manager.task_index})}; 'drllm ls "
                f"tasks' and 'drllm lm-eval ls tasks' list all; of others, write the questions "
                f"to a .jsonl file of your own, or a .yaml task file"
            )
        unreached = (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError)
        try:
            found: dict[str, Any] = manager.load(name)["tasks"]
        except unreached as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise TaskError(
                f"task {name!r} of the harness can't be had ({cause.rstrip('.')}); connect or log "
                f"in (hf auth login), or name a file of questions"
            ) from error
    return found
