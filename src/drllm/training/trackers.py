"""Telling experiment trackers of a training, through accelerate.

Owns which names are known, what is told under which names, and what a tracker needs to go on with
its run after a kill. One run of a tracker stands for one training, however many runs of ours are
trained together: their metrics have their folder's name before them. A tracker only listens; no
weight depends on one. Leaves what is counted to `fit` and the trackers' servers to them.

Axes: R runs.
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
from drllm.training.fit import Fit
from drllm.training.plans import count_labels

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
        fit: The training.
        prefixes: `[R]`: what stands before the names of each run's metrics.
        trackers: Started ones of accelerate; without any, nothing is told.
    """

    def __init__(self, fit: Fit, prefixes: Sequence[str], trackers: Sequence[Any]) -> None:
        self.fit, self.prefixes, self.trackers = fit, prefixes, trackers
        self.steps_per_epoch = max(plan.steps_per_epoch for plan in fit.plans)

    def step(self, step: int, counts: Mapping[int, Counts]) -> None:
        """Tell of a step within an epoch.

        Args:
            step: Which of the epoch's, from 0.
            counts: By run, of the rows that it learnt from, before it did.
        """
        if not self.trackers:
            return
        told: dict[str, Any] = {}
        for run, counted in counts.items():
            plan, prefix = self.fit.plans[run], self.prefixes[run]
            rate = plan.schedule.rate(self.fit.epochs_done * plan.steps_per_epoch + step)
            told |= _named(f"{prefix}step/", {**ratios(counted), "learning_rate": rate})
        self._tell(told, self.fit.epochs_done * self.steps_per_epoch + step + 1)

    def epoch(self) -> None:
        """Tell of the epoch that was made last."""
        number = self.fit.epochs_done
        told: dict[str, Any] = {"epoch": number}
        for prefix, rows in zip(self.prefixes, self.fit.rows, strict=True):
            for row in rows[-2:]:
                if row["epoch"] == number:
                    values = {k: v for k, v in row.items() if k not in ("epoch", "split")}
                    told |= _named(f"{prefix}{row['split']}/", values)
        self._tell(told, number * self.steps_per_epoch)

    def _tell(self, values: Mapping[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)


@contextmanager
def tracked(names: Sequence[str], fit: Fit, outputs: Sequence[Path]) -> Iterator[Tracking]:
    """Start trackers, or let them go on with an unfinished training, and end them with the block.

    Args:
        names: Of trackers that `check_trackers` has let pass; none for a training of which nobody
            is told.
        fit: The training, at its beginning or where it goes on.
        outputs: `[R]`: the runs' folders; the first one keeps what trackers write here.

    Raises:
        ConfigError: A tracker that isn't able to start.
    """
    prefixes = _prefixes(outputs)
    if not names:
        yield Tracking(fit, prefixes, [])
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log through it
    path = outputs[0] / RUN_FILE
    known: dict[str, Any] = {}
    if fit.epochs_done and path.exists():  # without a checkpoint there is nothing to go on with
        known = json.loads(path.read_text(encoding="utf-8"))
    identity, before = known.get("id", uuid.uuid4().hex[:12]), known.get("trackers", [])
    write_atomically(path, json.dumps({"id": identity, "trackers": [*{*before, *names}]}) + "\n")
    place, config = outputs[0] / FOLDER, _config(fit, prefixes)
    place.mkdir(exist_ok=True)
    tracking = Tracking(fit, prefixes, started := [])
    try:
        for name in names:
            goes_on = name in before
            started.append(_start(name, place, identity, config, tracking, goes_on))
        yield tracking
    finally:
        for tracker in started:
            tracker.finish()


def forget(output: Path) -> None:
    """Delete what an unfinished training needs to go on with its trackers: it is complete."""
    (output / RUN_FILE).unlink(missing_ok=True)


def _start(
    name: str,
    place: Path,
    identity: str,
    config: Mapping[str, Any],
    tracking: Tracking,
    goes_on: bool,
) -> Any:
    """Start one tracker, with the settings as its run's config."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    steps = tracking.fit.epochs_done * tracking.steps_per_epoch
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
        if name != WANDB and not (goes_on and name == TENSORBOARD):
            tracker.store_init_configuration(dict(config))
    except failures as error:
        raise ConfigError(
            f"--report-to {name} can't start: {' '.join(str(error).split())}; mend that (for W&B: "
            f"wandb login, or WANDB_MODE=offline), or leave it out"
        ) from error
    if steps:
        _say_whether_it_goes_on(name, tracker, steps, goes_on)
    return tracker


def _say_whether_it_goes_on(name: str, tracker: Any, steps: int, goes_on: bool) -> None:
    """Say where a resumed training isn't one run of the tracker from its first step to its last."""
    if not goes_on:
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


def _prefixes(outputs: Sequence[Path]) -> list[str]:
    """Return what stands before each run's metrics: nothing for one, else its folder's name."""
    if len(outputs) == 1:
        return [""]
    names = [output.name for output in outputs]
    if len(set(names)) < len(names):
        names = [output.as_posix() for output in outputs]
    return [f"{name}/" for name in names]


def _config(fit: Fit, prefixes: Sequence[str]) -> dict[str, Any]:
    """Return settings and baselines as flat values; what all runs share has no prefix."""
    settings = [plan.config.decisive() for plan in fit.plans]
    shared = {
        name: value
        for name, value in settings[0].items()
        if all(other[name] == value for other in settings)
    }
    found = dict(shared)
    for plan, own, prefix in zip(fit.plans, settings, prefixes, strict=True):
        found |= {f"{prefix}{name}": v for name, v in own.items() if name not in shared}
        judged = fit.reader.examples.labels[plan.held_out or plan.trained]
        for system, counts in baselines(count_labels(judged), plan.label_counts).items():
            scores = ratios(counts)
            found |= {f"{prefix}baselines/{system}/{key}": scores[key] for key, _ in JUDGED}
    return {name: value for name, value in found.items() if value is not None}


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put a prefix before the names; values that aren't defined are left out."""
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}
