"""What the routers read, pooled in one pass of the frozen base model over the targets.

With a frozen base and teacher forcing every router's input is a constant of its example, so
training needs the base model no further.

Axes: N targets, B rows, D hidden, L layers, W windows.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from drllm.errors import ModelError
from drllm.listener import Listener
from drllm.models.base.identity import describe
from drllm.models.routers.depth_control import run_prompts
from drllm.models.routing.policies import FixedPolicy, RecordingPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize, batches
from drllm.processes import count, from_first, share
from drllm.records.codec import digest_of
from drllm.records.manifest import new_manifest
from drllm.records.supervision import RejectedQuestion, SupervisionRecord
from drllm.training.feature_store import NOT_DONE, NOT_FINITE, Store
from drllm.training.targets import OVERFLOWS, are_too_many, targets_for

MAXIMUM_TOKENS = 16_384  # of a batch, padding counted; a longer prompt has a batch to itself
READ_AT_ONCE = 32
Batch: TypeAlias = tuple[list[list[int]], Tensor]  # prompts and their decisions, [B, L]
CONSTANT = 1e-5
"""A component whose deviation is below this share of its layer's size counts as constant."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The training set of the routers, in the order of the targets."""

    # `[M, L, W, D]`, M ≥ N: the windows of every router's input, a map of a file. Read them by
    # `rows`.
    means: Tensor
    filled: Tensor  # `[N]`: how many windows hold tokens
    labels: Tensor  # `[N, L]` int64: the target path's decisions
    questions: Sequence[str]  # `[N]`: the questions' texts; they decide what is held out
    tasks: Sequence[str]  # `[N]`: the tasks' names
    made_from: tuple[str, str] = ("", "")  # hash of the prompts, and the dtype of the base model
    # `[N]`: where each target lies in `means`; None if that is its own place.
    places: Tensor | None = None
    rejected: tuple[RejectedQuestion, ...] = ()  # targets that were set aside, and why

    def rows(self, index: Sequence[int]) -> Tensor:
        """Read some targets' windows, `[B, L, W, D]`, into memory; zeros past `filled`.

        In float32, or in float64 if that is how they are kept.
        """
        chosen = torch.as_tensor(index, dtype=torch.int64)
        means = self.means[chosen if self.places is None else self.places[chosen]]
        return means.to(torch.promote_types(means.dtype, torch.float32))


@torch.no_grad()
def collect(
    model: Any,
    tokenizer: Any,
    records: Sequence[SupervisionRecord],
    *,
    num_windows: int,
    store: Store,
    batch_size: int | None = None,
    listener: Listener | None = None,
) -> Features:
    """Run the base model once along each target path and keep what the routers read.

    A router's input is the state before its layer, after the labelled decisions of the layers
    before it. The batches follow from the prompts' lengths alone, so that a pass that was killed
    and resumed ends with the bytes of one that wasn't, on the same machine with the same number of
    threads. A batch that memory doesn't hold is read in parts. The model is without routing; a few
    targets that it can't run are set aside, too many whose hidden states overflow the model's dtype
    are a ModelError. The store is resumed or used again.
    """
    listener = listener or Listener()
    routed = RoutedModel(model)
    try:
        kept, prompts, rejected = targets_for(model, tokenizer, routed.num_layers, records)
        decisions = [record.optimal_layer_config for record in kept]
        identity, labels, N = describe(model), torch.tensor(decisions), len(decisions)
        made_from = {
            "number": N,
            "prompts_sha256": digest_of(prompts),
            "decisions_sha256": digest_of(decisions),
        }
        dtype, device = str(model.dtype).removeprefix("torch."), model.device.type
        manifest = new_manifest(
            "features",
            model={"id": model.name_or_path, **identity},
            config={"num_windows": num_windows},
            extra={"runtime": {"dtype": dtype, "device": device}, "targets": made_from},
        )
        shape = (*labels.shape, num_windows, identity["hidden_size"])
        with (
            store.opened(manifest, shape, listener.note),
            listener.progress("feature pass", "targets") as progress,
        ):
            _check_finite(model, kept, len(rejected), store.filled)
            size = batch_size or batch_size_on(device, labels.shape[1] * num_windows * shape[-1])
            missing = [
                rows
                for rows in batches(list(map(len, prompts)), size, MAXIMUM_TOKENS)
                if bool((store.filled[rows] == NOT_DONE).any())
            ]
            done = N - sum(map(len, missing))
            if done > 0:
                progress(done, N)
            for start in range(0, len(missing), count()):
                group = missing[start : start + count()]
                parts = [([prompts[row] for row in rows], labels[rows]) for rows in group]
                pooled = _pooled(routed, num_windows, parts)
                for rows, (means, filled) in zip(group, pooled, strict=True):
                    store.put(rows, means, filled)
                    _check_finite(model, kept, len(rejected), store.filled)
                    done += len(rows)
                    progress(done, N)
            _pooled(routed, num_windows)  # nothing is left to assist with
    finally:
        routed.detach()

    is_used = store.filled != NOT_FINITE
    used = list(itertools.compress(kept, is_used.tolist()))
    broken = itertools.compress(kept, (~is_used).tolist())
    overflown = [RejectedQuestion.of(record, OVERFLOWS) for record in broken]
    return Features(
        means=store.means,
        filled=store.filled[is_used],
        labels=labels[is_used],
        questions=tuple(record.question for record in used),
        tasks=tuple(record.task for record in used),
        made_from=(digest_of(itertools.compress(prompts, is_used.tolist())), dtype),
        places=is_used.nonzero().flatten() if overflown else None,
        rejected=(*rejected, *overflown),
    )


