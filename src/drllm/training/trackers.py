"""Reporting a training to experiment trackers, through accelerate.

A training is one run of each tracker, and resumes it after a kill. A tracker only listens; no
weight depends on one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from drllm.errors import ConfigError, unknown_name
from drllm.extras import EXTRAS, need
from drllm.records.codec import read_json, write_json

if TYPE_CHECKING:
    from drllm.training.trainer import Trainer

PROJECT = "drllm"
FOLDER = "trackers"
RUN_FILE = "trackers.json"
"""Which run of the trackers an unfinished training reports to; it goes away with the checkpoint."""
WANDB, TENSORBOARD = "wandb", "tensorboard"


class _Run(msgspec.Struct, frozen=True):
    id: str


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


def tell(trackers: Sequence[Any], rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Tell trackers of lines of metrics; an epoch belongs to no `split`."""
    values = {
        name if name == "epoch" else f"{row['split']}/{name}": value
        for row in rows
        for name, value in row.items()
        if name != "split" and value is not None
    }
    for tracker in trackers:
        tracker.log(dict(values), step=step)


@contextmanager
def tracked(names: Sequence[str], trainer: Trainer, output: Path) -> Iterator[Sequence[Any]]:
    """Start trackers, or resume an unfinished training's runs, in the routers' folder."""
    if not names:
        yield ()
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log through it
    path, place = output / RUN_FILE, output / FOLDER
    if not trainer.epochs_done or not path.exists():  # without a checkpoint nothing is resumed
        write_json(path, _Run(id=uuid.uuid4().hex[:12]))
    run = read_json(path, _Run)
    place.mkdir(exist_ok=True)
    started: list[Any] = []
    try:
        started.extend(_start(name, place, run.id, trainer) for name in names)
        yield started
    finally:
        for tracker in started:
            tracker.finish()


def _start(name: str, place: Path, run_id: str, trainer: Trainer) -> Any:
    """Start one tracker where the training is, with the settings as its run's config."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    config = {key: value for key, value in trainer.config.decisive().items() if value is not None}
    failures: tuple[type[Exception], ...] = (OSError,)
    arguments: dict[str, Any] = {}
    run_name = PROJECT
    if name == WANDB:
        import wandb

        failures = (OSError, wandb.Error)
        arguments = {
            "id": run_id,
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
        if name != WANDB and not (name == TENSORBOARD and trainer.epochs_done):
            tracker.store_init_configuration(config)
    except failures as error:
        raise ConfigError(
            f"--report-to {name} can't start: {' '.join(str(error).split())}; mend that (for W&B: "
            f"wandb login, or WANDB_MODE=offline), or leave it out"
        ) from error
    return tracker
