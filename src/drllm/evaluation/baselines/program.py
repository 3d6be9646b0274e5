"""Baseline: the one program of the search log that serves the most questions.

Owns how good a tried program looks in the log, which few are worth a second look, and choosing
among these on other questions. Leaves running the winner, mixed with the full path so that
executions are equal, to `static.mixture`.

Axes: L layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.errors import ConfigError, RecordError
from drllm.evaluation.baselines.layer_dropping import share_of_second
from drllm.evaluation.baselines.measures import Measure
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.records import SearchRecord
from drllm.supervision.rules import is_valid

PRIOR_TRIES = 10.0
"""Tries at which a program's own record counts as much as that of its kind."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program of the search log.

    Attributes:
        decisions: `[L]`.
        num_tried: Questions that it was tried on.
        num_valid: Questions that it answered right.
        rate: Share of questions that it is expected to answer right; see `programs_in`.
    """

    decisions: Decisions
    num_tried: int
    num_valid: int
    rate: float


def programs_in(records: Sequence[SearchRecord]) -> list[Program]:
    """Return every program that a search log tried, with the share of questions it answers.

    Most programs were tried on a question or two, and of thousands some were lucky. So the share
    is shrunk: (valid + k · p) / (tried + k) with k = `PRIOR_TRIES` and p the share of all tries at
    the same number of executions that were valid. A program tried once stays near its kind; one
    tried on most questions is judged by itself. It is the mean of a beta distribution whose prior
    is worth k tries.

    Which programs a search tries on a question depends on how others fared there, so even a shrunk
    share is no estimate to report; it only says what to look at again (`best_program`).

    Args:
        records: The search log of the training questions.

    Returns:
        The programs in the order in which they appear.

    Raises:
        RecordError: No records, or records of models with different numbers of layers.

    Source: Re-PoLar (arXiv 2609.31360) for a few programs that serve many questions; the shrinkage
        is the usual beta-binomial one.
    """
    if len({record.num_layers for record in records}) != 1:
        raise RecordError(
            "a program is looked for in search records of one model: at least one record, and all "
            "of the same number of layers"
        )
    tried: Counter[Decisions] = Counter()
    valid: Counter[Decisions] = Counter()
    of_kind: defaultdict[int, list[bool]] = defaultdict(list)
    for record in records:
        for path in record.paths:
            tried[path.decisions] += 1
            valid[path.decisions] += is_valid(path)
            of_kind[num_executions(path.decisions)].append(is_valid(path))
    found = []
    for decisions, num in tried.items():
        kind = of_kind[num_executions(decisions)]
        pseudo = PRIOR_TRIES * sum(kind) / len(kind)
        rate = (valid[decisions] + pseudo) / (num + PRIOR_TRIES)
        found.append(Program(decisions, num, valid[decisions], rate))
    return found


@dataclass(frozen=True, slots=True)
class BestProgram:
    """The program that is best at given executions, mixed with the full path.

    Attributes:
        program: The program, with its record in the log.
        full_share: Share of the questions that run the full path instead; for `static.mixture`.
        value: The measure of the mixture. Of the best of many it is too good by as much as luck
            has a part in it.
        full_value: The measure of the full path.
        num_measured: Candidates compared, the full path not counted.
    """

    program: Program
    full_share: float
    value: float
    full_value: float
    num_measured: int


def best_program(
    records: Sequence[SearchRecord],
    measure: Measure,
    executions: float,
    *,
    num_candidates: int = 32,
) -> BestProgram:
    """Pick the program that is best on the questions that may be chosen on, at given executions.

    A program may run fewer executions than wanted (more, where more than L are wanted): a share of
    the questions then runs the full path, so that the mean is what it should be. What counts is
    the mixture, which for any mean over questions is the mean of the two by their shares. Those
    candidates whose mixtures answer the most questions by the log are measured.

    Args:
        records: The search log of the training questions.
        measure: How good decisions are on the questions that may be chosen on.
        executions: Mean executions wanted.
        num_candidates: Most programs that are measured.

    Returns:
        The best one.

    Raises:
        ConfigError: No program of the log can be mixed to these executions.
        RecordError: As `programs_in`.

    Source: Re-PoLar (arXiv 2609.31360); the mixture is ours.
    """
    programs = programs_in(records)
    full = full_decisions(records[0].num_layers)
    full_rate = next(p.rate for p in programs if p.decisions == full)
    shares = {
        program: _full_share(program.decisions, full, executions)
        for program in programs
        if _can_reach(program.decisions, full, executions)
    }
    if not shares:
        reached = reach(records)
        if reached is None:
            raise ConfigError("this search log has no program other than the full path")
        raise ConfigError(
            f"no program of this search log, mixed with the full path, runs {executions:g} "
            f"executions; give a number from {reached[0]} to {reached[1]}"
        )

    def by_log(program: Program) -> float:
        share = shares[program]
        return (1 - share) * program.rate + share * full_rate

    candidates = sorted(shares, key=by_log, reverse=True)[:num_candidates]
    full_value, *values = measure([full, *(program.decisions for program in candidates)])
    mixed = [
        (1 - shares[program]) * value + shares[program] * full_value
        for program, value in zip(candidates, values, strict=True)
    ]
    best = max(range(len(mixed)), key=mixed.__getitem__)  # of equal ones the better by the log
    program = candidates[best]
    return BestProgram(program, shares[program], mixed[best], full_value, len(candidates))


def reach(records: Sequence[SearchRecord]) -> tuple[int, int] | None:
    """Return the fewest and the most executions that programs of a search log can be mixed to.

    Args:
        records: At least one, of one model.

    Returns:
        None where nothing but the full path was tried: that is no program to compare with.
    """
    num_layers = records[0].num_layers
    full = full_decisions(num_layers)
    tried = {path.decisions for record in records for path in record.paths} - {full}
    if not tried:
        return None
    executions = [num_layers, *map(num_executions, tried)]
    return min(executions), max(executions)


def _can_reach(decisions: Decisions, full: Decisions, executions: float) -> bool:
    """Say whether a program other than the full path can be mixed to given executions."""
    ends = sorted((num_executions(decisions), len(full)))
    return decisions != full and ends[0] <= executions <= ends[1]


def _full_share(decisions: Decisions, full: Decisions, executions: float) -> float:
    """Return the share of the full path; a program of L executions needs none of it."""
    if num_executions(decisions) <= len(full):
        return share_of_second(decisions, full, executions)
    return 1 - share_of_second(full, decisions, executions)
