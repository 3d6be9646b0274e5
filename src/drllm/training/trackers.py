"""Report the metrics of a training to experiment trackers such as W&B, through accelerate.

A training is one run in each tracker. A training that is resumed resumes this run. Trackers never
change the weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from drllm.errors import ConfigError, unknown_name
from drllm.extras import EXTRAS, need
from drllm.records.codec import read_json, write_json

if TYPE_CHECKING:
    from drllm.training.trainer import Trainer

PROJECT = "drllm"  # the name of the project in trackers
FOLDER = "trackers"  # folder in the routers' folder for the trackers' files
RUN_FILE = "trackers.json"
"""File in the routers' folder with the id of the run. It is deleted when the training has ended."""
WANDB = "wandb"
TENSORBOARD = "tensorboard"


class _Run(msgspec.Struct, frozen=True):
    """The content of `RUN_FILE`."""

    id: str


@dataclass(kw_only=True)
class _Options:
    """How a tracker is started.

    Attributes:
        run_name: The first argument of the tracker's class. Its meaning depends on the tracker: the
            name of a project or of a run.
        arguments: Further arguments of the tracker's class.
        failures: Errors that the tracker raises if it can't start.
        has_config: Whether the run has the training's settings without our storing them.
    """

    run_name: str = PROJECT
    arguments: dict[str, Any] = field(default_factory=dict)
    failures: tuple[type[Exception], ...] = (OSError,)
    has_config: bool = False


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate doesn't know or whose package isn't installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError("--report-to: " + unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS))
        if name in installed:
            continue
        if name in EXTRAS["trackers"]:
            need("trackers", f"--report-to {name}", name)
        raise ConfigError(
            f"--report-to is {name}, but the package of that tracker isn't installed; "
            f"pip install {name}, or leave it out"
        )


def log_rows(trackers: Sequence[Any], rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Log lines of `metrics.jsonl` in all trackers, under names such as `train/loss`.

    Args:
        trackers: The trackers.
        rows: The lines. The name of a metric is preceded by the line's `split`, except for `epoch`.
        step: Number of finished steps.
    """
    values = {}
    for row in rows:
        for name, value in row.items():
            if name == "split" or value is None:
                continue
            full_name = f"{row['split']}/{name}"
            if name == "epoch":
                full_name = name
            values[full_name] = value
    for tracker in trackers:
        tracker.log(dict(values), step=step)


@contextmanager
def run_trackers(names: Sequence[str], trainer: Trainer, output: Path) -> Iterator[Sequence[Any]]:
    """Start trackers for a `with` block and yield them, or resume an unfinished training's runs.

    Args:
        names: Names of the trackers; without names nothing is started.
        trainer: The trainer, restored if the training is resumed.
        output: The routers' folder.
    """
    if not names:
        yield ()
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers can't log without this object
    run_file = output / RUN_FILE
    is_resumed = trainer.epochs_done > 0 and run_file.exists()
    if not is_resumed:
        write_json(run_file, _Run(id=uuid.uuid4().hex[:12]))
    run = read_json(run_file, _Run)
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    trackers: list[Any] = []
    try:
        for name in names:
            tracker = _start_tracker(name, folder, run.id, trainer)
            trackers.append(tracker)  # in the list at once, so that `finally` finishes it
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


def _start_tracker(name: str, folder: Path, run_id: str, trainer: Trainer) -> Any:
    """Start one tracker, and store the training's settings as the config of its run."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    settings = trainer.config.decisive()
    config = {key: value for key, value in settings.items() if value is not None}
    options = _choose_options(name, folder, run_id, trainer, config)
    if tracker_class.requires_logging_directory:
        options.arguments["logging_dir"] = str(folder)
    try:
        tracker = tracker_class(options.run_name, **options.arguments)
        if hasattr(tracker, "start"):  # trackers of older versions start when they are made
            tracker.start()
        if not options.has_config:
            tracker.store_init_configuration(config)
    except options.failures as error:
        raise ConfigError(
            f"--report-to {name} can't start: {' '.join(str(error).split())}; fix that (for W&B: "
            f"wandb login, or WANDB_MODE=offline), or leave it out"
        ) from error
    return tracker


def _choose_options(
    name: str, folder: Path, run_id: str, trainer: Trainer, config: dict[str, Any]
) -> _Options:
    """Return how a tracker is started.

    Args:
        name: The tracker's name.
        folder: The folder for its files.
        run_id: The id of the run.
        trainer: The trainer.
        config: The training's settings.
    """
    if name == WANDB:
        import wandb

        arguments = _wandb_arguments(folder, run_id, config)
        return _Options(arguments=arguments, failures=(OSError, wandb.Error), has_config=True)
    if name == TENSORBOARD:
        # Steps after the last checkpoint are deleted from the log. They will be logged again, or
        # they belong to an earlier training in this folder.
        return _Options(
            run_name=name,
            arguments={"purge_step": trainer.steps_done + 1},
            has_config=trainer.epochs_done > 0,
        )
    return _Options()


def _wandb_arguments(folder: Path, run_id: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": run_id,
        "resume": "allow",
        "name": folder.parent.resolve().name,
        "dir": str(folder),
        "config": config,
        "reinit": "create_new",  # the caller may have a run of W&B open, which stays open
        "settings": {"console": "off"},  # printed text and progress bars aren't uploaded
    }
