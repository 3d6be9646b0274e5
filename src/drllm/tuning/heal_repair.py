"""The repair of a path in closed form, before an adapter is trained.

The refit is solved on texts to train on (see `refit`). Then it is measured on the held-out texts,
and isn't used if it doesn't make the path better there. The solved gaps are kept, so a killed run
loses at most one gap.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from drllm.config import HealConfig
from drllm.config.heal import NO_REPAIR, REFIT
from drllm.errors import ArchitectureError, PathError, RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.paths import Gap, StaticPath
from drllm.records.healed import GapRecord, RefitRecord
from drllm.statistics.ranges import Amount
from drllm.tasks.texts import Tokens, choose_calibration_texts, list_text_warnings
from drllm.tuning.heal_texts import MIN_TEXTS
from drllm.tuning.kept_tensors import KeptTensors
from drllm.tuning.refit import (
    RefittedGap,
    check_path,
    find_projections,
    join_weights,
    refit,
)
from drllm.tuning.refit_memory import estimate_bytes
from drllm.work.listener import Listener, OnProgress, format_rough_duration
from drllm.work.store import ResultStore


class SolvedGap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gap that is solved, as it is kept for a resumed run.

    Attributes:
        map: The name of its down-projection.
        ridge: λ.
        unexplained: As in `RefittedGap`.
        seconds: How long it took.
        weights: The new weights by the name of their module.
    """

    map: str
    ridge: Amount
    unexplained: float
    seconds: Amount
    weights: KeptTensors


@dataclass(frozen=True, slots=True)
class SolvedRefit:
    """The refit of a path.

    Attributes:
        gaps: The gaps with their new weights, in order.
        num_tokens: How many tokens they were solved on.
        seconds: How long solving them took.
    """

    gaps: Sequence[RefittedGap]
    num_tokens: int
    seconds: float

    @property
    def weights(self) -> dict[str, Any]:
        """The new weights, by the name of their module."""
        return join_weights(self.gaps)

    def to_record(self) -> RefitRecord:
        """Return the record of the refit."""
        gaps = []
        for refitted in self.gaps:
            gap = refitted.gap
            gaps.append(
                GapRecord(
                    layer=gap.layer,
                    next_layer=gap.next_layer,
                    map=refitted.name,
                    norm=refitted.norm,
                    ridge=refitted.ridge,
                )
            )
        return RefitRecord(
            gaps=tuple(gaps), num_tokens=self.num_tokens, seconds=round(self.seconds, 3)
        )


def choose_path_repair(
    routed: RoutedModel, path: StaticPath, config: HealConfig, listener: Listener
) -> str:
    """Return how a path is repaired before the training: `REFIT` or `NO_REPAIR`.

    Where the settings leave it open, it is the refit if the path and the model allow it. If not, a
    note says why.

    Raises:
        PathError: The settings need a refit, and the path can't have one.
        ArchitectureError, RoutingError: They need a refit, and the model can't have one.
    """
    if config.repair == NO_REPAIR:
        return NO_REPAIR
    try:
        find_projections(routed, check_path(path, routed.num_layers))
    except (PathError, ArchitectureError, RoutingError) as error:
        if config.repair == REFIT or not config.is_trained:
            remedy = "train LoRA alone (--repair none, with more --minutes than 0)"
            raise type(error)(f"{error}; {remedy}") from error
        listener.note(f"LoRA is trained alone, without a refit: {error}")
        return NO_REPAIR
    return REFIT


