"""Which kinds of operations our time goes to, beyond those that the bound takes too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.profiler import profile

from common import bound
from drllm.model.load import BaseModel

PRODUCTS = "matrix products"
SOLVES = "solves"
ATTENTION = "attention"
COPIES = "copies"
ELEMENTWISE = "other operations"
OUTSIDE = "outside of operations"
KINDS = {
    PRODUCTS: ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv"),
    SOLVES: ("_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex", "cholesky_solve"),
    ATTENTION: (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    COPIES: (
        *("copy_", "_to_copy", "cat", "clone", "fill_", "zero_", "embedding", "gather"),
        *("index", "index_select", "index_put_", "_index_put_impl_", "masked_fill", "scatter"),
    ),
}
"""Kind → names of torch's operations. All others are `ELEMENTWISE`."""
LEAST = 0.01  # a smaller share isn't worth a word
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints when it starts


def share_operations(run: Callable[[], object]) -> dict[str, float]:
    """Return which share of a call's time each kind of operation takes, under a profiler.

    What is outside of operations is Python, the files, and the profiler itself. So it is too large
    where there are many small operations.
    """
    started = time.perf_counter()
    with profile(use_kineto=False) as profiled:
        run()
    total_s = time.perf_counter() - started
    shares = dict.fromkeys((*KINDS, ELEMENTWISE), 0.0)
    for event in profiled.key_averages():
        shares[find_kind(event.key)] += event.self_cpu_time_total / 1e6 / total_s
    shares[OUTSIDE] = max(0.0, 1 - sum(shares.values()))
    return shares


def find_kind(operation: str) -> str:
    """Return the kind of an operation, such as `aten::mm`."""
    name = operation.removeprefix("aten::")
    for kind, names in KINDS.items():
        if name in names:
            return kind
    return ELEMENTWISE


def explain_rest(
    run: Callable[[], object], base: BaseModel, num_tokens: int, share: float
) -> dict[str, float]:
    """Return what our time goes to beyond the bound, by kind, as shares of our time.

    The bound's own time is split into kinds as that of the pass whose tokens cost least. A negative
    share means that ours has less of a kind than the bound.

    Args:
        run: Does the work our way, once.
        base: The model.
        num_tokens: Of a prompt.
        share: The share of the bound that ours reaches.
    """
    if base.model.device.type != "cpu":
        return {}  # the host's times there aren't the device's
    ours = share_operations(run)
    with torch.no_grad():
        least = share_operations(bound.make_cheapest_pass(base, num_tokens))
    return {kind: ours[kind] - share * least[kind] for kind in ours}


def describe_rest(rest: Mapping[str, Any]) -> str:
    """Say where the rest of our time goes, the largest share first."""
    shares = sorted(rest.items(), key=lambda item: -item[1])
    words = [f"{kind} {share:.0%}" for kind, share in shares if share >= LEAST]
    return ", ".join(words)
