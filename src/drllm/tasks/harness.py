"""Tasks of lm-evaluation-harness ("the harness"), by their names or by a task file.

A name may stand for several of the harness' tasks. These tasks are called leaves here, and a row of
a leaf is called a doc, as in the harness. The harness is imported only when a user names one of its
tasks.
"""

import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from drllm.errors import TaskError
from drllm.records.splits import find_split, hash_text, question_key
from drllm.tasks.base import Task, check_split, name_for_harness
from drllm.tasks.examples import OPTIONS_REWARD, Example, Prompt, with_options
from drllm.tasks.harness_names import explain_unknown_name, refuse_unknown_name
from drllm.work.listener import quiet

FEWSHOT_SEED = 1234  # the harness' default, so that its command line draws the same examples
KINDS = {"multiple_choice": "choices", "generate_until": "generated"}
"""The supported kinds of the harness' tasks → our names of these kinds."""
UNSUPPORTED = ("UNSAFE_CODE", "MULTIMODAL")
"""Attributes of the harness' tasks that are true if a task runs code or shows images."""
PREFERRED_METRICS = ("acc", "exact_match")
"""Metrics to report if a task has them; else the task's first metric is reported."""
MAX_DRAWS = 10  # maximum attempts to draw worked examples without the question itself
GENERATED_REWARDS = ("exact", "boxed")
MAX_NEW_TOKENS = 256
"""Maximum tokens of a generated answer if the task has no limit; the harness' default."""


