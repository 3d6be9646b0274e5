"""`shrink.json` of `drllm shrink`: the models, what they gain and lose, and which was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from drllm.records.places import resolve
from drllm.records.results import Header, read_result_file
from drllm.statistics.differences import Verdict
from drllm.statistics.exclusion import Limits, Trial
from drllm.statistics.power import round_up
from drllm.statistics.ranges import Amount, Count, Share

SHRINK_SCHEMA = "drllm.shrink"
SHRINK_FILE = "shrink.json"
WORK_ENDING = ".work"  # the folder of the work is named like the output, with this ending
FULL = "full"
TRAINED = "full, trained alike"
OTHER_TEXT = "other text"
DEMO_FILE = "demo.json"


class TaskResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model on the held-out questions of a task.

    Attributes:
        accuracy: By the measure that decides.
        measure: Its name; `acc_norm` divides the log-probability of an option by its characters.
        other: The accuracy by other measures.
        against_full: The model minus the full model; None for the full model itself.
    """

    accuracy: Share
    measure: str
    other: dict[str, float] = {}
    against_full: Verdict | None = None


class LossResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The loss of held-out answers or texts, in nats a token; `against_full` as in `TaskResult`."""

    loss: float
    against_full: Verdict | None = None


class ModelResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model of the table.

    Attributes:
        name: `full`, `full, trained alike`, or the number of layers.
        layers: The layers that it keeps, as numbers of the full model's layers.
        num_bytes: The size of its weights.
        tasks: Task → its answers.
        losses: Task or source → the loss of its held-out answers or texts.
        pooled: The model minus the full model on all questions together.
        against_trained: The model minus the full model trained alike, on all questions together.
        speed: How many times as fast as the full model it is.
        draws: How many questions were drawn to learn from.
        repairs: The repairs that were kept.
    """

    name: str
    layers: tuple[Count, ...]
    num_bytes: Count
    tasks: dict[str, TaskResult] = {}
    losses: dict[str, LossResult] = {}
    pooled: Verdict | None = None
    against_trained: Verdict | None = None
    speed: Amount | None = None
    draws: Count = 0
    repairs: tuple[str, ...] = ()


