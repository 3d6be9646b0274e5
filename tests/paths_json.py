"""A small `paths.json` as `drllm tune` writes it, for tests of whatever reads one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drllm.paths import StaticPath
from drllm.records.codec import write_json
from drllm.records.manifest import new_manifest
from drllm.records.static_paths import NamedPath, PathScore, StaticPaths, steps_to_write
from drllm.statistics.differences import Differences, Verdict

PATHS = {
    "full": [0, 1, 2, 3, 4, 5],
    "5.00": [0, 1, 3, 4, 5],
    "4.00": [0, 1, 2, 4],
    "again": [0, 1, 2, 2, 3, 4, 5],
}


def written_paths(
    file: Path,
    model: Mapping[str, Any],
    *,
    paths: Mapping[str, list[int]] = PATHS,
    divided: tuple[str, ...] = (),
    fitted: tuple[float, float, float] | None = None,
    test: Differences | None = None,
    repaired: Differences | None = None,
) -> Path:
    """Write a `paths.json` of a model with this identity, and return where it lies.

    `fitted` is the change of the objective on `fit` of every path but the full one, if it is there.
    `test` replaces what these paths lose on `test`; `repaired` is what they lose with a refit.
    """
    manifest = new_manifest("paths", model=model, config={"max_skipped": 0.2, "seed": 3})
    record = StaticPaths(
        **manifest,
        tasks=("arc_easy", "builtin_facts"),
        divided=divided,
        objective={"arc_easy": "gold_logprob", "builtin_facts": "gold_logprob"},
        num_layers=model["num_layers"],
        paths=tuple(
            NamedPath(
                name=name,
                steps=steps_to_write(StaticPath(steps)),
                executions=float(len(steps)),
                measured=(
                    *([_fitted(None if name == "full" else fitted)] if fitted else []),
                    _measured("select", 200, None if name == "full" else (9, 4)),
                    _measured("test", 400, None if name == "full" else (12, 10), test),
                ),
                repaired=_repaired(name, repaired),
            )
            for name, steps in paths.items()
        ),
    )
    write_json(file, record)
    return file


def leave_grades_out(file: Path, objective: str, change: tuple[float, float, float]) -> None:
    """Let a `paths.json` have this objective and this change of it, and no grades."""
    values = json.loads(file.read_text())
    values["objective"] = dict.fromkeys(values["tasks"], objective)
    for path in values["paths"]:
        for score in path["measured"]:
            score |= {"accuracy": None, "against_full": None}
            if score["change"] is not None:
                score["change"] = change
    file.write_text(json.dumps(values))


def written_plans(folder: Path, paths: Mapping[str, StaticPath]) -> str:
    """Write a file of each path, and return them as `--paths` takes them."""
    files = {folder / f"{name}.json": path.layers for name, path in paths.items()}
    for file, layers in files.items():
        file.write_text(json.dumps({"path": layers}))
    return ",".join(map(str, files))


def _fitted(change: tuple[float, float, float] | None) -> PathScore:
    return PathScore(task="arc_easy", part="fit", num_questions=99, objective=-1.0, change=change)


def _repaired(name: str, differences: Differences | None) -> tuple[PathScore, ...]:
    if name == "full" or differences is None:
        return ()
    return (_measured("test", 400, (12, 10), differences),)


def _measured(
    part: str,
    num_questions: int,
    outcomes: tuple[int, int] | None,
    differences: Differences | None = None,
) -> PathScore:
    against = None
    if outcomes is not None and differences is not None:
        against = differences
    elif outcomes is not None:
        won, lost = outcomes
        shown: dict[str, Any] = {"n": num_questions, "shown": "none shown"}
        against = Differences(
            accuracy=Verdict(
                quantity="accuracy", mean=(won - lost) / num_questions, interval=(-0.02, 0.03),
                won=won, lost=lost, p=0.5, excluded_loss=0.02, **shown,
            ),
            gold_logprob=Verdict(
                quantity="gold_logprob", mean=0.05, interval=(-0.01, 0.11), **shown
            ),
        )  # fmt: skip
    return PathScore(
        task="arc_easy",
        part=part,
        num_questions=num_questions,
        objective=-1.25,
        change=None if outcomes is None else (0.05, -0.01, 0.11),
        accuracy=0.62,
        text_loss=2.5,
        against_full=against,
    )
