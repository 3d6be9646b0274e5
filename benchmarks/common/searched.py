"""Paths as a tree search meets them, whatever the model answers."""

from __future__ import annotations

import random

from drllm.config import SearchConfig
from drllm.search.strategies import new_search

Pair = tuple[int, tuple[int, ...]]
Rounds = list[list[Pair]]


def searched_paths(
    num_layers: int, num_questions: int, num_paths: int, leaves: int | None = None
) -> Rounds:
    """Return the rounds of a tree search: in each, `leaves` new paths of every question.

    The first has the full paths alone. Unless given, `leaves` is the
    search's own default.

    Rewards are drawn, so that both ways evaluate the same paths whatever the model answers.
    """
    config = SearchConfig(num_simulations=num_paths - 1)
    leaves = leaves or config.leaves_per_round
    searches = [new_search(num_layers, config, random.Random(q)) for q in range(num_questions)]
    rng = random.Random(0)
    rounds: Rounds = []
    while pairs := [(q, path) for q, search in enumerate(searches) for path in search.ask(leaves)]:
        for question, decisions in pairs:
            searches[question].tell(decisions, float(rng.random() < 0.5))
        rounds.append(pairs)
    return rounds
