"""What the routers are trained on: their inputs along each target path, pooled once.

Owns one pass of the frozen base model over the targets. With a frozen base and teacher forcing
every router's input is a constant of its example, so training needs the base model no further.
The same pass pools what given routers read along the routes that they themselves take.
Leaves which targets can be used to `targets`, keeping what is pooled to `store`, the pooling to
`models.pooling`, the walk along the path to `models.policies`, and everything after the pass to
`loop`.

Axes: N targets, B rows, T tokens, D hidden, L layers, W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drllm.errors import ModelError
from drllm.models.base.identity import describe
from drllm.models.base.prompts import left_padded
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FixedPolicy, RecordingPolicy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import RejectedQuestion, SupervisionRecord, new_manifest
from drllm.training.feature_store import NOT_DONE, NOT_FINITE, Memory, Store
from drllm.training.targets import OVERFLOWS, Targets, are_too_many, set_aside, targets_for

BATCH_SIZE = 8
MOST_TOKENS = 16_384
"""Of a batch, padding counted; a longer prompt has a batch to itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The training set of the routers, in the order of the targets.

    Attributes:
        means: `[M, L, W, D]`, M ≥ N: the windows of every router's input, in float32, or in
            bfloat16 to save space, in memory or a map of a file. Read them by `rows`.
        filled: `[N]`: how many windows hold tokens.
        labels: `[N, L]` int64: the target path's decisions.
        questions: `[N]`: the questions' texts; they decide what is held out.
        tasks: `[N]`: the tasks' names.
        places: `[N]`: where each target lies in `means`; None where that is its own place.
        rejected: Targets that were set aside, and why.
        records: `[N]`: the targets themselves; empty where they came from elsewhere.
    """

    means: Tensor
    filled: Tensor
    labels: Tensor
    questions: tuple[str, ...]
    tasks: tuple[str, ...]
    places: Tensor | None = None
    rejected: tuple[RejectedQuestion, ...] = ()
    records: tuple[SupervisionRecord, ...] = ()

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.labels)

    def rows(self, index: Sequence[int] | Tensor) -> Tensor:
        """Read some targets' means, a copy in memory.

        Args:
            index: `[B]` whole numbers from 0, in any order.

        Returns:
            `[B, L, W, D]` in float32; in float64 where that is what there is.
        """
        chosen = torch.as_tensor(index, dtype=torch.int64)
        if self.places is not None:
            chosen = self.places[chosen]
        means = self.means[chosen]
        return means.to(torch.promote_types(means.dtype, torch.float32))


@torch.no_grad()
def collect(
    routed: RoutedModel,
    tokenizer: Any,
    records: Sequence[SupervisionRecord],
    *,
    num_windows: int,
    routers: RouterStack | None = None,
    store: Store | None = None,
    batch_size: int = BATCH_SIZE,
    announce: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run the base model once along each target path and keep what the routers read.

    A router's input is the state before its layer after the labelled decisions of the layers
    before it; where routers are given, after the decisions that these took. Prompts of similar
    length share a batch, whatever their paths. Which do so follows from the lengths alone, so that
    a pass that was broken off and goes on ends with the bytes of one that wasn't, on the same
    machine with the same number of threads.

    Targets that this model can't run are set aside, as far as they are few (`targets`).

    Args:
        routed: The base model; which policy is attached doesn't matter.
        tokenizer: The base model's.
        records: The targets.
        num_windows: W.
        routers: Routers whose own routes are followed in place of the target paths. The labels
            stay the target paths' decisions.
        store: The folder that keeps the features, to go on with or to use again; None keeps them
            in memory.
        batch_size: Most prompts a forward pass.
        announce: Is told, before the pass, what it needs on disk.
        on_progress: Is told (prompts done, prompts in all) at the start where some are done, and
            after each pass.

    Returns:
        The features of the targets that weren't set aside, in their order.

    Raises:
        ConfigError: The store holds features of something else.
        RecordError: No targets; a target for another number of layers, named by its question's
            id; too many that this model can't read; a store that can't be trusted or written.
        ModelError: Hidden states that overflow the base model's dtype, in too many targets.
    """
    targets = targets_for(routed, tokenizer, records)
    N = len(targets.records)
    identity = describe(routed.model)
    shape = (*targets.labels.shape, num_windows, identity["hidden_size"])
    kept = Memory() if store is None else store
    manifest = _manifest(routed, identity, targets, num_windows)
    if routers is not None:
        manifest["targets"]["routers_sha256"] = _weights_hash(routers)
        routers = routers.to(routed.model.device)
    with kept.opened(manifest, shape, announce):
        _check_finite(routed, targets, kept.filled)
        missing = [
            rows
            for rows in batches([len(tokens) for tokens in targets.prompts], batch_size)
            if bool((kept.filled[rows] == NOT_DONE).any())
        ]
        done = N - sum(map(len, missing))
        if on_progress is not None and done > 0:
            on_progress(done, N)
        for rows in missing:
            labels = targets.labels[rows]
            policy = RecordingPolicy(
                FixedPolicy(labels, labels.shape[1]) if routers is None else RouterPolicy(routers),
                num_windows,
            )
            _forward(routed, policy, [targets.prompts[row] for row in rows])
            means, filled = policy.means, policy.filled
            finite = means.isfinite().flatten(1).all(dim=1)  # [B]
            kept.put(
                rows,
                torch.where(finite[:, None, None, None], means, 0.0),
                torch.where(finite, filled.to(finite.device), NOT_FINITE),
            )
            _check_finite(routed, targets, kept.filled)
            done += len(rows)
            if on_progress is not None:
                on_progress(done, N)
    return _features(targets, kept.means, kept.filled)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Divide prompts into batches by their lengths alone, the longest first.

    What is too large for memory fails at the start that way, and no time left is promised that the
    longest would break.

    Args:
        lengths: `[N]` tokens of each.
        batch_size: Most prompts of a batch.

    Yields:
        Places from 0.

    Example:
        >>> list(batches([3, 9, 4, 4], 3)), list(batches([3, 9000, 4, 9000], 3))
        ([[1, 2, 3], [0]], [[1], [3], [2, 0]])
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        size = max(1, min(batch_size, MOST_TOKENS // lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _forward(routed: RoutedModel, policy: RecordingPolicy, prompts: Sequence[list[int]]) -> None:
    """Run one left-padded batch; the policy keeps what passes by."""
    ids, mask = left_padded(prompts, routed.model.device)
    with routed.using(policy):
        routed.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )


def _check_finite(routed: RoutedModel, targets: Targets, filled: Tensor) -> None:
    """Refuse to go on where too many targets would be set aside."""
    broken = (filled == NOT_FINITE).nonzero().flatten().tolist()
    if broken and are_too_many(len(targets.rejected) + len(broken), targets.total):
        raise ModelError(
            f"{len(broken)} of {targets.total} targets, the first is question "
            f"{targets.records[broken[0]].id!r}: a layer of the base model gives NaN or infinity "
            f"in {routed.model.dtype}; load it with --dtype float32"
        )


def _manifest(
    routed: RoutedModel, identity: Mapping[str, Any], targets: Targets, num_windows: int
) -> dict[str, Any]:
    """Return what the features follow from."""
    return new_manifest(
        "features",
        model={"id": routed.model.name_or_path, **identity},
        config={"num_windows": num_windows},
        extra={
            "runtime": {
                "dtype": str(routed.model.dtype).removeprefix("torch."),
                "device": routed.model.device.type,
            },
            "targets": targets.hashes(),
        },
    )


def _weights_hash(routers: RouterStack) -> str:
    """Return a hash of routers' weights, which decide the routes."""
    weights = routers.state_dict()
    joined = b"".join(weights[name].cpu().numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(joined).hexdigest()


def _features(targets: Targets, means: Tensor, filled: Tensor) -> Features:
    """Leave out what was set aside."""
    places = (filled != NOT_FINITE).nonzero().flatten()
    broken = (filled == NOT_FINITE).nonzero().flatten().tolist()
    kept = [targets.records[place] for place in places.tolist()]
    return Features(
        means=means,
        filled=filled[places],
        labels=targets.labels[places],
        records=tuple(kept),
        questions=tuple(record.question for record in kept),
        tasks=tuple(record.task for record in kept),
        places=places if broken else None,
        rejected=(
            *targets.rejected,
            *(set_aside(targets.records[place], OVERFLOWS) for place in broken),
        ),
    )