class LmEvalTask(Task):
    """A task of the harness, or all tasks of a group or of a task file.

    The questions that the harness reports are in `test`. The other splits share the unreported
    questions; a hash of the text decides the split. The unreported questions are the training
    questions of the task. If there are none, they are its validation questions, unless the harness
    reports these. Questions that are also reported are left out, and so are questions that don't
    have exactly one right answer.

    If there are no unreported questions, all splits share the reported questions. Paths or routers
    that were made on the other splits are then evaluated only on the questions of `test`.

    All prompts, including worked examples, are the harness' own.

    Args:
        name: A name that the harness' `--tasks` accepts.
        known_names: Names of our own tasks, for the suggestion in an error.

    Raises:
        TaskError: The name is unknown, questions can't be fetched, or the task's kind isn't
            supported.
    """

    def __init__(self, name: str, known_names: tuple[str, ...] = ()) -> None:
        self.tasks = load_harness_tasks(name, known_names)
        self.name = name_harness_task(name)
        self.description = f"{name} of lm-evaluation-harness"
        # Leaf → number of worked examples.
        self.num_shots = {leaf: task.config.num_fewshot or 0 for leaf, task in self.tasks.items()}
        self.kind, self.metric = _choose_kind_and_metric(name, self.tasks)
        self._unclear: set[str] = set()  # ids of questions without exactly one right answer
        self._docs: dict[str, tuple[str, Mapping[str, Any]]] = {}  # id → leaf and doc
        # The leaf of each reported question, the place of its doc in `eval_docs`, and the question.
        self.reported: list[tuple[str, int, Example]] = []
        for leaf, task in self.tasks.items():
            for place, doc in enumerate(task.eval_docs):
                example = self._make_example(leaf, f"{leaf}-{place}", doc)
                self.reported.append((leaf, place, example))

    @functools.cached_property
    def unreported(self) -> list[Example]:
        """The questions that the harness doesn't report, each text once; it may be empty."""
        reported = {question_key(example.question) for *_, example in self.reported}
        examples: dict[str, Example] = {}
        for leaf, task in self.tasks.items():
            for place, doc in enumerate(_read_unreported_docs(task)):
                example = self._make_example(leaf, f"{leaf}-train-{place}", doc)
                key = question_key(example.question)
                if key in reported or key in examples:
                    continue
                examples[key] = example
                self._docs[example.id] = (leaf, doc)
        return list(examples.values())

    @property
    def has_only_test(self) -> bool:
        """Whether there are unreported questions; else all splits share the reported questions."""
        return bool(self.unreported)

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split; the class says what is in each split."""
        check_split(split)
        reported = [example for *_, example in self.reported]
        if self.has_only_test:
            if split == "test":
                return reported
            origin = "train"
            pool = self.unreported
        else:
            origin = "own"
            pool = reported
        examples = [example for example in pool if find_split(example.question, origin) == split]
        if split == "test":
            return examples
        by_key: dict[str, Example] = {}  # keeps each text once
        for example in examples:
            if example.id not in self._unclear:
                by_key[question_key(example.question)] = example
        return list(by_key.values())

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that fit the task: for options, or for generated answers."""
        if self.kind == "choices":
            return (OPTIONS_REWARD,)
        return GENERATED_REWARDS

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the harness' prompt of a question; for options, also with scores by character.

        The worked examples depend only on the question's text, and never include the question.
        """
        self.check_reward(reward)
        leaf, doc = self._find_doc(example)
        task = self.tasks[leaf]
        if task.multiple_input:
            raise TaskError(
                f"task {self.name!r} has a prompt for each option, so it can be evaluated, but not "
                f"searched or learned from"
            )
        context = self._render_context(leaf, doc, example)
        if self.kind == "choices":
            requests = task.construct_requests(doc=doc, ctx=context, metadata=(leaf, 0, 1))
            # Further requests score the options without the question, for other metrics.
            requests = requests[: len(example.choices)]
            prompt = Prompt(
                text=context,
                reward=reward,
                answer=example.answer,
                continuations=tuple(request.args[1] for request in requests),
                gold=example.gold,
            )
            return prompt, replace(prompt, normalised=True)
        settings = task.config.generation_kwargs or {}
        limit = settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS))
        prompt = Prompt(
            text=context,
            reward=reward,
            answer=example.answer,
            other_answers=example.other_answers,
            max_new_tokens=int(limit),
        )
        return (prompt,)

    def _find_doc(self, example: Example) -> tuple[str, Mapping[str, Any]]:
        """Return the leaf and the doc of a question."""
        if example.id not in self._docs:
            for leaf, place, reported in self.reported:
                self._docs[reported.id] = (leaf, self.tasks[leaf].eval_docs[place])
        return self._docs[example.id]

    def _render_context(self, leaf: str, doc: Mapping[str, Any], example: Example) -> str:
        """Render a question after worked examples, none of which is the question itself."""
        task = self.tasks[leaf]
        text = str(task.doc_to_text(doc))
        prefix = task.doc_to_prefix(doc)
        seed = FEWSHOT_SEED + hash_text(example.question)
        context = ""
        for draw in range(1, MAX_DRAWS + 1):
            task.set_fewshot_seed(seed=seed + draw)
            num_shots = self.num_shots[leaf]
            context = task.fewshot_context(doc, num_fewshot=num_shots, gen_prefix=prefix)
            if context.count(text) == 1:  # only at the end
                return str(context)
        # Every draw has the question as a worked example, so use no worked examples.
        return str(task.fewshot_context(doc, num_fewshot=0, gen_prefix=prefix))

    def _make_example(self, leaf: str, example_id: str, doc: Mapping[str, Any]) -> Example:
        """Make the question of a doc, with the fields that results show."""
        if self.kind == "generated":
            return self._make_generated_example(leaf, example_id, doc)
        task = self.tasks[leaf]
        choices = tuple(str(choice) for choice in task.doc_to_choice(doc))
        golds = find_gold_indices(task, doc)
        if len(golds) != 1:
            self._unclear.add(example_id)
        gold = golds[0] if golds else 0
        # A task with several inputs puts the options before the text, so the text is the target.
        text = task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc)
        return with_options(str(text), choices, gold, example_id, self.name)

    def _make_generated_example(
        self, leaf: str, example_id: str, doc: Mapping[str, Any]
    ) -> Example:
        """Make a question whose answer is generated; all targets of its doc are right answers."""
        task = self.tasks[leaf]
        choices: Sequence[str] = ()
        if task.config.doc_to_choice is not None:
            choices = task.doc_to_choice(doc)
        target = task.doc_to_target(doc)
        targets = target if isinstance(target, list) else [target]
        answers: list[str] = []
        for answer in targets:
            if choices and isinstance(answer, int):
                answer = choices[answer]
            answers.append(str(answer))
        first_answer = answers[0] if answers else ""
        if not first_answer:
            self._unclear.add(example_id)
        return Example(
            id=example_id,
            task=self.name,
            question=str(task.doc_to_text(doc)),
            answer=first_answer,
            other_answers=tuple(answers[1:]),
        )


def name_harness_task(name: str) -> str:
    """Return the name of the task that a name of the harness, or a task file, stands for."""
    return name_for_harness(name.removesuffix(".yaml").split("/")[-1])


def _choose_kind_and_metric(name: str, tasks: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of the leaves, `choices` or `generated`, and the metric that we report.

    Args:
        name: The name that the user wrote.
        tasks: The leaves of the name.

    Raises:
        TaskError: The kind of a leaf isn't supported, or the leaves differ in kind or share no
            metric.
    """
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    metrics = [list(task.aggregation()) for task in tasks.values()]
    shared = [metric for metric in metrics[0] if _is_in_all(metric, metrics)]
    if len(kinds) > 1 or not kinds <= KINDS.keys() or not shared:
        usable = [leaf for leaf, task in tasks.items() if task.OUTPUT_TYPE in KINDS]
        remedy = ""
        if usable and len(tasks) > 1:
            remedy = f"; name one of {', '.join(usable)}"
        raise TaskError(
            f"task {name!r} is of kind {' and '.join(sorted(map(str, kinds)))}; drllm takes tasks "
            f"of kind multiple_choice (options) or generate_until (answers) that have a metric in "
            f"common{remedy}; 'drllm lm-eval run --model drllm' takes every task"
        )
    for task in tasks.values():
        if any(getattr(task, attribute, False) for attribute in UNSUPPORTED):
            raise TaskError(f"task {name!r} runs code or shows images, which drllm doesn't do")
    preferred = [metric for metric in PREFERRED_METRICS if metric in shared]
    metric = preferred[0] if preferred else shared[0]
    return KINDS[kinds.pop()], metric


