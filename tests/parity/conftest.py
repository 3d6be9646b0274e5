"""What the parity tests are made of: the families, the plans, the prompts, and the answers of the
slow way, which are made once a session for each family and plan.
"""

import copy
from functools import cache

import pytest

from drllm.models.families import IN_SUITE
from drllm.models.routed_model import RoutedModel
from slow_way import ListedModel

TELLING = ("llama", "gemma3_text", "gpt2")
"""Families that differ in what can go wrong: the usual; sliding and full layers mixed, with a
rotation for each kind; arguments by position and learned positions."""

PLANS = {
    "layer 0 skipped": [[0, 1, 1, 1, 1, 1]] * 4,
    "all but one skipped": [[0, 0, 0, 1, 0, 0]] * 4,
    "repeats": [[1, 2, 1, 1, 2, 1]] * 4,
    "all repeated": [[2, 2, 2, 2, 2, 2]] * 4,
    "mixed": [[0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2], [1, 0, 2, 0, 1, 2], [1, 1, 1, 1, 1, 1]],
}
"""One row of decisions for each prompt."""
TELLING_PAIR = ("llama", "all but one skipped")

PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 25], [20, 21, 22]]
"""One is longer than the tokens that a sliding layer sees; with their answers all but one are."""

NUM_NEW = 8
END = 2


def pytest_generate_tests(metafunc):
    """Let a test that takes a family, or a family and a plan, run on all of them.

    `make test` tries every family under the mixed plan, and some families under every plan. Where
    a module says TELLING_ONLY, of all or of some of its tests, it tries less: some families under
    the mixed plan, one under another.
    """
    only = getattr(metafunc.module, "TELLING_ONLY", False)
    if isinstance(only, tuple):
        only = metafunc.function.__name__ in only

    def is_tried(family, plan):
        if only:
            return family in TELLING if plan == "mixed" else (family, plan) == TELLING_PAIR
        return plan == "mixed" or family in TELLING

    def param(*values, name, tried):
        return pytest.param(*values, id=name, marks=[] if tried else [pytest.mark.thorough])

    if {"family", "plan"} <= set(metafunc.fixturenames):
        values = [
            param(family, PLANS[plan], name=f"{plan}-{family}", tried=is_tried(family, plan))
            for family in IN_SUITE
            for plan in PLANS
        ]
        metafunc.parametrize(("family", "plan"), values)
    elif "family" in metafunc.fixturenames:
        values = [param(f, name=f, tried=not only or f in TELLING) for f in IN_SUITE]
        metafunc.parametrize("family", values)


class Slow:
    """The slow way's answers on the tiny models, kept for the session."""

    def __init__(self, make):
        self._make = cache(make)
        self._list = cache(self._listed)
        self._say = cache(self._said)

    def untouched(self, family, **options):
        """Return a model of the family, a copy of its own for each caller."""
        return copy.deepcopy(self._make(family, **options))

    def listed(self, family, decisions, *, cached=False, **options):
        """Return the family's model with its layers listed in path order."""
        return self._list(family, tuple(decisions), cached, **options)

    def greedy(self, family, plan, prompts=PROMPTS, num_new=NUM_NEW, **options):
        """Return each prompt's greedy answer under its own row of the plan."""
        return [
            self._say(family, tuple(decisions), tuple(prompt), num_new, **options)
            for decisions, prompt in zip(plan, prompts, strict=True)
        ]

    def _listed(self, family, decisions, cached, **options):
        return ListedModel(self._make(family, **options), decisions, cached=cached)

    def _said(self, family, decisions, prompt, num_new, **options):
        return self.listed(family, decisions, **options).greedy(prompt, num_new, never=END)


@pytest.fixture(scope="session")
def slow(tiny_model):
    return Slow(tiny_model)


@pytest.fixture
def routed(slow, family):
    return RoutedModel(slow.untouched(family))


@pytest.fixture(scope="session")
def prompts():
    return PROMPTS
