"""Reporting a training to experiment trackers, through accelerate.

A training is one run of each tracker, and resumes it after a kill. A tracker only listens; no
weight depends on one.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from drllm.errors import ConfigError, unknown_name
from drllm.extras import EXTRAS, need
from drllm.metrics import JUDGED, Counts, baselines, ratios
from drllm.records.codec import read_json, write_json
from drllm.supervision.summary import class_counts
from drllm.training.trainer import Trainer

PROJECT = "drllm"
FOLDER = "trackers"
RUN_FILE = "trackers.json"
"""Which run of the trackers an unfinished training reports to; it goes away with the checkpoint."""
WANDB, TENSORBOARD = "wandb", "tensorboard"


class _Run(msgspec.Struct, frozen=True):
    id: str
    trackers: list[str]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate doesn't know or whose package isn't there."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError("--report-to: " + unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS))
        if name not in installed:
            if name in EXTRAS["trackers"]:
                need("trackers", f"--report-to {name}", name)
            raise ConfigError(
                f"--report-to is {name}, but the package of that tracker isn't installed; "
                f"pip install {name}, or leave it out"
            )


class Tracking:
    """A training that started trackers are told of; without any, nothing is told."""

    def __init__(self, trainer: Trainer, trackers: Sequence[Any]) -> None:
        self.trainer, self.trackers = trainer, trackers

    def step(self, done: int, counts: Counts) -> None:
        """Tell of a step: how many are done with it, and what it counted before it learned."""
        if self.trackers:
            rate = self.trainer.rate(done - 1)
            self._tell({"step": {**ratios(counts), "learning_rate": rate}}, done)

    def epoch(self) -> None:
        """Tell of the epoch that was made last."""
        number = self.trainer.epochs_done
        lines = [dict(row) for row in self.trainer.rows[-2:] if row["epoch"] == number]
        told = {line.pop("split"): line for line in lines}
        self._tell(told, number * self.trainer.steps_per_epoch)

    def _tell(self, told: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Tell of values by part, without those that aren't defined; an epoch belongs to none."""
        values = {
            name if name == "epoch" else f"{part}/{name}": value
            for part, found in told.items()
            for name, value in found.items()
            if value is not None
        }
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)


@contextmanager
def tracked(names: Sequence[str], trainer: Trainer, output: Path) -> Iterator[Tracking]:
    """Start trackers, or resume an unfinished training's runs, in the routers' folder."""
    if not names:
        yield Tracking(trainer, [])
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log through it
    path, place = output / RUN_FILE, output / FOLDER
    run = _Run(id=uuid.uuid4().hex[:12], trackers=[])
    if trainer.epochs_done and path.exists():  # without a checkpoint there is nothing to resume
        run = read_json(path, _Run)
    write_json(path, _Run(id=run.id, trackers=sorted({*run.trackers, *names})))
    place.mkdir(exist_ok=True)
    started: list[Any] = []
    try:
        started.extend(_start(name, place, run, trainer) for name in names)
        yield Tracking(trainer, started)
    finally:
        for tracker in started:
            tracker.finish()


def _start(name: str, place: Path, run: _Run, trainer: Trainer) -> Any:
    """Start one tracker where the training is, with the settings as its run's config."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, config = LOGGER_TYPE_TO_CLASS[name], _config(trainer)
    failures: tuple[type[Exception], ...] = (OSError,)
    arguments: dict[str, Any] = {}
    run_name = PROJECT
    if name == WANDB:
        import wandb

        failures = (OSError, wandb.Error)
        arguments = {
            "id": run.id,
            "resume": "allow",
            "name": place.parent.resolve().name,
            "dir": str(place),
            "config": config,
            "reinit": "create_new",  # beside a run that the caller may have open
            "settings": {"console": "off"},  # what is printed, progress bars too, stays ours
        }
    elif name == TENSORBOARD:
        # What was told after the last checkpoint is told again, or was another training's.
        steps = trainer.epochs_done * trainer.steps_per_epoch
        run_name, arguments = name, {"purge_step": steps + 1}
    if kind.requires_logging_directory:
        arguments["logging_dir"] = str(place)
    try:
        tracker = kind(run_name, **arguments)
        if hasattr(tracker, "start"):  # older versions start when they are made
            tracker.start()
        if name != WANDB and not (name == TENSORBOARD and name in run.trackers):
            tracker.store_init_configuration(config)
    except failures as error:
        raise ConfigError(
            f"--report-to {name} can't start: {' '.join(str(error).split())}; mend that (for W&B: "
            f"wandb login, or WANDB_MODE=offline), or leave it out"
        ) from error
    return tracker


def _config(trainer: Trainer) -> dict[str, Any]:
    found = trainer.config.decisive()
    judged = trainer.examples.labels[trainer.held_out or trainer.trained]
    for system, counts in baselines(class_counts(judged.tolist()), trainer.label_counts).items():
        scores = ratios(counts)
        found |= {f"baselines/{system}/{key}": scores[key] for key, _ in JUDGED}
    return {name: value for name, value in found.items() if value is not None}
