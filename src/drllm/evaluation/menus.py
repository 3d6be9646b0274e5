"""What a menu is compared with: mixtures of the runs of its own paths, over all tasks together.

A path's outcome on a question doesn't depend on what runs beside it, so that nothing is asked
again: a rival's outcome is the mean of the paths', by the share of the questions that run each.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from drllm.evaluation.systems import SystemRun, mean_of
from drllm.evaluation.tables import TaskRuns
from drllm.models.routing.menu import MenuPolicy
from drllm.records.menu import MenuFile, Shares
from drllm.records.results import BASE, ROUTED, Pooled
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import compare


def with_rivals(
    done: Sequence[TaskRuns], menu: MenuPolicy, record: MenuFile, seed: int
) -> list[TaskRuns]:
    """Return all tasks' runs with the menu's rivals, and how it does against each over all of them.

    The menu is the routed system of each task, and its paths have run, the full one as base.
    """
    names = dict(zip(menu.by_route, menu.paths, strict=True))
    routed = [runs.systems[1] for runs in done]
    counts = Counter(names[tuple(route)] for each in routed for route in each.routes[0])
    own = {name: number / counts.total() for name, number in counts.items()}
    rivals = record.rivals(own, [runs.asked.written.name for runs in done])
    grown = []
    for place, runs in enumerate(done):
        mixed = [_mixed(runs.systems, name, each[place]) for name, each in rivals.items()]
        grown.append(replace(runs, systems=[*runs.systems[:2], *mixed, *runs.systems[2:]]))
    ours, *others = (_over_all(grown, name) for name in (ROUTED, *rivals, BASE))
    above_chance = all(runs.above_chance for runs in grown)
    pooled = Pooled(
        tasks=tuple(runs.asked.written.name for runs in done),
        num_questions=counts.total(),
        executions={each.name: each.executions for each in (ours, *others)},
        routed_against={
            each.name: compare(ours, each, seed, above_chance=above_chance) for each in others
        },
    )
    return [replace(runs, pooled=pooled) for runs in grown]


def _mixed(systems: Sequence[SystemRun], name: str, shares: Shares) -> SystemRun:
    """Return a rival on one task: of each path's outcomes its share of the questions."""
    runs = {system.name: system for system in systems}
    parts = [runs.get(path, systems[0]) for path in shares]
    said = ", ".join(f"{path} on {100 * share:.0f} %" for path, share in shares.items())
    mixed = mean_of(parts, name, [*shares.values()])
    mixed.notes = [f"of the questions it runs {said}"]
    return mixed


def _over_all(done: Sequence[TaskRuns], name: str) -> Outcomes:
    """Return a system's outcomes on the questions of all tasks."""
    systems = [system for runs in done for system in runs.systems if system.name == name]
    numbers = [len(each.correct) for each in systems]
    executions = float(np.average([each.executions for each in systems], weights=numbers))
    joined: dict[str, Any] = {
        field: [value for each in systems for value in getattr(each, field)]
        for field in ("correct", "gold_logprob", "text_loss")
    }
    return Outcomes(name=name, executions=executions, **joined)