def _is_in_all(metric: str, lists: Sequence[Sequence[str]]) -> bool:
    return all(metric in metrics for metrics in lists)


def _read_unreported_docs(task: Any) -> Iterable[Mapping[str, Any]]:
    """Return the docs that the harness doesn't report: training docs, else validation docs.

    The harness reports the validation docs of a task without test docs.
    """
    docs: Iterable[Mapping[str, Any]] = ()
    if task.has_training_docs():
        docs = task.training_docs()
    elif task.has_validation_docs() and task.has_test_docs():
        docs = task.validation_docs()
    return docs


def find_gold_indices(task: Any, doc: Mapping[str, Any]) -> list[int]:
    """Return the indices of the options that the harness counts as right; there may be none.

    A task of the harness gives the index or the text of an option, or a list of them. In a task
    with several inputs, `doc_to_text` returns the index and `doc_to_target` the question's text.
    """
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    indices: list[int] = []
    for index in golds:
        if index in choices:
            index = choices.index(index)
        if isinstance(index, int) and 0 <= index < len(choices):
            indices.append(index)
    return indices


@functools.cache
def _own_tasks() -> Any:
    """Return the manager of the harness' own tasks; it reads thousands of files, for seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_harness_tasks(name: str, known_names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Load the leaves of a name, with their docs.

    Args:
        name: A task, a group, or a `.yaml` file.
        known_names: Names of our own tasks, for the suggestion in an error.

    Raises:
        TaskError: The name is unknown, or the docs can't be fetched.
    """
    if not name.endswith(".yaml"):
        refuse_unknown_name(name, known_names)

    import datasets

    with quiet("lm_eval", "huggingface_hub", "datasets"), redirect_stderr(io.StringIO()):
        manager, name = _find_task(name, known_names)
        unreachable = (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError)
        try:
            tasks: dict[str, Any] = manager.load(name)["tasks"]
        except unreachable as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise TaskError(
                f"task {name!r} of the harness can't be loaded ({cause.rstrip('.')}); connect or "
                f"log in (hf auth login), or name a file of questions"
            ) from error
    return tasks


def _find_task(name: str, known_names: tuple[str, ...]) -> tuple[Any, str]:
    """Return the harness' manager that has a task, and the task's name in it."""
    from lm_eval.tasks import TaskManager

    if name.endswith(".yaml"):
        file = Path(name)
        if not file.is_file():
            raise TaskError(f"there is no task file {name}; give one, or the name of a task")
        # The whole folder is included, since the file of a group names other files of the folder.
        # The task is loaded by its name: if a group were loaded by its path, the harness would name
        # it after its list of tasks.
        manager = TaskManager(include_path=file.parent, include_defaults=False)
        names_by_file = {
            str(entry.yaml_path): entry_name for entry_name, entry in manager.task_index.items()
        }
        return manager, names_by_file.get(str(file), name)
    manager = _own_tasks()
    if name not in manager.task_index:
        raise TaskError(explain_unknown_name(name, {*known_names, *manager.task_index}))
    return manager, name