def batch_size_on(device: str, num_values: int) -> int:
    """Return how many prompts are read in one pass, each with so many values of features."""
    # A CPU is busy with a few already; of torchrun's processes each gets the features of all.
    return 8 if device == "cpu" else min(64, max(8, 2**24 // num_values))


@torch.no_grad()
def assist(model: Any, num_windows: int) -> None:
    """Pool a part of the batches of `collect`, which runs in the first of several processes."""
    routed = RoutedModel(model)
    try:
        while _pooled(routed, num_windows):
            pass
    finally:
        routed.detach()


def _pooled(
    routed: RoutedModel, num_windows: int, batches: Sequence[Batch] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Return the means, 0 where they aren't finite, and `filled` of the first process' batches.

    Each batch is read by one of the processes.
    """

    def pool(prompts: list[list[int]], labels: Tensor) -> tuple[Tensor, Tensor]:
        def read(rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
            policy = RecordingPolicy(FixedPolicy(labels[rows], labels.shape[1]), num_windows)
            run_prompts(routed, policy, [prompts[row] for row in rows])
            return [*zip(policy.means.cpu(), policy.filled.cpu(), strict=True)]

        size = PathSize(max(map(len, prompts)), num_logits=1)
        batcher = MemoryBatcher(routed.model, maximum=len(prompts))
        found = batcher.run(range(len(prompts)), size, read)
        means, filled = (torch.stack(part) for part in zip(*found, strict=True))
        finite = means.isfinite().flatten(1).all(dim=1)  # [B]
        means = torch.where(finite[:, None, None, None], means, 0.0)
        return means, torch.where(finite, filled, NOT_FINITE)

    return share([partial(pool, *batch) for batch in from_first(lambda: batches)])


def _check_finite(
    model: Any, records: Sequence[SupervisionRecord], num_rejected: int, filled: Tensor
) -> None:
    """Stop the pass if too many targets would be set aside."""
    broken = (filled == NOT_FINITE).nonzero().flatten().tolist()
    total = num_rejected + len(records)
    if broken and are_too_many(num_rejected + len(broken), total):
        raise ModelError(
            f"{len(broken)} of {total} targets, the first is question "
            f"{records[broken[0]].id!r}: a layer of the base model gives NaN or infinity "
            f"in {model.dtype}; load it with --dtype float32"
        )


def shape(examples: Features) -> tuple[int, int, int, int]:
    """Return N, L, W and D."""
    _, L, W, D = examples.rows([0]).shape
    return len(examples.labels), L, W, D


def digest(examples: Features) -> str:
    """Return a hash of the targets: all but the means, whose last bits depend on the machine."""
    parts = shape(examples), tuple(examples.questions), tuple(examples.tasks)
    numbers = (examples.filled.tolist(), examples.labels.tolist())
    return digest_of([(parts, numbers, examples.made_from)])


def moments(examples: Features, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (never 0), `[L, D]` in float64, of each layer's filled windows.

    Every target counts the same, however many windows it fills. The deviation of a component that
    hardly varies, compared with the size of its layer's states, gets a floor, so that dividing by
    it doesn't blow up rounding errors.
    """
    total = square = torch.zeros(())
    for part in parts_of(index):
        count = examples.filled[part].double()[:, None, None]  # [B, 1, 1]
        values = examples.rows(part).double()  # zeros past `filled` add nothing to plain sums
        total = total + (values.sum(dim=2) / count).sum(dim=0)  # [L, D]
        square = square + (values.square().sum(dim=2) / count).sum(dim=0)
    mean = total / len(index)
    variance = (square / len(index) - mean.square()).clamp(min=0.0)
    size = (square / len(index)).mean(dim=1, keepdim=True).sqrt()  # [L, 1]
    floor = torch.where(size > 0, CONSTANT * size, 1.0)
    return mean, torch.maximum(variance.sqrt(), floor)


def parts_of(index: Sequence[int]) -> Iterator[list[int]]:
    """Yield a few rows at a time, as features may be larger than memory."""
    for start in range(0, len(index), READ_AT_ONCE):
        yield list(index[start : start + READ_AT_ONCE])
