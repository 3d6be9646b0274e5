"""Measures the full model and shorter paths on what `shrink` has held out.

Accuracy is that of the held-out questions, by `evaluate`. Text loss is measured on the same
questions and on the held-out texts. Size and speed are those of the checkpoint that a path becomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from drllm.config import EvaluateConfig, ShrinkConfig
from drllm.evaluation.stage import evaluate
from drllm.model.layers import find_layers
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import install_path
from drllm.paths import StaticPath
from drllm.pipeline.shrink_speed import MAX_SECONDS, measure_speeds
from drllm.pipeline.shrink_time import TimedListener
from drllm.records.healed import HealedPath
from drllm.records.results import Evaluation
from drllm.records.shrink import ShrunkModel, TaskScores, TextScores
from drllm.records.static_paths import FULL, TEST, load_path
from drllm.statistics.verdicts import judge_means
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.heal_checks import measure_text_losses
from drllm.tuning.heal_texts import Tokens
from drllm.work.listener import Listener

NUM_TEXTS = 400  # maximum held-out questions whose text's loss is measured
TEXTS_AT_ONCE = 16  # held-out texts that are measured together


@dataclass(frozen=True)
class ModelMeasurement:
    """Measures models on held-out questions and texts.

    Attributes:
        base: The full model.
        tasks: The tasks whose held-out questions have right answers, with their questions.
        held_out: Name of a source → its held-out texts, as tokens.
        config: The settings.
        listener: Receives progress and notes.
    """

    base: BaseModel
    tasks: Sequence[TaskSplits]
    held_out: Mapping[str, Sequence[Tokens]]
    config: ShrinkConfig
    listener: Listener

    def measure(self, folders: Mapping[str, Path], eval_folder: Path) -> tuple[ShrunkModel, ...]:
        """Measure the full model, then each healed path.

        Args:
            folders: Name of a path → the folder of the healed path.
            eval_folder: The folder for the records of the evaluation.
        """
        routed = RoutedModel(self.base.model, tokenizer=self.base.tokenizer)
        try:
            paths = {FULL: StaticPath(range(self.base.num_layers))}
            records = {}
            for name, folder in folders.items():
                path_file = load_path(folder)
                assert isinstance(path_file.record, HealedPath)
                records[name] = path_file.record
                paths[name] = install_path(routed.injection, path_file)
            losses = self.measure_losses(routed, paths)
            plain_paths = {name: path.with_adapter("") for name, path in paths.items()}
            with self.listener.busy(f"measuring time, about {MAX_SECONDS:g} s"):
                speeds = measure_speeds(routed, plain_paths)
        finally:
            routed.detach()
        # The longest work comes last: a run that is killed before it ends has little to repeat.
        evaluations = self.evaluate_tasks(folders, eval_folder)
        models = []
        for name, path in paths.items():
            model = ShrunkModel(
                name=name,
                layers=path.layers,
                num_bytes=self.count_bytes(path),
                tasks=_read_task_scores(evaluations, name),
                texts=self.compare_losses(losses, name),
                speed=speeds[name],
                repair="" if name == FULL else records[name].describe_repair(),
            )
            models.append(model)
        return tuple(models)

    def evaluate_tasks(self, folders: Mapping[str, Path], eval_folder: Path) -> list[Evaluation]:
        """Evaluate the healed paths on the held-out questions of the tasks."""
        if not self.tasks:
            return []
        config = EvaluateConfig(
            data_dir=self.config.data_dir,
            baselines="none",
            num_texts=NUM_TEXTS,
            seed=self.config.seed,
        )
        paths = [str(folder) for folder in folders.values()]
        tasks = [splits.task for splits in self.tasks]
        num_questions = sum(len(splits.examples[TEST]) for splits in self.tasks)
        num_models = len(paths) + 1
        what = f"measuring {num_questions:,} questions with {num_models} models"
        listener = TimedListener(self.listener, what)
        results = evaluate(self.base, tasks, config, eval_folder, paths=paths, listener=listener)
        return list(results)

    def measure_losses(
        self, routed: RoutedModel, paths: Mapping[str, StaticPath]
    ) -> dict[str, dict[str, list[float]]]:
        """Return the loss of each held-out text of each source, along each path."""
        losses = {}
        for name, texts in self.held_out.items():
            what = f"measuring {len(texts):,} texts of {name} with {len(paths)} models"
            listener = TimedListener(self.listener, what)
            losses[name] = _measure_source(routed, paths, name, texts, listener)
        return losses

    def compare_losses(
        self, losses: Mapping[str, Mapping[str, list[float]]], name: str
    ) -> dict[str, TextScores]:
        """Return the losses of one model, by source, compared with the full model's."""
        scores = {}
        for source, by_path in losses.items():
            against_full = None
            if name != FULL:
                against_full = judge_means(
                    "text_loss", by_path[name], by_path[FULL], self.config.seed
                )
            scores[source] = TextScores(loss=fmean(by_path[name]), against_full=against_full)
        return scores

    def count_bytes(self, path: StaticPath) -> int:
        """Return the size of the weights of a model with the layers of a path."""
        base = self.base
        layers = find_layers(base.model)[1]
        total: int = sum(weight.nbytes for weight in base.model.parameters())
        for layer in set(range(base.num_layers)) - set(path.layers):
            total -= sum(weight.nbytes for weight in layers[layer].parameters())
        return total


def _measure_source(
    routed: RoutedModel,
    paths: Mapping[str, StaticPath],
    name: str,
    texts: Sequence[Tokens],
    listener: Listener,
) -> dict[str, list[float]]:
    """Return the loss of each text of one source, along each path."""
    losses: dict[str, list[float]] = {path: [] for path in paths}
    with listener.progress(f"measuring the loss of {name}", "texts") as on_progress:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            block = texts[start : start + TEXTS_AT_ONCE]
            measured = measure_text_losses(routed, paths, {name: block})
            for path, values in measured[name].by_path.items():
                losses[path] += values
            on_progress(start + len(block), len(texts))
    return losses


def _read_task_scores(evaluations: Sequence[Evaluation], name: str) -> dict[str, TaskScores]:
    """Return the scores of one model by task."""
    scores = {}
    for evaluation in evaluations:
        system = evaluation.base if name == FULL else evaluation.system(name)
        assert system is not None
        scores[evaluation.task] = TaskScores(
            accuracy=system.accuracy,
            text_loss=system.text_loss,
            against_full=system.against_base,
        )
    return scores
