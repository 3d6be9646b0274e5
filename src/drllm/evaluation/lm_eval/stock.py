"""Tasks of lm-evaluation-harness itself, by any name that it knows, asked as they stand there."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from drllm.errors import TaskError, nearest_name
from drllm.evaluation.lm_eval.folders import HarnessTask, name_for_harness
from drllm.listener import quiet
from drllm.tasks.base import Example, Task, choose, with_options
from drllm.tasks.registry import task_names

KINDS = {"multiple_choice": "choices", "generate_until": "generated"}
"""What the harness asks of a model, of which we evaluate these."""
PREFERRED = ("acc", "exact_match")
"""Metrics that count where a task has them; else its first one does."""


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
            raise TaskError(
                f"task {name!r} asks for {' and '.join(sorted(map(str, kinds)))}; 'evaluate' takes "
                f"{wanted}; 'drllm lm-eval run --model drllm' has the rest"
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

    def asked(
        self, limit: int | None, seed: int, num_fewshot: int | None
    ) -> tuple[HarnessTask, dict[str, list[int]]]:
        """Return the task, and by name of its parts which of their questions are asked."""
        drawn, shots = choose(self._examples, limit, seed), []
        places: dict[str, list[int]] = {}
        for leaf, place, _ in drawn:
            places.setdefault(leaf, []).append(place)
        for leaf in places:
            shots.append(self._shots[leaf] if num_fewshot is None else num_fewshot)
            self.tasks[leaf].set_config("num_fewshot", shots[-1])
        [first, *_] = self.tasks.values()
        written = HarnessTask(
            name=self.name,
            harness_name=self.name,
            leaves={leaf: len(own) for leaf, own in places.items()},
            metric=self.metric,
            filter=first._filters[0].name,
            kind=self.kind,  # type: ignore[arg-type]
            examples=tuple(example for *_, example in drawn),
            num_fewshot=max(shots),
            notes=("asked as lm-evaluation-harness has it, on the questions that it reports",),
        )
        return written, places

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


def _loaded(name: str) -> dict[str, Any]:
    """Return the harness' tasks that a name stands for, with their questions."""
    with quiet("lm_eval", "huggingface_hub", "datasets"), redirect_stderr(io.StringIO()):
        import datasets
        from lm_eval.tasks import TaskManager

        if name.endswith(".yaml") and Path(name).is_file():  # a group there names its neighbours
            manager = TaskManager(include_path=Path(name).parent, include_defaults=False)
        elif name not in (manager := TaskManager()).task_index:
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
