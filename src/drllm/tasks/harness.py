"""Tasks of lm-evaluation-harness by its own names, or by a task file: its documents and prompts.

The harness is loaded where such a task is named, and not before.
"""

import functools
import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from drllm.errors import TaskError, nearest_name
from drllm.listener import quiet
from drllm.records.splits import hash_of, question_key, split_of
from drllm.tasks.base import (
    OPTIONS_REWARD,
    Example,
    Prompt,
    Task,
    check_split,
    name_for_harness,
    with_options,
)

FEWSHOT_SEED = 1234  # the harness' own, so that its command line draws the same worked examples
KINDS = {"multiple_choice": "choices", "generate_until": "generated"}
"""What the harness asks of a model, of which we take these."""
PREFERRED = ("acc", "exact_match")
"""Metrics that count where a task has them; else its first one does."""
MOST_DRAWS = 10  # of worked examples, until the question itself isn't among them
GENERATED_REWARDS = ("exact", "boxed")
MAX_NEW_TOKENS = 256
"""Of a generated answer where the task doesn't say it; the harness' own default."""


class StockTask(Task):
    """A task of the harness, or all of a group or of a task file, by what its `--tasks` takes.

    Its `test` are the questions that the harness reports. The others are its training questions or,
    without any, its validation questions where these aren't reported, by the hash of their texts:
    those with one right answer that aren't reported too. Where it has neither, the reported ones
    are divided so, and an evaluation of what may be made on some of them asks `test` alone. All are
    asked as the harness has it, worked examples too.

    Its name is what the harness' `--tasks` takes; an unknown one may be near to a `taken` one. A
    task whose questions can't be fetched is a TaskError, as is one that neither scores options nor
    generates answers.
    """

    def __init__(self, name: str, taken: tuple[str, ...] = ()) -> None:
        self.tasks = loaded(name, taken)
        self.name = name_for_harness(name.removesuffix(".yaml").split("/")[-1])
        self.description = f"{name} of lm-evaluation-harness"
        self.shots_of = {leaf: task.config.num_fewshot or 0 for leaf, task in self.tasks.items()}
        kinds = {task.OUTPUT_TYPE for task in self.tasks.values()}
        metrics = [list(task.aggregation()) for task in self.tasks.values()]
        shared = [metric for metric in metrics[0] if all(metric in each for each in metrics)]
        wanted = "multiple_choice (options) or generate_until (answers) with a metric in common"
        if len(kinds) > 1 or not kinds <= KINDS.keys() or not shared:
            fit = [leaf for leaf, task in self.tasks.items() if task.OUTPUT_TYPE in KINDS]
            alone = f"; name one of {', '.join(fit)}" if fit and len(self.tasks) > 1 else ""
            raise TaskError(
                f"task {name!r} asks for {' and '.join(sorted(map(str, kinds)))}; drllm takes "
                f"tasks with {wanted}{alone}; 'drllm lm-eval run --model drllm' has the rest"
            )
        forbidden = ("UNSAFE_CODE", "MULTIMODAL")
        if any(getattr(task, each, False) for task in self.tasks.values() for each in forbidden):
            raise TaskError(f"task {name!r} runs code or shows images, which isn't done here")
        self.kind = KINDS[kinds.pop()]
        self.metric = next((metric for metric in PREFERRED if metric in shared), shared[0])
        self._unclear: set[str] = set()  # questions with no right answer, or options with several
        self.reported = [
            (leaf, place, self._example(leaf, f"{leaf}-{place}", doc))
            for leaf, task in self.tasks.items()
            for place, doc in enumerate(task.eval_docs)
        ]
        self._docs: dict[str, tuple[str, Mapping[str, Any]]] = {}

    @functools.cached_property
    def to_fit(self) -> list[Example]:
        """The questions that the harness doesn't report, each text once; empty without any."""
        found: dict[str, Example] = {}
        reported = {question_key(example.question) for *_, example in self.reported}
        for leaf, task in self.tasks.items():
            docs: Any = ()
            if task.has_training_docs():
                docs = task.training_docs()
            elif task.has_validation_docs() and task.has_test_docs():
                docs = task.validation_docs()
            for place, doc in enumerate(docs):
                example = self._example(leaf, f"{leaf}-train-{place}", doc)
                key = question_key(example.question)
                if key not in reported and found.setdefault(key, example) is example:
                    self._docs[example.id] = leaf, doc
        return [*found.values()]

    @property
    def reports_test_alone(self) -> bool:
        """Whether it has questions that aren't reported; else the reported ones are divided."""
        return bool(self.to_fit)

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split; see the class."""
        reported = [example for *_, example in self.reported]
        if check_split(split) == "test" and self.reports_test_alone:
            return reported
        origin, whole = ("train", self.to_fit) if self.reports_test_alone else ("own", reported)
        own = [example for example in whole if split_of(example.question, origin) == split]
        if split == "test":
            return own
        known = {question_key(each.question): each for each in own if each.id not in self._unclear}
        return [*known.values()]

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that fit: the options' log-probabilities, or how a text is graded."""
        return (OPTIONS_REWARD,) if self.kind == "choices" else GENERATED_REWARDS

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return how the harness asks a question; then, with options, scored by character.

        A question is never among its own worked examples, which depend on its text alone.
        """
        self.check_reward(reward)
        if example.id not in self._docs:
            for leaf, place, each in self.reported:
                self._docs[each.id] = leaf, self.tasks[leaf].eval_docs[place]
        leaf, doc = self._docs[example.id]
        task = self.tasks[leaf]
        if task.multiple_input:
            raise TaskError(
                f"task {self.name!r} asks a question in as many ways as it has options, which can "
                f"be evaluated, but not searched or tuned on"
            )
        own, prefix = str(task.doc_to_text(doc)), task.doc_to_prefix(doc)
        for draw in range(1, MOST_DRAWS + 2):
            task.set_fewshot_seed(seed=FEWSHOT_SEED + hash_of(example.question) + draw)
            # At last without any, where the question is among them however they are drawn.
            number = self.shots_of[leaf] if draw <= MOST_DRAWS else 0
            context = task.fewshot_context(doc, num_fewshot=number, gen_prefix=prefix)
            if context.count(own) == 1:
                break
        if self.kind == "choices":
            requests = task.construct_requests(doc=doc, ctx=context, metadata=(leaf, 0, 1))
            asked = Prompt(
                text=context,
                reward=reward,
                answer=example.answer,
                continuations=tuple(each.args[1] for each in requests[: len(example.choices)]),
                gold=example.gold,
            )
            return asked, replace(asked, normalised=True)
        settings = task.config.generation_kwargs or {}
        most = settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS))
        answer = Prompt(
            text=context,
            reward=reward,
            answer=example.answer,
            other_answers=example.other_answers,
            max_new_tokens=int(most),
        )
        return (answer,)

    def _example(self, leaf: str, own_id: str, doc: Mapping[str, Any]) -> Example:
        """Return a question as far as results show it."""
        task = self.tasks[leaf]
        text, target = task.doc_to_text(doc), task.doc_to_target(doc)
        if self.kind == "generated":
            named = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else ()
            given = target if isinstance(target, list) else [target]
            answers = [str(named[one] if named and isinstance(one, int) else one) for one in given]
            first, *others = answers or [""]
            self._unclear |= set() if first else {own_id}
            return Example(
                id=own_id,
                task=self.name,
                question=str(text),
                answer=first,
                other_answers=tuple(others),
            )
        choices = tuple(map(str, task.doc_to_choice(doc)))
        golds = golds_of(task, doc)
        self._unclear |= set() if len(golds) == 1 else {own_id}
        [gold, *_] = golds or [0]
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


@functools.cache
def _of_the_harness() -> Any:
    """Return its own tasks; to list them it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def loaded(name: str, taken: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the harness' tasks that a name stands for, with their questions."""
    import datasets
    from lm_eval.tasks import TaskManager

    with quiet("lm_eval", "huggingface_hub", "datasets"), redirect_stderr(io.StringIO()):
        if name.endswith(".yaml") and not (file := Path(name)).is_file():
            raise TaskError(f"there is no task file {name}; give one, or the name of a task")
        if name.endswith(".yaml"):
            # All of its folder, since a group there names its neighbours; and by its name there,
            # since a group that is loaded by its path has its list of tasks for a name.
            manager = TaskManager(include_path=file.parent, include_defaults=False)
            places = {str(each.yaml_path): own for own, each in manager.task_index.items()}
            name = places.get(str(file), name)
        elif name not in (manager := _of_the_harness()).task_index:
            raise TaskError(
                f"{nearest_name('task', name, {*taken, *manager.task_index})}; 'drllm ls "
                f"tasks' and 'drllm lm-eval ls tasks' list all; of others, give a .jsonl file, or "
                f"OWNER/NAME of the hub"
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