class RefitSolver:
    """Solves the refit of a path for `heal`, keeps each gap, and reports the progress.

    Args:
        routed: The model.
        path: The path, without an adapter.
        texts: The calibration texts, by source.
        store: Keeps the gaps that are solved.
        listener: Receives progress and notes.
    """

    def __init__(
        self,
        routed: RoutedModel,
        path: StaticPath,
        texts: Mapping[str, Sequence[Tokens]],
        store: ResultStore,
        listener: Listener,
    ) -> None:
        self.routed = routed
        self.path = path
        self.by_source = texts
        self.texts = [text for source_texts in texts.values() for text in source_texts]
        self.num_tokens = sum(map(len, self.texts))
        self.store = store
        self.listener = listener
        self.gaps = check_path(path, routed.num_layers)

    def solve(self) -> SolvedRefit:
        """Solve the gaps that aren't kept, and return all of them.

        Raises what `refit` raises.
        """
        solved_gaps = self._read_solved()
        if len(solved_gaps) < len(self.gaps):
            self._note_work(len(solved_gaps))
            if not solved_gaps:
                self._warn()
        earlier = []
        for gap, solved in zip(self.gaps, solved_gaps, strict=False):
            earlier.append(self._decode(gap, solved))
        with self.listener.progress("solving the refit", "") as on_progress:
            tracker = _TimeTracker(on_progress, self.listener)
            gaps = refit(
                self.routed,
                self.path,
                self.texts,
                earlier=earlier,
                on_gap=partial(self._keep, tracker),
                on_progress=tracker,
            )
        earlier_seconds = sum(solved.seconds for solved in solved_gaps)
        return SolvedRefit(gaps, self.num_tokens, earlier_seconds + sum(tracker.gap_seconds))

    def _keep(self, tracker: _TimeTracker, refitted: RefittedGap) -> None:
        """Keep a gap that was solved now, with its time."""
        seconds = tracker.end_gap()
        self.store.put(_key(refitted.gap), _encode(refitted, seconds))

    def _read_solved(self) -> list[SolvedGap]:
        """Return the gaps that an interrupted run has solved, up to the first missing one."""
        solved_gaps: list[SolvedGap] = []
        for gap in self.gaps:
            solved = self.store.get(_key(gap), SolvedGap)
            if solved is None:
                break
            solved_gaps.append(solved)
        return solved_gaps

    def _decode(self, gap: Gap, solved: SolvedGap) -> RefittedGap:
        """Return a kept gap with its weights beside the model's own."""
        weights = {}
        for name, weight in solved.weights.unpack().items():
            module: Any = self.routed.injection.refittable_modules[name]
            weights[name] = weight.to(module.weight.device)
        return RefittedGap(gap, solved.map, weights, solved.ridge, solved.unexplained)

    def _note_work(self, num_solved: int) -> None:
        """Note how many gaps are left to solve, and how much memory that takes."""
        projections = find_projections(self.routed, self.gaps[num_solved:])
        num_bytes = estimate_bytes(self.routed, projections.values(), self.num_tokens)
        num_gaps = len(self.gaps) - num_solved
        gaps = "1 gap" if num_gaps == 1 else f"{num_gaps} gaps"
        self.listener.note(
            f"refit of {gaps} on {self.num_tokens:,} tokens, which takes {num_bytes / 1e9:.1f} GB "
            f"of memory beside the model"
        )

    def _warn(self) -> None:
        """Warn of texts that are too few, or all of one kind."""
        for warning in list_text_warnings(list(self.by_source), self.num_tokens):
            self.listener.note(warning)


class _TimeTracker:
    """Passes the progress on, times each gap, and notes once how long the refit takes at most."""

    def __init__(self, on_progress: OnProgress, listener: Listener) -> None:
        self.on_progress = on_progress
        self.listener = listener
        self.start_time = time.perf_counter()
        self.gap_start_time = self.start_time
        self.gap_seconds: list[float] = []
        self.has_noted = False

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report progress."""
        if not self.has_noted and done > 0:
            self.has_noted = True
            seconds = (time.perf_counter() - self.start_time) * total / done
            self.listener.note(f"the refit takes at most {format_rough_duration(seconds)}")
        self.on_progress(done, total, note)

    def end_gap(self) -> float:
        """Return the seconds since the end of the gap before."""
        now = time.perf_counter()
        seconds = now - self.gap_start_time
        self.gap_start_time = now
        self.gap_seconds.append(seconds)
        return seconds


def _key(gap: Gap) -> str:
    return f"gap from {gap.layer} to {gap.next_layer}"


def _encode(refitted: RefittedGap, seconds: float) -> SolvedGap:
    """Return a gap as it is kept."""
    return SolvedGap(
        map=refitted.name,
        ridge=refitted.ridge,
        unexplained=refitted.unexplained,
        seconds=seconds,
        weights=KeptTensors.pack(refitted.weights),
    )


def choose_refit_texts(
    by_source: Mapping[str, Sequence[Tokens]], config: HealConfig, listener: Listener
) -> dict[str, list[Tokens]]:
    """Choose the calibration texts; return none, with a note, if there are too few.

    If the settings need a refit, too few texts aren't noted here: `refit` refuses them.
    """
    texts = choose_calibration_texts(by_source, config.refit_tokens, config.seed)
    num_texts = sum(map(len, texts.values()))
    if num_texts < MIN_TEXTS and config.repair is None and config.is_trained:
        listener.note(f"LoRA is trained alone, without a refit, which needs {MIN_TEXTS} texts")
        return {}
    return texts
