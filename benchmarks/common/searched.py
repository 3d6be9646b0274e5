"""Paths as a tree search meets them, whatever the model answers."""

from __future__ import annotations

import random

from drllm.config import SearchConfig
from drllm.search.strategies import new_search

Pair = tuple[int, tuple[int, ...]]
Rounds = list[list[Pair]]


def searched_paths(num_layers: int, num_questions: int, num_paths: int) -> Rounds:
    """Return the rounds of a tree search: in each, one new path of every question.

    Rewards are drawn, so that both ways evaluate the same paths whatever the model answers.
    """
    config = SearchConfig(num_simulations=num_paths - 1)
    searches = [new_search(num_layers, config, random.Random(q)) for q in range(num_questions)]
    rng = random.Random(0)
    rounds: Rounds = []
    for _ in range(num_paths):
        pairs: list[Pair] = []
        for question, search in enumerate(searches):
            for decisions in search.ask():
                search.tell(decisions, float(rng.random() < 0.5))
                pairs.append((question, decisions))
        rounds.append(pairs)
    return rounds
