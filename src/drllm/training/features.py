"""The routers' inputs, pooled in one pass of the frozen base model over the targets.

The base model is frozen, and the layers follow the target's decisions. So a router's input for an
example never changes, and training doesn't need the base model again.

Axes: N targets, B rows, D hidden, L layers, W windows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
from drllm.records.codec import hash_values
from drllm.records.manifest import new_manifest
from drllm.records.supervision import RejectedQuestion, SupervisionRecord
from drllm.training.feature_store import NOT_DONE, NOT_FINITE, BlockMeans, FeatureStore, Shape
from drllm.training.targets import OVERFLOWS, EncodedTargets, are_too_many, encode_targets

MAXIMUM_TOKENS = 16_384  # of a batch, with padding; a longer prompt is a batch of its own
ROWS_AT_ONCE = 32  # rows that are read from disk together


class Batch(NamedTuple):
    """Prompts that the base model reads in one pass."""

    prompts: list[Sequence[int]]
    decisions: Tensor  # [B, L]


class BatchFeatures(NamedTuple):
    """The routers' inputs for a batch."""

    means: Tensor  # [B, L, W, D]; 0 where they aren't finite
    filled: Tensor  # [B]: how many windows hold tokens, or `NOT_FINITE`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The training set of the routers, in the order of the targets.

    Attributes:
        means: `[M, L, W, D]`, M ≥ N: the mean hidden state of each window before each layer. The
            means may be on disk; `rows` reads them.
        filled: `[N]`: how many windows hold tokens.
        labels: `[N, L]` int64: the target paths' decisions.
        questions: `[N]` texts of the questions; they decide which targets are held out.
        tasks: `[N]` names of the tasks.
        made_from: Hash of the prompts, and dtype of the base model.
        places: `[N]`: each target's row in `means`; None if the row is the target's number.
        rejected: Targets that were set aside, and why.
    """

    means: Tensor | BlockMeans
    filled: Tensor
    labels: Tensor
    questions: Sequence[str]
    tasks: Sequence[str]
    made_from: tuple[str, str] = ("", "")
    places: Tensor | None = None
    rejected: tuple[RejectedQuestion, ...] = ()

    def rows(self, index: Sequence[int]) -> Tensor:
        """Read the windows of some targets into memory, `[B, L, W, D]`; zeros past `filled`.

        The result is float32, or float64 if the means are stored as float64.
        """
        rows = torch.as_tensor(index, dtype=torch.int64)
        if self.places is not None:
            rows = self.places[rows]
        means = self.means[rows]
        return means.to(torch.promote_types(means.dtype, torch.float32))

    @property
    def shape(self) -> Shape:
        """N, L, W and D."""
        _, L, W, D = self.rows([0]).shape
        return Shape(len(self.labels), L, W, D)

    @property
    def digest(self) -> str:
        """A hash of everything but the means, whose last bits depend on the machine."""
        parts = tuple(self.shape), tuple(self.questions), tuple(self.tasks)
        numbers = (self.filled.tolist(), self.labels.tolist())
        return hash_values([(parts, numbers, self.made_from)])


@torch.no_grad()
def collect_features(
    model: Any,
    tokenizer: Any,
    records: Sequence[SupervisionRecord],
    *,
    num_windows: int,
    store: FeatureStore,
    batch_size: int | None = None,
    listener: Listener | None = None,
) -> Features:
    """Run the base model once along each target path, and store the routers' inputs.

    A router's input is the state before its layer, after the labelled decisions of the layers
    before it. Batches depend on the prompts' lengths alone. So a pass that was killed and resumed
    ends with the same files as an uninterrupted one, on the same machine with the same number of
    threads. A batch that doesn't fit into memory is split.

    Args:
        model: The base model, without routing.
        tokenizer: Its tokenizer.
        records: The targets. A few that the model can't run are set aside.
        num_windows: W.
        store: The folder of the features. Blocks that it already has are used again.
        batch_size: Prompts in a pass; None calls `choose_batch_size`.
        listener: Receives notes and progress.

    Raises:
        ModelError: The hidden states of too many targets overflow the model's dtype.
        ConfigError: The folder holds other features.
        RecordError: The targets are of another model, or the folder can't be used.
    """
    listener = listener or Listener()
    routed = RoutedModel(model)
    try:
        targets = encode_targets(model, tokenizer, routed.num_layers, records)
        identity = describe(model)
        hidden_size = identity["hidden_size"]
        shape = Shape(len(targets.records), routed.num_layers, num_windows, hidden_size)
        store.open(_make_manifest(model, identity, targets, num_windows), shape)
        _check_finite(model, targets, store.filled)
        if store.num_missing == 0:
            store.remove_stale_lock()
            listener.note(f"the routers' inputs in {store.folder} are used again")
        else:
            if batch_size is None:
                num_values = shape.num_layers * num_windows * hidden_size
                batch_size = choose_batch_size(model.device.type, num_values)
            with store.writing(listener.note):
                _pool_missing(routed, targets, store, batch_size, listener)
        _pool_batches(routed, num_windows)  # tells the other processes to stop
    finally:
        routed.detach()
    return _build_features(model, targets, store)


def choose_batch_size(device: str, num_values: int) -> int:
    """Return how many prompts to read in one pass.

    Args:
        device: The model's type of device.
        num_values: How many numbers the features of one prompt have.
    """
    if device == "cpu":
        return 8  # a few prompts keep a CPU busy
    # Each process of torchrun gets the features of all processes, so these must stay small.
    return min(64, max(8, 2**24 // num_values))


def _make_manifest(
    model: Any, identity: Mapping[str, Any], targets: EncodedTargets, num_windows: int
) -> dict[str, Any]:
    runtime = {"dtype": _name_dtype(model), "device": model.device.type}
    made_from = {
        "number": len(targets.records),
        "prompts_sha256": hash_values(targets.prompts),
        "decisions_sha256": hash_values(targets.decisions),
    }
    return new_manifest(
        "features",
        model={"id": model.name_or_path, **identity},
        config={"num_windows": num_windows},
        extra={"runtime": runtime, "targets": made_from},
    )


def _name_dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _pool_missing(
    routed: RoutedModel,
    targets: EncodedTargets,
    store: FeatureStore,
    batch_size: int,
    listener: Listener,
) -> None:
    """Pool the targets that aren't in the folder, one block for each batch."""
    labels = torch.tensor(targets.decisions)
    blocks = _find_missing_blocks(targets, store.filled, batch_size)
    num_targets = store.shape.num_targets
    num_done = num_targets - store.num_missing
    with listener.progress("feature pass", "targets") as progress:
        if num_done > 0:
            progress(num_done, num_targets)
        for start in range(0, len(blocks), count()):
            group = blocks[start : start + count()]  # one for each process
            work = [_make_batch(targets, labels, rows) for rows in group]
            results = _pool_batches(routed, store.shape.num_windows, work)
            for rows, pooled in zip(group, results, strict=True):
                store.write_block(rows, pooled.means, pooled.filled)
                _check_finite(routed.model, targets, store.filled)
                num_done += len(rows)
                progress(num_done, num_targets)


