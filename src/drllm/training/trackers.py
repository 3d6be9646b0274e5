"""Reports a training to experiment trackers, through accelerate.

A training is one run in each tracker, and a resumed training resumes that run. Trackers only
listen: the weights don't depend on them.
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

PROJECT = "drllm"
FOLDER = "trackers"
RUN_FILE = "trackers.json"
"""Names the run that an unfinished training reports to. The file is deleted with the checkpoint."""
WANDB = "wandb"
TENSORBOARD = "tensorboard"


class _Run(msgspec.Struct, frozen=True):
    """The content of `RUN_FILE`."""

    id: str


@dataclass(kw_only=True)
class _Options:
    """How a tracker is started.

    Attributes:
        run_name: What the tracker calls the run.
        arguments: Further arguments of the tracker's class.
        failures: Errors that the tracker raises if it can't start.
        has_config: Whether the run has its config already, or gets it from the arguments.
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
    """Log lines of metrics in all trackers, under the names `split/metric` and `epoch`."""
    values = {}
    for row in rows:
        for name, value in row.items():
            if name == "split" or value is None:
                continue
            full_name = "epoch" if name == "epoch" else f"{row['split']}/{name}"
            values[full_name] = value
    for tracker in trackers:
        tracker.log(dict(values), step=step)


@contextmanager
def run_trackers(names: Sequence[str], trainer: Trainer, output: Path) -> Iterator[Sequence[Any]]:
    """Start trackers in the routers' folder, or resume the runs of an unfinished training."""
    if not names:
        yield ()
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log through it
    run_file = output / RUN_FILE
    is_resumed = trainer.epochs_done > 0 and run_file.exists()
    if not is_resumed:
        write_json(run_file, _Run(id=uuid.uuid4().hex[:12]))
    run = read_json(run_file, _Run)
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    trackers: list[Any] = []
    try:
        trackers.extend(_start(name, folder, run.id, trainer) for name in names)
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


def _start(name: str, folder: Path, run_id: str, trainer: Trainer) -> Any:
    """Start one tracker at the training's step, with the settings as its run's config."""
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
            f"--report-to {name} can't start: {' '.join(str(error).split())}; mend that (for W&B: "
            f"wandb login, or WANDB_MODE=offline), or leave it out"
        ) from error
    return tracker


def _choose_options(
    name: str, folder: Path, run_id: str, trainer: Trainer, config: dict[str, Any]
) -> _Options:
    """Return how a tracker is started."""
    if name == WANDB:
        import wandb

        arguments = _wandb_arguments(folder, run_id, config)
        return _Options(arguments=arguments, failures=(OSError, wandb.Error), has_config=True)
    if name == TENSORBOARD:
        # Steps after the last checkpoint are purged: they will be logged again, or belong to
        # another training.
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
        "reinit": "create_new",  # beside a run that the caller may have open
        "settings": {"console": "off"},  # W&B doesn't capture printed text and progress bars
    }
