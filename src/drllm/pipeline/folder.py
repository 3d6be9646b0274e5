"""Runs the stages of a recipe in a run folder, and skips finished stages.

A stage is finished under two conditions. `run.manifest.json` records the same settings, questions,
input files and version that the stage would use now. And all files that the stage wrote are there
and unchanged. Each stage resumes its own unfinished work.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.evaluation.request import refuse_wrong_targets
from drllm.pipeline.manifest import RUN_FILE, StageState, read_run_manifest
from drllm.pipeline.model import open_model_lazily
from drllm.pipeline.recipes import Recipe
from drllm.pipeline.stages import RECIPE_FILE, STAGES, Run, make_stage
from drllm.records import codec
from drllm.records.places import check_folder, only_writer
from drllm.records.supervision import SUPERVISION_FILE
from drllm.work.listener import Listener, format_duration


def run_recipe(recipe: Recipe, folder: Path, listener: Listener) -> dict[str, str]:
    """Run the stages of a recipe in a folder, except finished ones.

    A wrong recipe, task, file or folder is refused before anything is written, and so is a folder
    in which another run works.

    Returns:
        The time of each stage in words, by the name of the stage.
    """
    recipe.check()
    check_folder(folder, "--output-dir")
    if not _makes_targets(recipe, folder):
        refuse_wrong_targets(recipe.evaluate)
    with (
        only_writer(folder, "run", "--output-dir"),
        open_model_lazily(recipe.model, listener) as load,
    ):
        run = Run(
            recipe=recipe,
            folder=folder,
            manifest=read_run_manifest(folder),
            load=load,
            listener=listener,
        )
        return _run_stages([name for name in STAGES if recipe.includes(name)], run)


def _makes_targets(recipe: Recipe, folder: Path) -> bool:
    """Tell whether the targets that the evaluation names are those that this run makes."""
    if recipe.evaluate.supervision is None or not recipe.has_routers:
        return False
    return Path(recipe.evaluate.supervision).resolve() == (folder / SUPERVISION_FILE).resolve()


def _run_stages(names: Sequence[str], run: Run) -> dict[str, str]:
    """Run the named stages in order, except finished ones; return the time of each in words."""
    times = {}
    for number, name in enumerate(names, start=1):
        was_done = _run_stage(name, run)
        if number == 1:  # the stage didn't refuse the folder
            _write_recipe(run)
        time_taken = format_duration(run.manifest.stages[name].seconds)
        times[name] = time_taken
        progress = time_taken
        if was_done:
            times[name] += ", already done"
            progress = "already done"
        run.listener.note(f"[{number}/{len(names)}] {name}: {progress}")
    return times


def _run_stage(name: str, run: Run) -> bool:
    """Run a stage unless it was finished before; return whether it was."""
    stage = make_stage(name, run)
    version = importlib.metadata.version("drllm")
    made_from = {"drllm_version": version, **stage.made_from}
    if run.manifest.is_done(name, made_from, run.folder):
        return True
    started = time.perf_counter()
    if stage.loads_model:
        run.load()  # a model that can't be loaded is refused before old results are deleted
    if name != "search":
        # The search checks the folder itself, and a folder that it refuses must not change.
        begin_stage(name, made_from, run)
    hashes = {}
    for path in stage.run():
        hashes[path.relative_to(run.folder).as_posix()] = codec.sha256(path)
    seconds = round(time.perf_counter() - started, 3)
    _record(name, StageState(made_from=made_from, outputs=hashes, seconds=seconds), run)
    return False


def _write_recipe(run: Run) -> None:
    """Write the recipe into the folder, unless the same recipe is there."""
    file = run.folder / RECIPE_FILE
    text = run.recipe.to_yaml()
    try:
        is_same = file.is_file() and file.read_bytes() == text.encode()
    except OSError as error:
        raise RecordError(f"{file} can't be read: {error.strerror}; delete it") from error
    if not is_same:
        codec.write_atomically(file, text)


def begin_stage(name: str, made_from: dict[str, Any], run: Run) -> None:
    """Record that a stage begins, and delete the files of its last run."""
    last_state = run.manifest.stages.get(name, StageState(made_from=made_from))
    if name == "train" and last_state.made_from != made_from:
        from drllm.training.stage import discard

        discard(run.routers_folder, run.recipe.train)
    for output in last_state.outputs:
        if _is_inside(output, run.folder):
            codec.delete_file(run.folder / output)
    _record(name, StageState(made_from=made_from), run)


def _is_inside(output: str, folder: Path) -> bool:
    """Tell whether a file that a manifest names is in the run folder.

    A name may be absolute, or a link may lead out of the folder. Nothing is deleted there.
    """
    if Path(output).is_absolute():
        return False
    return (folder / output).resolve() == folder.resolve() / output


def _record(name: str, state: StageState, run: Run) -> None:
    """Write the state of a stage to the manifest."""
    run.manifest.stages[name] = state
    run.manifest.schema_version = codec.SCHEMA_VERSION
    run.manifest.drllm_version = importlib.metadata.version("drllm")
    codec.write_json(run.folder / RUN_FILE, run.manifest)