def _make_batch(targets: EncodedTargets, labels: Tensor, rows: Sequence[int]) -> Batch:
    prompts = [targets.prompts[row] for row in rows]
    return Batch(prompts, labels[rows])


def _find_missing_blocks(
    targets: EncodedTargets, filled: Tensor, batch_size: int
) -> list[list[int]]:
    """Divide the targets into blocks, and return each block's targets that aren't pooled yet.

    All or none of a block's targets are missing, unless an earlier pass had another batch size.
    """
    lengths = [len(tokens) for tokens in targets.prompts]
    is_missing = (filled == NOT_DONE).tolist()
    blocks = []
    for rows in batches(lengths, batch_size, MAXIMUM_TOKENS):
        missing = [row for row in rows if is_missing[row]]
        if missing:
            blocks.append(missing)
    return blocks


@torch.no_grad()
def assist(model: Any, num_windows: int) -> None:
    """Help the first process, which runs `collect_features`, to pool its batches."""
    routed = RoutedModel(model)
    try:
        while _pool_batches(routed, num_windows):
            pass
    finally:
        routed.detach()


def _pool_batches(
    routed: RoutedModel, num_windows: int, work: Sequence[Batch] = ()
) -> list[BatchFeatures]:
    """Pool the first process's batches in all processes; return all results in each process.

    An empty list of batches tells the other processes that the pass is over.
    """
    work = from_first(lambda: work)
    return share([partial(_pool_batch, routed, num_windows, batch) for batch in work])


