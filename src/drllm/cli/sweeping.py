"""`drllm sweep`: many settings of supervision and training, judged by their routed models.

Owns the sweep file and the order of things: one search for all settings; targets, routers and an
evaluation on `select` for each; the choice; one evaluation of what was chosen on the split that is
reported. Leaves a setting's stages to `run_folder`, and the rule of the choice to `reporting`.

    OUT/search.jsonl          one search
    OUT/settings/NAME/        a run folder for each setting, evaluated on `select`
    OUT/test/                 what was chosen, evaluated once
    OUT/sweep.json, sweep.png
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from drllm.cli.recipe import Recipe, parse_recipe
from drllm.cli.run_folder import IN_A_FOLDER, Loader, Run, find_recipe, folder_of
from drllm.cli.show_results import show_results
from drllm.cli.show_sweep import show_sweep
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import EvaluateConfig
from drllm.config.files import read_yaml, with_underscores
from drllm.errors import ConfigError, unknown_name
from drllm.evaluation.questions import tasks_of
from drllm.records import sha256, write_atomically, write_json
from drllm.records.places import check_folder
from drllm.reporting.sweeps import (
    SWEEP_FILE,
    Candidate,
    SweepResult,
    choose,
    drawn,
    read_candidate,
)
from drllm.tasks.base import get_tasks

SWEPT = ("supervise", "train")
"""Sections that a setting may change."""
FOR_CHOICE = ("limit", "limits", "num_texts")
"""Settings of the evaluation that may differ where settings are judged."""
CHOSEN_ON = "select"


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        common: The recipe without any setting's changes.
        settings: By name, the recipe with them.
        choosing: How each setting is evaluated.
    """

    common: Recipe
    settings: Mapping[str, Recipe]
    choosing: EvaluateConfig


def read_sweep(path: Path, folder: Path, data_dir: str | None = None) -> Sweep:
    """Read and check a sweep file: a recipe with a section `settings`, and maybe one `choose`.

    Args:
        path: YAML; `settings` has, by name, the sections `supervise` and `train` as far as they
            differ from the file's own, `choose` what differs from `evaluate` where settings are
            judged.
        folder: Where the sweep is written.
        data_dir: Replaces `data_dir` of search and evaluation.

    Raises:
        ConfigError: What is no sweep, or settings that don't fit; two that are the same.
    """
    values = dict(read_yaml(path, "a sweep"))
    settings = values.pop("settings", None)
    if not isinstance(settings, dict) or len(settings) < 2:
        raise ConfigError(
            f"{path}: 'settings' is {settings!r}; give at least two settings to compare, by name"
        )
    choose = values.pop("choose", {})
    common = parse_recipe(path, values, folder, data_dir)
    choosing = parse_recipe(path, _to_choose(path, values, choose), folder, data_dir)
    if common.evaluate.curve is None:
        raise ConfigError(
            f"{path}: evaluate: a sweep compares at equal depths; give them as curve, for example "
            f"'0.05,0.1'"
        )
    for task in get_tasks(common.evaluate.tasks):
        if common.evaluate.split_of(task.name) == CHOSEN_ON:
            raise ConfigError(
                f"{path}: evaluate: {task.name}'s split is {CHOSEN_ON}, on which the setting is "
                f"chosen; leave it out or give test"
            )
    recipes = {
        _checked(path, str(name)): parse_recipe(
            path, _changed(path, str(name), values, changes), folder, data_dir
        )
        for name, changes in settings.items()
    }
    seen: dict[tuple[Any, Any], str] = {}
    for name, recipe in recipes.items():
        other = seen.setdefault((recipe.supervise, recipe.train), name)
        if other != name:
            raise ConfigError(
                f"{path}: settings {other!r} and {name!r} are the same; leave one out"
            )
    return Sweep(common, recipes, for_choice(choosing.evaluate))


def _checked(path: Path, name: str) -> str:
    if not re.fullmatch(r"[\w.-]*\w", name):
        raise ConfigError(
            f"{path}: a setting is named {name!r}; give a name of letters, digits, '-', '_' and '.'"
        )
    return name


