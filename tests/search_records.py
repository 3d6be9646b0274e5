"""Builds records of a search; what a test doesn't name is left as it usually is."""

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from drllm.records.search import SearchRecord, TriedPath


def make_path(decisions: str | Sequence[int], reward: float = 0.0, **fields: Any) -> TriedPath:
    """Make a path that was tried; the decisions may be a text ("1102")."""
    values = tuple(map(int, decisions))
    given = {"simulation": 0, "margin": None, **fields}
    return TriedPath(decisions=values, reward=reward, executions=float(sum(values)), **given)


def make_record(*paths: TriedPath, question: str = "What is water?", **fields: Any) -> SearchRecord:
    """Make a searched question; the first path is the full one, and they are numbered in order."""
    values = {
        "id": "q1",
        "task": "facts",
        "prompt": f"Q: {question}",
        "answer": "wet",
        "reward": "loglikelihood",
        "num_layers": len(paths[0].decisions),
        "seconds": 2.0,
    }
    numbered = tuple(replace(path, simulation=number) for number, path in enumerate(paths))
    return SearchRecord(**(values | fields), question=question, paths=numbered)
