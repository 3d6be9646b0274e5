"""A sweep: many settings of supervision and training, judged by their routed models.

OUT/search.jsonl          one search for all settings
OUT/settings/NAME/        a run folder for each setting, evaluated on `select`
OUT/test/                 what was chosen, evaluated once
OUT/sweep.json
"""

import dataclasses
from pathlib import Path

from drllm.listener import Listener
from drllm.pipeline.folder import RunFolder, loader
from drllm.pipeline.recipes import CHOSEN_ON, SweepPlan
from drllm.records.codec import sha256, write_json
from drllm.records.places import check_folder
from drllm.reporting.sweeps import SWEEP_FILE, SweepResult, choose, read_candidate


def sweep(plan: SweepPlan, folder: Path, listener: Listener) -> str | None:
    """Train with every setting of a sweep, choose one on `select`, and test it once.

    Return the name of the chosen setting, or None where none can be brought to any depth.
    """
    recipes = {
        name: dataclasses.replace(setting, evaluate=plan.choosing)
        for name, setting in plan.settings.items()
    }
    for recipe in (plan.common, *recipes.values()):
        recipe.check()
    check_folder(folder, "--output-dir")
    with loader(plan.common.model, listener) as load:
        RunFolder(plan.common, folder, load, listener).stages(["search"])
        candidates = []
        for number, (name, recipe) in enumerate(recipes.items(), start=1):
            listener.note(f"setting {number} of {len(recipes)}: {name}")
            place = folder / "settings" / name
            run = RunFolder(recipe, place, load, listener, {"search": folder})
            run.stages(["supervise", "train", "evaluate"])
            candidates.append(read_candidate(name, place / "eval"))
        chosen = choose(candidates)
        result = SweepResult(
            sweep=plan.file.name,
            sweep_sha256=sha256(plan.file),
            chosen_on=CHOSEN_ON,
            chosen=None if chosen is None else chosen.name,
            settings=tuple(candidates),
        )
        write_json(folder / SWEEP_FILE, result)
        if chosen is None:
            return None
        place = folder / "settings" / chosen.name
        shared = {"search": folder, "supervise": place, "train": place}
        best = plan.settings[chosen.name]
        RunFolder(best, folder / "test", load, listener, shared).stages(["evaluate", "report"])
    return chosen.name