class ShrinkRecord(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of `drllm shrink`.

    Attributes:
        counts: Task or source → how many questions or texts are fitted on, checked on and held out.
        runtime: Device and precision.
        limits: The losses that must be excluded; None if the number of layers was given.
        models: The full model, the full model trained alike if it was measured, then the candidates
            from the most layers to the fewest.
        trials: The tests of the candidates up to the first that failed.
        chosen: The name of the model to write; None if none passed.
        is_forced: Whether it was written although it didn't pass (`--force`).
        files: The tasks and sources that are files, of which a quarter is held out.
        notes: What a reader must know, as sentences.
    """

    counts: dict[str, tuple[Count, Count, Count]]
    runtime: dict[str, Any]
    limits: Limits | None = None
    models: tuple[ModelResult, ...]
    trials: tuple[Trial, ...] = ()
    chosen: str | None = None
    is_forced: bool = False
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def full(self) -> ModelResult:
        """The full model."""
        return self.models[0]

    @property
    def candidates(self) -> list[ModelResult]:
        """The shortened models, in the order in which they are tested."""
        return [model for model in self.models[1:] if model.name != TRAINED]

    @property
    def fallback(self) -> ModelResult:
        """The model that `--force` writes if none passed: the one whose test failed."""
        names = [trial.name for trial in self.trials]
        return self.find(names[-1]) if names else self.candidates[0]

    def find(self, name: str) -> ModelResult:
        """Return a model by its name."""
        return next(model for model in self.models if model.name == name)

    @property
    def verdict(self) -> str:
        """What to do with it and what is shown, in at most three sentences.

        It begins with OK, with NOT SHOWN if a loss beyond the limits isn't excluded, or with NO if
        such a loss is shown.
        """
        model = self.fallback if self.chosen is None else self.find(self.chosen)
        size = f"{len(model.layers)} of {len(self.full.layers)} layers"
        gain = model.pooled is not None and model.pooled.is_better is True
        passed = self.chosen is not None and not self.is_forced
        label = "OK: " if passed and self.limits is not None else ""
        if passed and gain:
            assert model.pooled is not None
            low, high = map(model.pooled.write, model.pooled.interval)
            size_of_gain = model.pooled.write(model.pooled.mean).removeprefix("+")
            first = (
                f"{label}{size} answer {size_of_gain} points more than the full model (95 %: {low} "
                f"to {high})."
            )
            second = self._compare_trained(model)
        elif self.limits is None:
            changes = []
            if model.pooled is not None:
                changes.append(f"accuracy {model.pooled.details}")
            for name, result in model.losses.items():
                if name != OTHER_TEXT and result.against_full is not None:
                    changes.append(f"loss of {name} {result.against_full.details}")
            first = f"{size}, as requested: {'; '.join(changes)}."
            second = ""
        elif passed:
            first = f"{label}{size} lose less than {self._write_limits()} (95 %)."
            second = ""
            if model.pooled is not None:
                low, high = map(model.pooled.write, model.pooled.interval)
                second = f"Accuracy changes by {low} to {high} points."
        else:
            trial = self.trials[-1]
            label = "NO" if any(test.loses for test in trial.tasks) else "NOT SHOWN"
            first = f"{label}: {size}: {trial.reason()}."
            second = f"Nothing was written; --force writes these {len(model.layers)} layers."
            if self.is_forced:
                second = "It was written all the same (--force)."
            elif trial.needed is not None:
                rows = round_up(trial.needed)
                if all(test.task in self.files for test in trial.failed):
                    rows = round_up(4 * trial.needed)
                second = (
                    f"About {rows:,} questions in all would probably show it; nothing was written "
                    f"(--force writes it)."
                )
        return " ".join(filter(None, [first, second, self._describe_other_text(model)]))

    def _compare_trained(self, model: ModelResult) -> str:
        """Say what the full model trained alike reaches, since the gain is from the training."""
        if model.against_trained is None:
            return (
                "The gain is from training; the full model trained alike wasn't measured "
                "(--compare-trained)."
            )
        low, high = map(model.against_trained.write, model.against_trained.interval)
        return (
            f"The gain is from training: beside the full model trained alike it is "
            f"{model.against_trained.write(model.against_trained.mean)} points ({low} to {high})."
        )

    def _describe_other_text(self, model: ModelResult) -> str:
        """Say what text of other kinds loses."""
        if OTHER_TEXT not in model.losses:
            return ""
        before = self.full.losses[OTHER_TEXT].loss
        after = model.losses[OTHER_TEXT].loss
        return (
            f"It answers questions of this kind; the next-token loss of other text goes from "
            f"{before:.2f} to {after:.2f} nats."
        )

    def _write_limits(self) -> str:
        """Say which losses are excluded."""
        assert self.limits is not None
        parts = []
        if self.full.tasks:
            parts.append(f"{self.limits.max_drop:g} points of accuracy")
        if any(name != OTHER_TEXT for name in self.full.losses):
            parts.append(f"{self.limits.max_loss_increase:g} nats a token")
        return " and ".join(parts)

    def list_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the table of the models: its columns and its rows."""
        columns = ["layers", "MB"]
        for name, result in self.full.tasks.items():
            columns.append(f"{name}, %")
            columns += [f"{measure}, %" for measure in result.other]
        columns += [f"loss of {name}" for name in self.full.losses]
        columns += ["speed", "result"]
        passed = {trial.name: trial.passed for trial in self.trials}
        rows = []
        for model in self.models:
            name = TRAINED if model.name == TRAINED else str(len(model.layers))
            cells = [name, f"{model.num_bytes / 1e6:,.0f}"]
            for task in model.tasks.values():
                cells.append(f"{100 * task.accuracy:.1f}{_write_interval(task.against_full)}")
                cells += [f"{100 * value:.1f}" for value in task.other.values()]
            for loss in model.losses.values():
                cells.append(f"{loss.loss:.3f}{_write_interval(loss.against_full)}")
            cells.append("–" if model.speed is None else f"{model.speed:.2f}×")
            outcome = ""
            if model.name == self.chosen:
                outcome = "written"
            elif model.name in passed:
                outcome = "passed" if passed[model.name] else "not passed"
            elif model in self.candidates:
                outcome = "not tested"
            rows.append([*cells, outcome])
        return columns, rows

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        columns, rows = self.list_rows()
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _write_interval(verdict: Verdict | None) -> str:
    """Write the interval of a difference in brackets; empty without one."""
    if verdict is None:
        return ""
    low, high = map(verdict.write, verdict.interval)
    return f" ({low} to {high})"


class DemoRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model after one step of the demo.

    Attributes:
        name: The step.
        num_layers: Its number of layers.
        accuracy: On the held-out questions, by characters.
        against_full: This minus the full model's; None for the full model itself.
        text_loss: The next-token loss of other text, in nats a token.
    """

    name: str
    num_layers: int
    accuracy: float
    against_full: Verdict | None
    text_loss: float


class DemoResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the demo found: the layers that it left out, and a row for each step."""

    skip: tuple[Count, ...]
    rows: tuple[DemoRow, ...]

    @property
    def verdict(self) -> str:
        """What the last step shows, in two sentences."""
        full = self.rows[0]
        last = self.rows[-1]
        assert last.against_full is not None
        low, high = map(last.against_full.write, last.against_full.interval)
        return (
            f"{last.num_layers} of {full.num_layers} layers, refitted and taught for a minute, "
            f"answer {last.against_full.write(last.against_full.mean)} points of "
            f"{last.against_full.n} held-out questions beside the full model (95 %: {low} to "
            f"{high}); a gain is from training. The next-token loss of other text goes from "
            f"{full.text_loss:.2f} to {last.text_loss:.2f} nats."
        )


def find_work_folder(output: Path) -> Path:
    """Return the folder of the work, beside the output."""
    place = resolve(output)
    return place.with_name(place.name + WORK_ENDING)


def read_shrink(file: Path) -> ShrinkRecord:
    """Read a `shrink.json`; raise a RecordError if that fails."""
    return read_result_file(file, ShrinkRecord, SHRINK_SCHEMA)