def _pool_batch(routed: RoutedModel, num_windows: int, batch: Batch) -> BatchFeatures:
    """Run the base model over a batch, in parts if it doesn't fit into memory."""
    L = batch.decisions.shape[1]

    def run_rows(rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        policy = RecordingPolicy(FixedPolicy(batch.decisions[rows], L), num_windows)
        run_prompts(routed, policy, [batch.prompts[row] for row in rows])
        return [*zip(policy.means.cpu(), policy.filled.cpu(), strict=True)]

    longest = max(len(tokens) for tokens in batch.prompts)
    batcher = MemoryBatcher(routed.model, maximum=len(batch.prompts))
    results = batcher.run(range(len(batch.prompts)), PathSize(longest, num_logits=1), run_rows)
    means = torch.stack([row_means for row_means, _ in results])  # [B, L, W, D]
    filled = torch.stack([row_filled for _, row_filled in results])  # [B]
    is_finite = means.isfinite().flatten(1).all(dim=1)  # [B]
    means = torch.where(is_finite[:, None, None, None], means, 0.0)
    return BatchFeatures(means, torch.where(is_finite, filled, NOT_FINITE))


def _check_finite(model: Any, targets: EncodedTargets, filled: Tensor) -> None:
    """Stop the pass if too many targets would be set aside."""
    overflowing = (filled == NOT_FINITE).nonzero().flatten().tolist()
    if not overflowing:
        return
    num_rejected = len(targets.rejected)
    total = num_rejected + len(targets.records)
    if are_too_many(num_rejected + len(overflowing), total):
        first = targets.records[overflowing[0]]
        raise ModelError(
            f"{len(overflowing)} of {total} targets, the first is question {first.id!r}: a layer "
            f"of the base model gives NaN or infinity in {model.dtype}; load it with "
            f"--dtype float32"
        )


def _build_features(model: Any, targets: EncodedTargets, store: FeatureStore) -> Features:
    """Return the features of a complete folder, without the targets whose states overflow."""
    is_usable = store.filled != NOT_FINITE
    usable = is_usable.nonzero().flatten()  # [N]
    rows: list[int] = usable.tolist()
    overflowing = (~is_usable).nonzero().flatten().tolist()
    rejected = [RejectedQuestion.of(targets.records[row], OVERFLOWS) for row in overflowing]
    prompts = [targets.prompts[row] for row in rows]
    return Features(
        means=store.means,
        filled=store.filled[usable],
        labels=torch.tensor(targets.decisions)[usable],
        questions=tuple(targets.records[row].question for row in rows),
        tasks=tuple(targets.records[row].task for row in rows),
        made_from=(hash_values(prompts), _name_dtype(model)),
        places=usable if rejected else None,
        rejected=(*targets.rejected, *rejected),
    )


def split_rows(index: Sequence[int]) -> Iterator[list[int]]:
    """Yield a few rows at a time, since features may be larger than memory."""
    for start in range(0, len(index), ROWS_AT_ONCE):
        yield list(index[start : start + ROWS_AT_ONCE])
