"""What the tests of the search share: a tiny model, questions, and when two runs are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from drllm.models.routed import RoutedModel
from drllm.records import SearchRecord
from drllm.tasks.base import Task, get_task


@pytest.fixture(scope="module")
def routed(tiny_llama: Any, tiny_tokenizer: Any) -> RoutedModel:
    return RoutedModel(tiny_llama(max_position_embeddings=1024), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def facts() -> Task:
    return get_task("builtin_facts")


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[..., None]:
    """Equal decisions and rewards, margins within 1e-4, times ignored (the design's words)."""

    def check(first: Sequence[SearchRecord], second: Sequence[SearchRecord]) -> None:
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert (a.id, a.task, a.prompt) == (b.id, b.task, b.prompt)
            for p, q in zip(a.paths, b.paths, strict=True):
                assert (p.decisions, p.simulation, p.reward, p.answer) == (
                    q.decisions,
                    q.simulation,
                    q.reward,
                    q.answer,
                )
                assert p.margin == pytest.approx(q.margin, abs=1e-4)
                assert p.damage == pytest.approx(q.damage, abs=1e-4)
                assert (p.retest is None) == (q.retest is None)
                if p.retest is not None and q.retest is not None:
                    assert (p.retest.passed, p.retest.survived) == (
                        q.retest.passed,
                        q.retest.survived,
                    )

    return check
