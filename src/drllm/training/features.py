"""The routers' inputs, pooled in one pass of the frozen base model over the targets.

With a frozen base and teacher forcing every router's input is a constant of its example, so
training needs the base model no further.

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
from drllm.records.codec import digest_of
from drllm.records.manifest import new_manifest
from drllm.records.supervision import RejectedQuestion, SupervisionRecord
from drllm.training.feature_store import NOT_DONE, NOT_FINITE, BlockMeans, FeatureStore, Shape
from drllm.training.targets import OVERFLOWS, EncodedTargets, are_too_many, encode_targets

MAXIMUM_TOKENS = 16_384  # of a batch, padding counted; a longer prompt has a batch to itself
ROWS_AT_ONCE = 32  # read from disk together
"""A component whose deviation is below this share of its layer's size counts as constant."""


class Batch(NamedTuple):
    """Prompts that the base model reads in one pass."""

    prompts: list[Sequence[int]]
    decisions: Tensor  # [B, L]


class Pooled(NamedTuple):
    """What the routers read of a batch."""

    means: Tensor  # [B, L, W, D]; 0 where they aren't finite
    filled: Tensor  # [B]: windows that hold tokens, or `NOT_FINITE`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The training set of the routers, in the order of the targets.

    Attributes:
        means: `[M, L, W, D]`, M ≥ N: the mean hidden state of each window before each layer. They
            may be on disk; `rows` reads them.
        filled: `[N]`: how many windows hold tokens.
        labels: `[N, L]` int64: the target paths' decisions.
        questions: `[N]` texts of the questions; they decide which targets are held out.
        tasks: `[N]` names of the tasks.
        made_from: Hash of the prompts, and the dtype of the base model.
        places: `[N]`: the row of `means` of each target; None if it is the target's number.
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
        """Read some targets' windows, `[B, L, W, D]`, into memory; zeros past `filled`.

        In float32, or in float64 if that is how they are kept.
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
        """A hash of the targets: all but the means, whose last bits depend on the machine."""
        parts = tuple(self.shape), tuple(self.questions), tuple(self.tasks)
        numbers = (self.filled.tolist(), self.labels.tolist())
        return digest_of([(parts, numbers, self.made_from)])


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
    """Run the base model once along each target path and keep what the routers read.

    A router's input is the state before its layer, after the labelled decisions of the layers
    before it. The batches follow from the prompts' lengths alone, so that a pass that was killed
    and resumed ends with the files of one that wasn't, on the same machine with the same number of
    threads. A batch that memory doesn't hold is read in parts.

    Args:
        model: The base model, without routing.
        tokenizer: Its tokenizer.
        records: The targets. A few that the model can't run are set aside.
        num_windows: W.
        store: The features' folder; what it holds of them is used again.
        batch_size: Prompts in a pass; by default as `choose_batch_size` says.
        listener: Receives notes and progress.

    Raises:
        ModelError: The hidden states of too many targets overflow the model's dtype.
        ConfigError: The folder holds other features.
        RecordError: Targets of another model, or a folder that can't be used.
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
        _pool_batches(routed, num_windows)  # tells the other processes that nothing is left
    finally:
        routed.detach()
    return _build_features(model, targets, store)


def choose_batch_size(device: str, num_values: int) -> int:
    """Return how many prompts are read in one pass, each with so many values of features."""
    if device == "cpu":
        return 8  # a CPU is busy with a few already
    # Of torchrun's processes each gets the features of all.
    return min(64, max(8, 2**24 // num_values))


def _make_manifest(
    model: Any, identity: Mapping[str, Any], targets: EncodedTargets, num_windows: int
) -> dict[str, Any]:
    runtime = {"dtype": _name_dtype(model), "device": model.device.type}
    made_from = {
        "number": len(targets.records),
        "prompts_sha256": digest_of(targets.prompts),
        "decisions_sha256": digest_of(targets.decisions),
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
    """Pool the targets that the folder doesn't hold, a block of them for each batch."""
    labels = torch.tensor(targets.decisions)
    blocks = _find_missing_blocks(targets, store.filled, batch_size)
    num_targets = store.shape.num_targets
    num_done = num_targets - store.num_missing
    with listener.progress("feature pass", "targets") as progress:
        if num_done > 0:
            progress(num_done, num_targets)
        for start in range(0, len(blocks), count()):
            group = blocks[start : start + count()]  # one for each process
            work = [Batch([targets.prompts[row] for row in rows], labels[rows]) for rows in group]
            results = _pool_batches(routed, store.shape.num_windows, work)
            for rows, pooled in zip(group, results, strict=True):
                store.write_block(rows, pooled.means, pooled.filled)
                _check_finite(routed.model, targets, store.filled)
                num_done += len(rows)
                progress(num_done, num_targets)


def _find_missing_blocks(
    targets: EncodedTargets, filled: Tensor, batch_size: int
) -> list[list[int]]:
    """Divide the targets into blocks, and return of each what isn't pooled yet.

    A block is whole or missing, unless the earlier pass had batches of another size.
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
    """Pool a part of the batches of `collect_features`, which runs in the first process."""
    routed = RoutedModel(model)
    try:
        while _pool_batches(routed, num_windows):
            pass
    finally:
        routed.detach()


def _pool_batches(
    routed: RoutedModel, num_windows: int, work: Sequence[Batch] = ()
) -> list[Pooled]:
    """Pool the first process's batches, each in one of the processes; all of them get the results.

    Without batches nothing is left to do.
    """
    work = from_first(lambda: work)
    return share([partial(_pool_batch, routed, num_windows, batch) for batch in work])


def _pool_batch(routed: RoutedModel, num_windows: int, batch: Batch) -> Pooled:
    """Run the base model over a batch, in parts where memory doesn't hold it."""
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
    return Pooled(means, torch.where(is_finite, filled, NOT_FINITE))


def _check_finite(model: Any, targets: EncodedTargets, filled: Tensor) -> None:
    """Stop the pass if too many targets would be set aside."""
    broken = (filled == NOT_FINITE).nonzero().flatten().tolist()
    if not broken:
        return
    num_rejected = len(targets.rejected)
    total = num_rejected + len(targets.records)
    if are_too_many(num_rejected + len(broken), total):
        raise ModelError(
            f"{len(broken)} of {total} targets, the first is question "
            f"{targets.records[broken[0]].id!r}: a layer of the base model gives NaN or infinity "
            f"in {model.dtype}; load it with --dtype float32"
        )


def _build_features(model: Any, targets: EncodedTargets, store: FeatureStore) -> Features:
    """Return the features of a whole folder, without targets whose states overflow."""
    is_usable = store.filled != NOT_FINITE
    usable = is_usable.nonzero().flatten()  # [N]
    rows: list[int] = usable.tolist()
    overflown = (~is_usable).nonzero().flatten().tolist()
    rejected = [RejectedQuestion.of(targets.records[row], OVERFLOWS) for row in overflown]
    prompts = [targets.prompts[row] for row in rows]
    return Features(
        means=store.means,
        filled=store.filled[usable],
        labels=torch.tensor(targets.decisions)[usable],
        questions=tuple(targets.records[row].question for row in rows),
        tasks=tuple(targets.records[row].task for row in rows),
        made_from=(digest_of(prompts), _name_dtype(model)),
        places=usable if rejected else None,
        rejected=(*targets.rejected, *rejected),
    )


def split_rows(index: Sequence[int]) -> Iterator[list[int]]:
    """Yield a few rows at a time, as features may be larger than memory."""
    for start in range(0, len(index), ROWS_AT_ONCE):
        yield list(index[start : start + ROWS_AT_ONCE])