def _changed(path: Path, name: str, values: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Return a recipe's values with those of a setting in their place."""
    if not isinstance(changes, dict):
        raise ConfigError(
            f"{path}: setting {name!r} is {changes!r}; give sections with what differs, {{}} for "
            f"nothing"
        )
    changed = dict(values)
    for section, settings in changes.items():
        if section not in SWEPT:
            raise ConfigError(
                f"{path}: setting {name!r}: " + unknown_name("section", str(section), SWEPT)
            )
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{path}: setting {name!r}: {section} is {settings!r}; give settings, written "
                f"'name: value'"
            )
        changed[section] = _merged(values, section, settings)
    return changed


def _merged(values: Mapping[str, Any], section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with other settings in the place of its own."""
    return {**with_underscores(values.get(section) or {}), **with_underscores(settings)}


def _to_choose(path: Path, values: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Return a recipe's values with those in their place that settings are judged by."""
    if not isinstance(changes, dict):
        raise ConfigError(
            f"{path}: section 'choose' is {changes!r}; give settings, written 'name: value'"
        )
    for name in with_underscores(changes):
        if name not in FOR_CHOICE:
            raise ConfigError(f"{path}: choose: " + unknown_name("setting", name, FOR_CHOICE))
    return {**values, "evaluate": _merged(values, "evaluate", changes)}


def for_choice(config: EvaluateConfig) -> EvaluateConfig:
    """Return how each setting is evaluated: the routed model alone, at every depth, on `select`."""
    return dataclasses.replace(
        config,
        split=CHOSEN_ON,
        splits=None,
        baselines="none",
        search=None,
        supervision=None,
        epsilon=None,
        worked_answers=None,
        max_loss_increase=None,
        num_random_draws=None,
        latency_rounds=0,
    )


@verb(
    "sweep",
    help="train with many settings, choose one on the select split, test it once",
    example="drllm sweep sweeps/demo --output-dir runs/sweep",
    flags=(
        Flag(
            "sweep",
            "YAML file, or the name of a sweep of ours: a recipe, and under 'settings' what "
            "differs from it",
            required=True,
            positional=True,
        ),
        *IN_A_FOLDER,
    ),
    resumes=True,
)
def sweep(request: Request, terminal: Terminal) -> None:
    """Carry out a sweep, print its table, and the test of what was chosen.

    Raises:
        ConfigError: The file or the folder can't be used; nothing has been written then.
        RecordError: The folder holds files that can't be trusted, or a setting has no targets.
    """
    path = find_recipe(request.path("sweep"))
    folder = folder_of(request, path)
    swept = read_sweep(path, folder, request.values["data_dir"])
    tasks = swept.common.tasks()
    chosen_on = {**tasks, "evaluate": tasks_of(swept.choosing)}
    for recipe in swept.settings.values():
        recipe.check(tasks["search"])
    check_folder(folder, "--output-dir")
    with ExitStack() as stack:
        load = Loader(swept.common.model, terminal, stack)
        Run(swept.common, tasks, folder, terminal, load).carry_out(["search"])
        candidates = []
        for number, (name, setting) in enumerate(swept.settings.items(), start=1):
            terminal.note(f"setting {number} of {len(swept.settings)}: {name}")
            place = folder / "settings" / name
            recipe = dataclasses.replace(setting, evaluate=swept.choosing)
            run = Run(recipe, chosen_on, place, terminal, load, {"search": folder})
            run.carry_out(["supervise", "train", "evaluate"])
            candidates.append(read_candidate(name, place / "eval"))
        chosen = choose(candidates)
        _write(folder, path, candidates, chosen)
        show_sweep(folder / SWEEP_FILE, terminal)
        if chosen is None:
            return
        place = folder / "settings" / chosen.name
        shared = {"search": folder, "supervise": place, "train": place}
        best = swept.settings[chosen.name]
        run = Run(best, tasks, folder / "test", terminal, load, shared)
        run.carry_out(["evaluate", "report"])
    show_results(folder / "test" / "eval", terminal)
    terminal.say(f"report         {folder / 'test' / 'report.html'}")


def _write(
    folder: Path, path: Path, candidates: Sequence[Candidate], chosen: Candidate | None
) -> None:
    from drllm.reporting.drawing import png

    found = SweepResult(
        sweep=path.name,
        sweep_sha256=sha256(path),
        chosen_on=CHOSEN_ON,
        chosen=None if chosen is None else chosen.name,
        settings=tuple(candidates),
    )
    write_json(folder / SWEEP_FILE, found)
    if any(candidate.places for candidate in candidates):
        write_atomically(folder / "sweep.png", png(partial(drawn, candidates)))
