"""Paths as a tree search meets them, whatever the model answers."""

from __future__ import annotations

import random

from drllm.config import SearchConfig
from drllm.search.strategies import Evaluation, new_search

Pair = tuple[int, tuple[int, ...]]
Rounds = list[list[Pair]]
LEAVES = SearchConfig().leaves_per_round


def make_search_rounds(
    num_layers: int, num_questions: int, num_paths: int, leaves: int = LEAVES
) -> Rounds:
    """Return the rounds of a tree search: in each, `leaves` new paths of every question.

    The first has the full paths alone. Rewards are drawn, so that both ways evaluate the same
    paths whatever the model answers.
    """
    config = SearchConfig(num_simulations=num_paths - 1, leaves_per_round=leaves)
    searches = [new_search(num_layers, config, random.Random(q)) for q in range(num_questions)]
    paths = [search.start() for search in searches]
    rng = random.Random(0)
    rounds: Rounds = []
    while any(paths):
        pairs: list[Pair] = []
        for question, search in enumerate(searches):
            pairs += [(question, decisions) for decisions in paths[question]]
            evaluations = [Evaluation(float(rng.random() < 0.5)) for _ in paths[question]]
            if evaluations:
                paths[question] = search.advance(evaluations)
        rounds.append(pairs)
    return rounds
