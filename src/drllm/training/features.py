"""Compute the routers' inputs in one pass of the base model over the targets.

A router reads the hidden states before its layer, pooled: the prompt's tokens are divided into W
windows, and the states of each window are averaged. The base model is frozen and follows the
target's decisions in this pass. So the inputs of a target never change, and training doesn't need
the base model again.

Several processes may share the pass. The first process runs `collect_features`, and the others run
`assist`.

Axes: N targets, B targets of a batch, D hidden, L layers, W windows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drllm.errors import ModelError
from drllm.models.base.batching import MemoryBatcher, PathSize, group_by_length
from drllm.models.base.identity import describe
from drllm.models.routing.depth_control import run_prompts
from drllm.models.routing.policies import FixedPolicy, RecordingPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.processes import count, from_first, share
from drllm.records.codec import hash_values
from drllm.records.manifest import new_manifest
from drllm.records.supervision import RejectedQuestion, SupervisionRecord
from drllm.training.feature_store import NOT_DONE, NOT_FINITE, BlockMeans, FeatureStore, Shape
from drllm.training.targets import OVERFLOWS, EncodedTargets, are_too_many, encode_targets
from drllm.work.listener import Listener

MAXIMUM_TOKENS = 16_384
"""Maximum number of tokens of a batch, with padding; a longer prompt is a batch by itself."""
ROWS_AT_ONCE = 32  # number of targets whose inputs are read from disk together


class Batch(NamedTuple):
    """Targets whose prompts the base model reads in one batch."""

    prompts: list[Sequence[int]]  # tokens of each prompt
    decisions: Tensor  # [B, L], the target paths


class BatchFeatures(NamedTuple):
    """The routers' inputs for a batch."""

    means: Tensor  # [B, L, W, D]; all 0 for a target whose states aren't finite
    filled: Tensor  # [B]: how many windows hold tokens, or `NOT_FINITE`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The training set of the routers, in the order of the targets.

    Attributes:
        means: `[M, L, W, D]`, the mean hidden state of each window before each layer. The means may
            be on disk, so read them with `rows`. M is N plus the targets whose states aren't
            finite.
        filled: `[N]`, how many windows hold tokens.
        labels: `[N, L]` int64, the target paths' decisions.
        questions: `[N]`, texts of the questions. They decide which targets are held out.
        tasks: `[N]`, names of the tasks.
        made_from: Hash of the prompts, and dtype of the base model.
        places: `[N]`, each target's row in `means`. None if M = N, where target n has row n.
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
        """Read the means of some targets into memory, `[B, L, W, D]`.

        Windows without tokens are 0. The result is float32, or float64 if the means are float64.

        Args:
            index: `[B]`, numbers of the targets.
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
        """A hash of everything but the means, since their last bits depend on the machine."""
        texts = (tuple(self.shape), tuple(self.questions), tuple(self.tasks))
        numbers = (self.filled.tolist(), self.labels.tolist())
        return hash_values([(texts, numbers, self.made_from)])


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

    If the pass is killed, the same call resumes it. The batches depend only on the prompts'
    lengths. So the files end up the same as without the interruption, on the same machine with the
    same number of threads. A batch that doesn't fit into memory is run in parts.

    Args:
        model: The base model, without routing.
        tokenizer: Its tokenizer.
        records: The targets. A few that the model can't run are set aside.
        num_windows: W.
        store: The folder of the features. Features that it already has are used again.
        batch_size: Maximum number of prompts in a batch; None calls `choose_batch_size`.
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
        _refuse_many_overflows(model, targets, store.filled)
        if store.num_missing == 0:
            store.remove_stale_lock()
            listener.note(f"the routers' inputs in {store.folder} are used again")
        else:
            if batch_size is None:
                num_values = shape.num_layers * num_windows * hidden_size
                batch_size = choose_batch_size(model.device.type, num_values)
            with store.writing(listener.note):
                _pool_missing(routed, targets, store, batch_size, listener)
        _pool_batches(routed, num_windows)  # without batches: tells the other processes to stop
    finally:
        routed.detach()
    return _build_features(model, targets, store)


def choose_batch_size(device: str, num_values: int) -> int:
    """Return the maximum number of prompts in a batch.

    Args:
        device: The model's type of device, such as "cuda".
        num_values: How many numbers the features of one prompt have.
    """
    if device == "cpu":
        return 8  # a few prompts keep a CPU busy
    # Each process of torchrun gets the features of all processes. So that they fit into memory, a
    # batch has at most 2**24 numbers.
    return min(64, max(8, 2**24 // num_values))


def _make_manifest(
    model: Any, identity: Mapping[str, Any], targets: EncodedTargets, num_windows: int
) -> dict[str, Any]:
    """Return the manifest of the features: what they are made from."""
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
    """Pool the targets that aren't in the folder yet; each batch becomes a block of the folder."""
    labels = torch.tensor(targets.decisions)
    blocks = _find_missing_blocks(targets, store.filled, batch_size)
    num_targets = store.shape.num_targets
    num_done = num_targets - store.num_missing
    num_processes = count()
    with listener.progress("feature pass", "targets") as progress:
        if num_done > 0:
            progress(num_done, num_targets)
        for start in range(0, len(blocks), num_processes):
            group = blocks[start : start + num_processes]  # a block for each process
            work = [_make_batch(targets, labels, rows) for rows in group]
            results = _pool_batches(routed, store.shape.num_windows, work)
            for rows, features in zip(group, results, strict=True):
                store.write_block(rows, features.means, features.filled)
                _refuse_many_overflows(routed.model, targets, store.filled)
                num_done += len(rows)
                progress(num_done, num_targets)


