"""The baseline that runs one program of the search log, whatever the question."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import (
    PROGRAMS,
    Baseline,
    Drawn,
    Measure,
    executions_of,
    register,
)
from drllm.evaluation.baselines.layer_dropping import mixture
from drllm.paths import Decisions, edits, full_decisions, num_executions
from drllm.records.search import SearchRecord
from drllm.supervision.rules import is_valid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PRIOR_TRIES = 10.0
"""Tries at which a program's own record counts as much as that of its kind."""


@register
class BestProgramBaseline(Baseline):
    """The one program of the search log that serves most questions, mixed with the full path."""

    name = "best program"
    source = "Re-PoLar, arXiv 2609.31360; the mixture is ours"
    fitted_on = PROGRAMS
    order = 90
    needs = ("search", "the search log; give it as --search")

    def obstacle(self, executions: float) -> str | None:
        """Say so if the log's programs can't be mixed to these executions."""
        if missing := super().obstacle(executions):
            return missing
        records = self.material.search
        L = records[0].num_layers
        tried = {path.decisions for record in records for path in record.paths}
        if tried <= {full_decisions(L)}:
            return "the search log has tried nothing but the full path"
        counts = [L, *map(num_executions, tried)]
        if not min(counts) <= executions <= max(counts):
            return (
                f"mixed with the full path, programs of the search log run {min(counts)} to "
                f"{max(counts)} executions, and the routed model has {executions:.2f}"
            )
        return None

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return the mixture of program and full path."""
        wanted, material = executions_of(routes), self.material
        measure = material.measure("answers" if material.questions else "loss")
        program, full_share = best_program(material.search, measure, wanted)
        return Drawn(
            mixture(program, full_decisions(self.num_layers), wanted, len(routes), generator),
            note=f"{edits(program)} on {1 - full_share:.0%} of the questions",
        )


def rates_in(records: Sequence[SearchRecord]) -> dict[Decisions, float]:
    """Return the share of questions that each program of a search log is expected to answer right.

    Most programs were tried on a question or two, and of thousands some were lucky. So the share
    is shrunk: (valid + k · p) / (tried + k) with k = `PRIOR_TRIES` and p the share of all tries at
    the same number of executions that were valid. It is no estimate to report, since what a search
    tries on a question depends on how others fared there.

    Source: Re-PoLar (arXiv 2609.31360); the shrinkage is the usual beta-binomial one.
    """
    outcomes: defaultdict[Decisions, list[bool]] = defaultdict(list)
    of_kind: defaultdict[int, list[bool]] = defaultdict(list)
    for path in itertools.chain.from_iterable(record.paths for record in records):
        outcomes[path.decisions].append(is_valid(path))
        of_kind[num_executions(path.decisions)].append(is_valid(path))
    found = {}
    for decisions, own in outcomes.items():
        kind = of_kind[num_executions(decisions)]
        pseudo = PRIOR_TRIES * sum(kind) / len(kind)
        found[decisions] = (sum(own) + pseudo) / (len(own) + PRIOR_TRIES)
    return found


def best_program(
    records: Sequence[SearchRecord],
    measure: Measure,
    executions: float,
    *,
    num_candidates: int = 32,
) -> tuple[Decisions, float]:
    """Pick the program that is best on the questions that may be chosen on, at given executions.

    A program may run fewer executions than wanted (more, if more than L are wanted): a share of
    the questions, which is returned too, then runs the full path. What counts is the mixture, which
    for any mean over questions is the mean of the two by their shares. Those candidates whose
    mixtures answer the most questions by the log are measured; there is one.

    Source: Re-PoLar (arXiv 2609.31360); the mixture is ours.
    """
    rates = rates_in(records)
    full = full_decisions(records[0].num_layers)
    shares = {}
    for program in rates:
        own, L = num_executions(program), len(full)
        if program != full and min(own, L) <= executions <= max(own, L):
            shares[program] = (executions - own) / (L - own) if own != L else 0.0

    def mixed(program: Decisions, value: float, of_full: float) -> float:
        return (1 - shares[program]) * value + shares[program] * of_full

    by_log = {program: mixed(program, rates[program], rates[full]) for program in shares}
    candidates = sorted(shares, key=by_log.__getitem__, reverse=True)[:num_candidates]
    of_full, *values = measure([full, *candidates])
    measured = dict(zip(candidates, values, strict=True))
    # Of equal ones the better by the log.
    best = max(candidates, key=lambda program: mixed(program, measured[program], of_full))
    return best, shares[best]
