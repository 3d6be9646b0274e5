"""What the routers are trained on: their inputs along each target path, pooled once.

Owns one pass of the frozen base model over the targets. With a frozen base and teacher forcing
every router's input is a constant of its example, so training needs the base model no further.
Leaves the pooling to `models.routers`, the walk along the path to `models.policies`, and
everything after the pass to `loop`.

Axes: N targets, B rows, T tokens, D hidden, L layers, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drllm.errors import ModelError, RecordError
from drllm.models.policies import LabelsPolicy
from drllm.models.prompts import context_length, encode, left_padded
from drllm.models.routed import RoutedModel
from drllm.records import SupervisionRecord


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The training set of the routers, in the order of the targets.

    Attributes:
        means: `[N, L, W, D]` in float32: the windows of every router's input.
        filled: `[N]`: how many windows hold tokens.
        labels: `[N, L]` int64: the target path's decisions.
        questions: `[N]`: the questions' texts; they decide what is held out.
        tasks: `[N]`: the tasks' names.
    """

    means: Tensor
    filled: Tensor
    labels: Tensor
    questions: tuple[str, ...]
    tasks: tuple[str, ...]

    def rows(self, index: Sequence[int]) -> Tensor:
        """Return some targets' windows, `[B, L, W, D]`."""
        return self.means[list(index)]


@torch.no_grad()
def collect(
    routed: RoutedModel,
    tokenizer: Any,
    records: Sequence[SupervisionRecord],
    *,
    num_windows: int,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run the base model once along each target path and keep what the routers read.

    A router's input is the state before its layer after the labelled decisions of the layers
    before it. Prompts of similar length share a batch.

    Args:
        routed: The base model; which policy is attached doesn't matter.
        tokenizer: The base model's.
        records: The targets.
        num_windows: W.
        batch_size: Prompts a forward pass.
        on_progress: Is told (prompts done, prompts in all) after each pass.

    Returns:
        The features on the CPU, in the order of the records.

    Raises:
        RecordError: No targets; a target for another number of layers; a prompt without tokens
            or longer than the base model's context. The message names the question's id.
        ModelError: Hidden states that overflow the base model's dtype.
    """
    if not records:
        raise RecordError("there are no targets to train on; search more questions")
    prompts = [encode(tokenizer, record.prompt) for record in records]
    context = context_length(routed.model)
    for record, tokens in zip(records, prompts, strict=True):
        _check(record, len(tokens), routed.num_layers, context)
    labels = torch.tensor([record.optimal_layer_config for record in records])  # [N, L]
    by_length = sorted(range(len(records)), key=lambda row: len(prompts[row]))
    means: Tensor | None = None
    filled = torch.zeros(len(records), dtype=torch.int64)
    for start in range(0, len(records), batch_size):
        rows = by_length[start : start + batch_size]
        policy = LabelsPolicy(labels[rows], num_windows)
        _forward(routed, policy, [prompts[row] for row in rows])
        finite = policy.means.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise ModelError(
                f"question {records[rows[finite.index(False)]].id!r}: a layer of the base model "
                f"gives NaN or infinity in {routed.model.dtype}; load it with --dtype float32"
            )
        if means is None:
            means = torch.empty(len(records), *policy.means.shape[1:], dtype=torch.float32)
        means[rows] = policy.means.float().cpu()
        filled[rows] = policy.filled.cpu()
        if on_progress is not None:
            on_progress(start + len(rows), len(records))
    assert means is not None
    return Features(
        means=means,
        filled=filled,
        labels=labels,
        questions=tuple(record.question for record in records),
        tasks=tuple(record.task for record in records),
    )


def _forward(routed: RoutedModel, policy: LabelsPolicy, prompts: Sequence[list[int]]) -> None:
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


def _check(record: SupervisionRecord, length: int, num_layers: int, context: int | None) -> None:
    if len(record.optimal_layer_config) != num_layers:
        raise RecordError(
            f"question {record.id!r}: its target has {len(record.optimal_layer_config)} layers, "
            f"the base model has {num_layers}; give targets that were searched with this model"
        )
    if length == 0:
        raise RecordError(
            f"question {record.id!r}: its prompt has no tokens, so the routers have nothing to "
            f"read; remove the line"
        )
    if context is not None and length > context:
        raise RecordError(
            f"question {record.id!r}: its prompt has {length} tokens, the base model's context "
            f"holds {context}; shorten or remove it"
        )