def _make_batch(targets: EncodedTargets, labels: Tensor, rows: Sequence[int]) -> Batch:
    prompts = [targets.prompts[row] for row in rows]
    return Batch(prompts, labels[rows])


def _find_missing_blocks(
    targets: EncodedTargets, filled: Tensor, batch_size: int
) -> list[list[int]]:
    """Divide the targets into blocks, and leave out the targets that are pooled already.

    Args:
        targets: The targets.
        filled: `[N]`; it says which targets are pooled already.
        batch_size: Maximum number of targets in a block.

    Returns:
        The numbers of each block's targets. Usually all or none of a block are pooled already. Some
        are if an earlier pass had another batch size.
    """
    lengths = [len(tokens) for tokens in targets.prompts]
    is_missing = (filled == NOT_DONE).tolist()
    blocks = []
    for block in group_by_length(lengths, batch_size, MAXIMUM_TOKENS):
        missing_rows = [row for row in block if is_missing[row]]
        if missing_rows:
            blocks.append(missing_rows)
    return blocks


@torch.no_grad()
def assist(model: Any, num_windows: int) -> None:
    """Help the first process, which runs `collect_features`, to pool its batches."""
    routed = RoutedModel(model)
    try:
        while _pool_batches(routed, num_windows):  # an empty result ends the pass
            pass
    finally:
        routed.detach()


def _pool_batches(
    routed: RoutedModel, num_windows: int, work: Sequence[Batch] = ()
) -> list[BatchFeatures]:
    """Pool batches in all processes, and return all results in each process.

    All processes must call this function, but only the first process passes the batches. If it
    passes none, the result is empty, which tells the other processes that the pass is over.
    """
    shared_work = from_first(lambda: work)
    return share([partial(_pool_batch, routed, num_windows, batch) for batch in shared_work])


def _pool_batch(routed: RoutedModel, num_windows: int, batch: Batch) -> BatchFeatures:
    """Run the base model over a batch, in parts if it doesn't fit into memory."""
    L = batch.decisions.shape[1]

    def run_rows(rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        policy = RecordingPolicy(FixedPolicy(batch.decisions[rows], L), num_windows)
        run_prompts(routed, policy, [batch.prompts[row] for row in rows])
        return list(zip(policy.means.cpu(), policy.filled.cpu(), strict=True))

    longest = max(len(tokens) for tokens in batch.prompts)
    batcher = MemoryBatcher(routed.model, maximum=len(batch.prompts))
    results = batcher.run(range(len(batch.prompts)), PathSize(longest, num_logits=1), run_rows)
    means = torch.stack([row_means for row_means, _ in results])  # [B, L, W, D]
    filled = torch.stack([row_filled for _, row_filled in results])  # [B]
    is_finite = means.isfinite().flatten(1).all(dim=1)  # [B]
    means = torch.where(is_finite[:, None, None, None], means, 0.0)
    filled = torch.where(is_finite, filled, NOT_FINITE)
    return BatchFeatures(means, filled)


def _refuse_many_overflows(model: Any, targets: EncodedTargets, filled: Tensor) -> None:
    """Raise ModelError if the targets whose states overflow are too many to set aside."""
    overflowing_rows = (filled == NOT_FINITE).nonzero().flatten().tolist()
    if not overflowing_rows:
        return
    num_rejected = len(targets.rejected)
    total = num_rejected + len(targets.records)
    if are_too_many(num_rejected + len(overflowing_rows), total):
        first = targets.records[overflowing_rows[0]]
        raise ModelError(
            f"a layer of the base model gives NaN or infinity in {model.dtype} for "
            f"{len(overflowing_rows)} of {total} targets (the first is question {first.id!r}); "
            f"load the model with --dtype float32"
        )


def _build_features(model: Any, targets: EncodedTargets, store: FeatureStore) -> Features:
    """Return the features of a complete folder, without the targets whose states overflow."""
    is_usable = store.filled != NOT_FINITE
    usable_rows = is_usable.nonzero().flatten()  # [N]
    rows: list[int] = usable_rows.tolist()
    overflowing_rows = (~is_usable).nonzero().flatten().tolist()
    overflowing = [RejectedQuestion.of(targets.records[row], OVERFLOWS) for row in overflowing_rows]
    prompts = [targets.prompts[row] for row in rows]
    return Features(
        means=store.means,
        filled=store.filled[usable_rows],
        labels=torch.tensor(targets.decisions)[usable_rows],
        questions=tuple(targets.records[row].question for row in rows),
        tasks=tuple(targets.records[row].task for row in rows),
        made_from=(hash_values(prompts), _name_dtype(model)),
        places=usable_rows if overflowing else None,
        rejected=(*targets.rejected, *overflowing),
    )


def split_rows(index: Sequence[int]) -> Iterator[list[int]]:
    """Divide numbers of targets into short lists, since the features may be larger than memory."""
    for start in range(0, len(index), ROWS_AT_ONCE):
        yield list(index[start : start + ROWS_AT_ONCE])
