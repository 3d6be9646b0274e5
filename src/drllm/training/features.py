"""Compute the routers' inputs in one pass of the base model over the targets.

A router reads the hidden states before its layer, pooled: the prompt's tokens are divided into W
windows, and the states of each window are averaged. The base model is frozen and follows the
target's decisions in this pass. So the inputs of a target never change, and training doesn't need
the base model again.

A block of this work is a batch of targets that aren't in the folder of features yet. The blocks run
in this process or on Ray, with `BatchPooler`.

Axes: N targets, B targets of a batch, D hidden, L layers, W windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drllm.errors import ModelError
from drllm.model.batching import MemoryBatcher, PathSize, group_by_length
from drllm.model.identity import describe_adapters
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.depth_control import run_prompts
from drllm.models.routing.policies import FixedPolicy, RecordingPolicy
from drllm.models.workers import Workers
from drllm.records.codec import hash_values
from drllm.records.manifest import new_manifest
from drllm.records.supervision import RejectedQuestion, SupervisionRecord
from drllm.training.feature_store import (
    MODEL_FIELDS,
    NOT_DONE,
    NOT_FINITE,
    BlockMeans,
    FeatureBlock,
    FeatureStore,
    Shape,
    name_block,
)
from drllm.training.targets import OVERFLOWS, EncodedTargets, are_too_many, encode_targets
from drllm.work.listener import Listener
from drllm.work.run import Block, BlockFunction, BlockSteps, run

MAXIMUM_TOKENS = 16_384
"""Maximum number of tokens of a batch, with padding; a longer prompt is a batch by itself."""
ROWS_AT_ONCE = 32  # number of targets whose inputs are read from disk together


@dataclass(frozen=True, slots=True, eq=False)
class TargetBatch:
    """Targets whose prompts the base model reads in one batch."""

    targets: Sequence[int]  # [B], numbers of the targets
    prompts: Sequence[Sequence[int]]  # tokens of each prompt
    decisions: Tensor  # [B, L], the target paths


@dataclass(frozen=True)
class BatchPooler(BlockFunction[TargetBatch, FeatureBlock]):
    """Computes the routers' inputs for a batch of targets, in one pass of the base model."""

    num_windows: int

    @torch.no_grad()
    def __call__(self, prepared: RoutedModel, data: TargetBatch, steps: BlockSteps) -> FeatureBlock:
        """Return the features of a batch.

        A batch that doesn't fit into memory is run in parts. The means of a target whose states
        aren't finite are 0.
        """
        longest = max(len(tokens) for tokens in data.prompts)
        batcher = MemoryBatcher(prepared.model, maximum=len(data.prompts))
        results = batcher.run(
            range(len(data.prompts)),
            PathSize(longest, num_logits=1),
            lambda rows: self._pool_rows(prepared, data, rows),
        )
        means = torch.stack([row_means for row_means, _ in results])  # [B, L, W, D]
        filled = torch.stack([row_filled for _, row_filled in results])  # [B]
        is_finite = means.isfinite().flatten(1).all(dim=1)  # [B]
        return FeatureBlock(
            targets=torch.tensor(data.targets),
            filled=torch.where(is_finite, filled, NOT_FINITE),
            means=torch.where(is_finite[:, None, None, None], means, 0.0),
        )

    def _pool_rows(
        self, routed: RoutedModel, batch: TargetBatch, rows: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Run the base model over some rows; return the means and the filled windows of each."""
        num_layers = batch.decisions.shape[1]
        policy = RecordingPolicy(FixedPolicy(batch.decisions[rows], num_layers), self.num_windows)
        run_prompts(routed, policy, [batch.prompts[row] for row in rows])
        return list(zip(policy.means.cpu(), policy.filled.cpu(), strict=True))


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
        made_from: Hash of the prompts, dtype of the base model, and hash of its active adapters if
            there are any.
        places: `[N]`, each target's row in `means`. None if M = N, where target n has row n.
        rejected: Targets that were set aside, and why.
    """

    means: Tensor | BlockMeans
    filled: Tensor
    labels: Tensor
    questions: Sequence[str]
    tasks: Sequence[str]
    made_from: tuple[str, ...] = ("", "")
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


def collect_features(
    workers: Workers,
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
    same number of threads, whoever runs the batches.

    Args:
        workers: The base model, and who runs it.
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
    base = workers.base
    targets = encode_targets(base.model, base.tokenizer, base.num_layers, records)
    hidden_size = workers.executor.identity["hidden_size"]
    shape = Shape(len(targets.records), base.num_layers, num_windows, hidden_size)
    store.open(_make_manifest(workers, targets, num_windows), shape)
    _refuse_many_overflows(base, targets, store.filled)
    if store.num_missing == 0:
        store.remove_stale_lock()
        listener.note(f"the routers' inputs in {store.folder} are used again")
    else:
        if batch_size is None:
            num_values = shape.num_layers * num_windows * hidden_size
            batch_size = choose_batch_size(workers.executor.runtime["device"], num_values)
        with store.writing(listener.note):
            _pool_missing(workers, targets, store, batch_size, listener)
    return _build_features(base, targets, store)


def choose_batch_size(device: str, num_values: int) -> int:
    """Return the maximum number of prompts in a batch.

    Args:
        device: The model's type of device, such as "cuda".
        num_values: How many numbers the features of one prompt have.
    """
    if device == "cpu":
        return 8  # a few prompts keep a CPU busy
    # A worker's features are sent to this process. So that those of a batch fit into memory, they
    # have at most 2**24 numbers.
    return min(64, max(8, 2**24 // num_values))


def _make_manifest(workers: Workers, targets: EncodedTargets, num_windows: int) -> dict[str, Any]:
    """Return the manifest of the features: what they are made from."""
    identity = workers.executor.identity
    runtime = workers.executor.runtime
    adapters = describe_adapters(workers.base.model)
    made_from = {
        "number": len(targets.records),
        "prompts_sha256": hash_values(targets.prompts),
        "decisions_sha256": hash_values(targets.decisions),
    }
    model = {name: value for name, value in identity.items() if name in MODEL_FIELDS}
    return new_manifest(
        "features",
        model={"id": workers.base.model.name_or_path, **model},
        config={"num_windows": num_windows},
        extra={
            "runtime": {"dtype": runtime["dtype"], "device": runtime["device"], **adapters},
            "targets": made_from,
        },
    )


def _pool_missing(
    workers: Workers,
    targets: EncodedTargets,
    store: FeatureStore,
    batch_size: int,
    listener: Listener,
) -> None:
    """Pool the targets that aren't in the folder yet; each batch becomes a block of the folder."""
    blocks = _find_missing_blocks(targets, store.filled, batch_size)
    num_targets = store.shape.num_targets
    with listener.progress("reading prompts", "targets") as progress:
        if store.num_done > 0:
            progress(store.num_done, num_targets)

        def on_result(*_: Any, **__: Any) -> None:
            _refuse_many_overflows(workers.base, targets, store.filled)
            progress(store.num_done, num_targets)

        function = BatchPooler(store.shape.num_windows)
        run(blocks, function, workers.executor, keep=store, on_result=on_result)


def _find_missing_blocks(
    targets: EncodedTargets, filled: Tensor, batch_size: int
) -> list[Block[TargetBatch]]:
    """Divide the targets into blocks, and leave out the targets that are pooled already.

    Usually all or none of a block are pooled already. Some are if an earlier pass had another batch
    size.

    Args:
        targets: The targets.
        filled: `[N]`; it says which targets are pooled already.
        batch_size: Maximum number of targets in a block.
    """
    lengths = [len(tokens) for tokens in targets.prompts]
    decisions = torch.tensor(targets.decisions)  # [N, L]
    is_missing = (filled == NOT_DONE).tolist()
    blocks = []
    for group in group_by_length(lengths, batch_size, MAXIMUM_TOKENS):
        rows = [row for row in group if is_missing[row]]
        if rows:
            prompts = [targets.prompts[row] for row in rows]
            batch = TargetBatch(rows, prompts, decisions[rows])
            blocks.append(Block(name_block(rows), batch, len(rows)))
    return blocks


def _refuse_many_overflows(base: BaseModel, targets: EncodedTargets, filled: Tensor) -> None:
    """Raise ModelError if the targets whose states overflow are too many to set aside."""
    overflowing_rows = (filled == NOT_FINITE).nonzero().flatten().tolist()
    if not overflowing_rows:
        return
    num_rejected = len(targets.rejected)
    total = num_rejected + len(targets.records)
    if are_too_many(num_rejected + len(overflowing_rows), total):
        first = targets.records[overflowing_rows[0]]
        raise ModelError(
            f"a layer of the base model gives NaN or infinity in {base.model.dtype} for "
            f"{len(overflowing_rows)} of {total} targets (the first is question {first.id!r}); "
            f"load the model with --dtype float32"
        )


def _build_features(base: BaseModel, targets: EncodedTargets, store: FeatureStore) -> Features:
    """Return the features of a complete folder, without the targets whose states overflow."""
    is_usable = store.filled != NOT_FINITE
    usable_rows = is_usable.nonzero().flatten()  # [N]
    rows: list[int] = usable_rows.tolist()
    overflowing_rows = (~is_usable).nonzero().flatten().tolist()
    overflowing = [RejectedQuestion.of(targets.records[row], OVERFLOWS) for row in overflowing_rows]
    prompts = [targets.prompts[row] for row in rows]
    adapters = describe_adapters(base.model)
    return Features(
        means=store.means,
        filled=store.filled[usable_rows],
        labels=torch.tensor(targets.decisions)[usable_rows],
        questions=tuple(targets.records[row].question for row in rows),
        tasks=tuple(targets.records[row].task for row in rows),
        made_from=(hash_values(prompts), base.runtime["dtype"], *adapters.values()),
        places=usable_rows if overflowing else None,
        rejected=(*targets.rejected, *overflowing),
    )


def split_rows(index: Sequence[int]) -> Iterator[list[int]]:
    """Divide numbers of targets into short lists, since the features may be larger than memory."""
    for start in range(0, len(index), ROWS_AT_ONCE):
        yield list(index[start : start + ROWS_AT_ONCE])
