"""Chooses which of the tuned paths a shrink heals and measures, before anything is measured."""

from collections.abc import Sequence
from statistics import fmean

from drllm.records.static_paths import SELECT, NamedPath, StaticPaths

HEALED_SHARE = 0.4
"""The share of its loss that a repaired path is expected to keep after it is healed. 300 steps took
a path of SmolLM2 without five of 30 layers from 0.196 to 0.082 nats a token
(docs/results/studies/2026-11-30-three-five-and-seven-layers-out.md)."""


def choose_candidates(
    record: StaticPaths, max_loss_increase: float, num_candidates: int
) -> list[NamedPath]:
    """Choose paths, from the most layers to the fewest.

    A path is worth healing if the share `HEALED_SHARE` of its loss on the questions of `select` is
    within the limit. Of those paths, `num_candidates` are chosen at equal distances, the one with
    the fewest layers among them. If no path is worth it, the one with the most layers is chosen.

    Args:
        record: The tuned paths.
        max_loss_increase: The limit, in nats a token.
        num_candidates: Maximum number of candidates.
    """
    shorter_paths = list(record.paths[1:])
    hopeful = shorter_paths[:1]
    for number, path in enumerate(shorter_paths, start=1):
        if HEALED_SHARE * find_loss_increase(record, path) <= max_loss_increase:
            hopeful = shorter_paths[:number]
    return _space_evenly(hopeful, num_candidates)


def find_loss_increase(record: StaticPaths, path: NamedPath) -> float:
    """Return how much higher a path's next-token loss is on `select`, as a mean over the tasks."""
    full = record.paths[0]
    increases = []
    for task in record.tasks:
        score = path.on(task, SELECT)
        full_score = full.plain_on(task, SELECT)
        if score is None or full_score is None:
            continue
        if score.text_loss is not None and full_score.text_loss is not None:
            increases.append(score.text_loss - full_score.text_loss)
    return fmean(increases) if increases else 0.0


def _space_evenly(paths: Sequence[NamedPath], number: int) -> list[NamedPath]:
    """Choose at most `number` of some paths at equal distances, the last among them."""
    if len(paths) <= number:
        return list(paths)
    places = [round(len(paths) * step / number) - 1 for step in range(1, number + 1)]
    return [paths[place] for place in places]
