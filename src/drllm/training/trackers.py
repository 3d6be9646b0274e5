"""Reporting a training to experiment trackers, through accelerate.

A training is one run of each tracker, and resumes it after a kill. A tracker only listens; no
weight depends on one.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, unknown_name
from drllm.metrics import JUDGED, Counts, baselines, ratios
from drllm.records import write_atomically
from drllm.training.trainer import Trainer, count_labels

logger = logging.getLogger(__name__)

PROJECT = "drllm"
FOLDER = "trackers"
RUN_FILE = "trackers.json"
"""Which run of the trackers an unfinished training reports to; it goes away with the checkpoint."""
WANDB, TENSORBOARD = "wandb", "tensorboard"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate doesn't know or whose package isn't there.

    Raises:
        ConfigError: Naming the tracker, and what to give or install instead.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError("--report-to: " + unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS))
        if name not in installed:
            extra = name in (WANDB, TENSORBOARD)
            package = "'drllm[trackers]'" if extra else name
            raise ConfigError(
                f"--report-to is {name}, but the package of that tracker isn't installed; "
                f"pip install {package}, or leave it out"
            )


class Tracking:
    """A training that trackers are told of.

    Args:
        trainer: The training.
        trackers: Started ones of accelerate; without any, nothing is told.
    """

    def __init__(self, trainer: Trainer, trackers: Sequence[Any]) -> None:
        self.trainer, self.trackers = trainer, trackers

    def step(self, done: int, counts: Counts) -> None:
        """Tell of a step: how many are done with it, and what it counted before it learned."""
        if self.trackers:
            rate = self.trainer.schedule.rate(done - 1)
            self._tell(_named("step/", {**ratios(counts), "learning_rate": rate}), done)

    def epoch(self) -> None:
        """Tell of the epoch that was made last."""
        number = self.trainer.epochs_done
        told: dict[str, Any] = {"epoch": number}
        for row in self.trainer.rows[-2:]:
            if row["epoch"] == number:
                values = {k: v for k, v in row.items() if k not in ("epoch", "split")}
                told |= _named(f"{row['split']}/", values)
        self._tell(told, number * self.trainer.steps_per_epoch)

    def _tell(self, values: Mapping[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)


@contextmanager
def tracked(names: Sequence[str], trainer: Trainer, output: Path) -> Iterator[Tracking]:
    """Start trackers, or resume their runs with an unfinished training, for a block.

    Args:
        names: Of trackers that `check_trackers` has let pass.
        trainer: The training, at its beginning or where it resumes.
        output: The routers' folder, which keeps what trackers write here.

    Raises:
        ConfigError: A tracker that isn't able to start.
    """
    if not names:
        yield Tracking(trainer, [])
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log through it
    path = output / RUN_FILE
    known: dict[str, Any] = {}
    if trainer.epochs_done and path.exists():  # without a checkpoint there is nothing to resume
        known = json.loads(path.read_text(encoding="utf-8"))
    identity, before = known.get("id", uuid.uuid4().hex[:12]), known.get("trackers", [])
    write_atomically(path, json.dumps({"id": identity, "trackers": [*{*before, *names}]}) + "\n")
    place, config = output / FOLDER, _config(trainer)
    place.mkdir(exist_ok=True)
    steps = trainer.epochs_done * trainer.steps_per_epoch
    started: list[Any] = []
    try:
        started.extend(
            _start(name, place, identity, config, steps, name in before) for name in names
        )
        yield Tracking(trainer, started)
    finally:
        for tracker in started:
            tracker.finish()


def forget(output: Path) -> None:
    """Delete what an unfinished training needs to resume its trackers' runs: it is complete."""
    (output / RUN_FILE).unlink(missing_ok=True)


def _start(
    name: str,
    place: Path,
    identity: str,
    config: Mapping[str, Any],
    steps: int,
    resumes: bool,
) -> Any:
    """Start one tracker at a step, with the settings as its run's config."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    failures: tuple[type[Exception], ...] = (OSError,)
    arguments: dict[str, Any] = {}
    run_name = PROJECT
    if name == WANDB:
        import wandb

        failures = (OSError, wandb.Error)
        arguments = {
            "id": identity,
            "resume": "allow",
            "name": place.parent.resolve().name,
            "dir": str(place),
            "config": dict(config),
            "reinit": "create_new",  # beside a run that the caller may have open
            "settings": {"console": "off"},  # what is printed, progress bars too, stays ours
        }
    elif name == TENSORBOARD:
        # What was told after the last checkpoint is told again, or was another training's.
        run_name, arguments = name, {"purge_step": steps + 1}
    if kind.requires_logging_directory:
        arguments["logging_dir"] = str(place)
    try:
        tracker = kind(run_name, **arguments)
        if hasattr(tracker, "start"):  # older versions start when they are made
            tracker.start()
        if name != WANDB and not (resumes and name == TENSORBOARD):
            tracker.store_init_configuration(dict(config))
    except failures as error:
        raise ConfigError(
            f"--report-to {name} can't start: {' '.join(str(error).split())}; mend that (for W&B: "
            f"wandb login, or WANDB_MODE=offline), or leave it out"
        ) from error
    if steps:
        _say_whether_it_resumes(name, tracker, steps, resumes)
    return tracker


def _say_whether_it_resumes(name: str, tracker: Any, steps: int, resumes: bool) -> None:
    """Warn if a resumed training isn't one run of the tracker from first step to last."""
    if not resumes:
        logger.warning("%s wasn't told of the first %d steps of this training", name, steps)
    elif name == WANDB and tracker.tracker.offline:
        logger.warning(
            "wandb is offline and keeps the steps from %d on in a folder of their own, under the "
            "same run id %s; sync both folders",
            steps + 1,
            tracker.tracker.id,
        )
    elif name not in (WANDB, TENSORBOARD):
        logger.warning("%s starts another run, from step %d on", name, steps + 1)


def _config(trainer: Trainer) -> dict[str, Any]:
    """Return settings and baselines as flat values."""
    found = trainer.config.decisive()
    judged = trainer.examples.labels[trainer.held_out or trainer.trained]
    for system, counts in baselines(count_labels(judged), trainer.label_counts).items():
        scores = ratios(counts)
        found |= {f"baselines/{system}/{key}": scores[key] for key, _ in JUDGED}
    return {name: value for name, value in found.items() if value is not None}


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put a prefix before the names; values that aren't defined are left out."""
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}
