"""`shrink.json` of `drllm shrink`: the candidates, what they lose, and which one was written."""

from pathlib import Path
from typing import Any

import msgspec

from drllm.records.places import resolve
from drllm.records.results import Header, read_result_file, refuse_duplicates
from drllm.records.static_paths import FULL
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.exclusion import Limits, Trial
from drllm.statistics.power import round_up
from drllm.statistics.ranges import Amount, Count, Share
from drllm.statistics.words import capitalize

SHRINK_SCHEMA = "drllm.shrink"
SHRINK_FILE = "shrink.json"
WORK_ENDING = ".work"  # the folder of the work is named like the output, with this ending


class TaskScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of a model on the held-out questions of a task.

    `against_full` is the model minus the full model; None for the full model itself.
    """

    accuracy: Share
    text_loss: float | None = None
    against_full: Differences | None = None


class TextScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The next-token loss of a model on held-out texts, in nats a token.

    `against_full` is the model minus the full model; None for the full model itself.
    """

    loss: float
    against_full: Verdict | None = None


class ShrunkModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model of the table: the full model, or one with fewer layers.

    Attributes:
        name: `full`, or the name of its path.
        layers: The layers that it keeps, as numbers of the full model's layers.
        num_bytes: The size of its weights.
        tasks: Task → its scores on held-out questions.
        texts: Name of a source of texts → its loss on held-out texts.
        speed: How many times as fast as the full model it is; None if it wasn't measured.
        repair: How it was repaired, in words.
    """

    name: str
    layers: tuple[Count, ...]
    num_bytes: Count
    tasks: dict[str, TaskScores] = {}
    texts: dict[str, TextScores] = {}
    speed: Amount | None = None
    repair: str = ""


class ShrinkRecord(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of `drllm shrink`.

    Attributes:
        tasks: The tasks whose questions decide.
        texts: The sources of texts whose loss decides, beside the texts of the questions.
        files: The tasks and sources of texts that are files, of which a quarter is held out.
        num_questions: Task → the number of its questions to find and heal paths with.
        num_held_out: Task or source of texts → the number of its held-out questions or texts.
        runtime: Device and precision.
        limits: The losses that must be excluded; None if the number of layers was given.
        models: The full model, then the candidates in the order in which they were tested: from
            the most layers to the fewest.
        trials: The tests of the candidates up to the first that failed.
        chosen: The name of the model to write; None if none is shown to lose less than the limits.
        is_forced: Whether the model was written although it wasn't shown (`--force`).
        questions_sha256: The hash of all questions and texts.
    """

    tasks: tuple[str, ...]
    texts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    num_questions: dict[str, Count]
    num_held_out: dict[str, Count]
    runtime: dict[str, Any]
    limits: Limits | None = None
    models: tuple[ShrunkModel, ...]
    trials: tuple[Trial, ...] = ()
    chosen: str | None = None
    is_forced: bool = False
    questions_sha256: str = ""

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(names) < 2 or names[0] != FULL:
            raise ValueError("'models' must have the full model first, then a candidate or more")
        refuse_duplicates("model", names)
        for model in self.candidates:
            if not set(model.layers) < set(self.full.layers):
                raise ValueError(f"'layers' of {model.name!r} aren't some of the full model's")
        mentioned = [trial.name for trial in self.trials]
        if self.chosen is not None:
            mentioned.append(self.chosen)
        for name in mentioned:
            if name not in names:
                raise ValueError(f"{name!r} is none of 'models'")
        if self.limits is not None and not self.trials:
            raise ValueError("'trials' is empty, although there are 'limits'")

    @property
    def full(self) -> ShrunkModel:
        """The full model."""
        return self.models[0]

    @property
    def candidates(self) -> tuple[ShrunkModel, ...]:
        """The models with fewer layers, in the order in which they were tested."""
        return self.models[1:]

    @property
    def written(self) -> ShrunkModel | None:
        """The model that was chosen, or that was written by force; None if there is none."""
        return None if self.chosen is None else self.find(self.chosen)

    @property
    def fallback(self) -> ShrunkModel:
        """The model that `--force` writes if none is shown: the one whose test failed."""
        names = [trial.name for trial in self.trials]
        name = names[-1] if names else self.candidates[0].name
        return self.find(name)

    def find(self, name: str) -> ShrunkModel:
        """Return a model by its name."""
        return next(model for model in self.models if model.name == name)

    @property
    def verdict(self) -> str:
        """What is shown, and what to do, in one to three sentences.

        It begins with OK, with NOT SHOWN if a loss beyond the limits isn't excluded, or with NO if
        such a loss is shown.
        """
        if self.limits is None:
            return self._describe_given_number()
        if self.chosen is not None and not self.is_forced:
            return (
                f"OK: {self._count(self.find(self.chosen))} lose less than {self._write_limits()}."
            )
        last = self.trials[-1]
        label = "NO" if any(test.loses for test in last.tasks) else "NOT SHOWN"
        reason = last.reason(self._name_held_out())
        sentences = [f"{label}: {self._count(self.fallback)}: {reason}."]
        remedy = self._describe_remedy()
        if remedy:
            sentences.append(f"{capitalize(remedy)}.")
        if self.is_forced:
            sentences.append("It was written all the same (--force).")
        else:
            layers = len(self.fallback.layers)
            sentences.append(f"Nothing was written; --force writes these {layers} layers.")
        return " ".join(sentences)

    def _describe_given_number(self) -> str:
        """Say what the model loses whose number of layers was given."""
        model = self.candidates[0]
        sentences = [f"{capitalize(self._count(model))}, as requested."]
        for task, scores in model.tasks.items():
            if scores.against_full is not None:
                sentences.append(f"On {task}: {scores.against_full.details}.")
        for source, text_scores in model.texts.items():
            if text_scores.against_full is not None:
                sentences.append(f"On {source}: {text_scores.against_full.statement()}")
        return " ".join(sentences)

    def _count(self, model: ShrunkModel) -> str:
        """Say how many of the layers a model keeps."""
        return f"{len(model.layers)} of {len(self.full.layers)} layers"

    def _describe_remedy(self) -> str:
        """Say how many questions would probably be enough; empty if no number would."""
        trial = self.trials[-1]
        remedy = trial.remedy("held-out questions")
        if trial.needed is None or not all(test.task in self.files for test in trial.failed):
            return remedy
        num_rows = 4 * trial.needed
        return f"{remedy}: four times as many in the file, {round_up(num_rows):,}"

    def _name_held_out(self) -> dict[str, str]:
        """Return what is held out of each task and source of texts, in words."""
        names = {task: f"held-out questions of {task}" for task in self.full.tasks}
        for source in self.full.texts:
            names[source] = f"held-out texts of {source}"
        return names

    def _write_limits(self) -> str:
        """Say which losses are excluded, and on which questions and texts."""
        assert self.limits is not None
        losses = []
        if self.full.tasks:
            losses.append(f"{self.limits.max_drop:g} points of accuracy")
        losses.append(f"{self.limits.max_loss_increase:g} nats a token of text")
        places = " and ".join(self._name_held_out().values())
        return f"{' and '.join(losses)} on {places} (95 %)"


def find_work_folder(output: Path) -> Path:
    """Return the folder of the work, beside the output."""
    place = resolve(output)
    return place.with_name(place.name + WORK_ENDING)


def read_shrink(file: Path) -> ShrinkRecord:
    """Read a `shrink.json`; raise a RecordError if that fails."""
    return read_result_file(file, ShrinkRecord, SHRINK_SCHEMA)
