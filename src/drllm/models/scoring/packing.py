"""Packing: a prompt and its continuations in one row, and the pass of rows under many paths.

A row may have a *past* that it doesn't read again: the K/V that another row computed under the same
path. The common prefix of a batch is the past of all its prompts; a prompt is the past of the
continuations that are scored after it.

Axes: P rows, N pairs, T tokens of a row, F past tokens, S kept tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.models.base.capabilities import can_split
from drllm.models.routing.injection import Forward, LayerCall
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_cache import PrefixCache
from drllm.models.scoring.prefix_sharing import Pair, Past, PrefixSharingDriver

Tokens: TypeAlias = Sequence[int]

MIN_PREFIX = 8
"""Fewer common tokens than these aren't worth a pass of their own."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the continuations to score after it, as tokens.

    Attributes:
        context: Tokens of the prompt, at least one.
        continuations: Tokens of each continuation, at least one each; empty to generate only.
        num_unscored: For each continuation, how many of its first tokens are read without being
            scored, fewer than it has; empty for none. They belong to one continuation alone, so
            they are no part of the prompt: of a gap that is filled, the text of the filling.
    """

    context: Tokens
    continuations: Sequence[Tokens] = ()
    num_unscored: Sequence[int] = ()

    @property
    def num_after(self) -> int:
        """Tokens after the context that are read: the last of a continuation is only predicted."""
        return sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def length(self) -> int:
        """Tokens that are read, all continuations after one copy of the prompt."""
        return len(self.context) + self.num_after

    @property
    def is_plain(self) -> bool:
        """Whether all that is read is one ordinary text: at most one continuation is read."""
        return sum(len(tokens) > 1 for tokens in self.continuations) <= 1

    def apart(self) -> list[Question]:
        """Return plain questions that ask the same: itself, or one for each continuation."""
        if self.is_plain:
            return [self]
        unscored = self.num_unscored or [0] * len(self.continuations)
        return [
            Question(self.context, [tokens], [num])
            for tokens, num in zip(self.continuations, unscored, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Questions as rows that end in a common column; padding stands on the left.

    Attributes:
        ids: `[P, T]`.
        positions: `[P, T]`, each token's place in the prompt that it belongs to.
        mask: `[P, 1, T, F + T]`, added to attention scores; or `[P, T]`, which tokens are real, for
            plain questions without a past: any attention can take it, and keeps its own window.
        context: `[P, T]`, which columns hold the prompt's own tokens.
        num_past: For each row, the past tokens of the prompt.
        num_own: For each row, the prompt's other tokens.
        num_after: For each row, its tokens after the prompt.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    context: Tensor
    num_past: list[int]
    num_own: list[int]
    num_after: list[int]

    @property
    def lengths(self) -> list[int]:
        """For each row, its tokens."""
        return [own + after for own, after in zip(self.num_own, self.num_after, strict=True)]

    @property
    def num_columns(self) -> int:
        """F + T."""
        return self.mask.shape[-1]


def pack(
    questions: Sequence[Question],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_past: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay questions out, the continuations of each after one copy of its prompt.

    The mask keeps continuations from seeing one another, and each continues at the position where
    the prompt ends, so every log-probability is what a row of its own would give.

    Args:
        questions: At least one.
        dtype: Of the mask.
        device: Where the rows lie.
        num_past: For each question, how many tokens of its prompt are past ones, the last of F
            columns; None for none.
    """
    P = len(questions)
    past = [0] * P if num_past is None else list(num_past)
    num_own = [len(q.context) - a for q, a in zip(questions, past, strict=True)]
    num_after = [question.num_after for question in questions]
    T = max(own + after for own, after in zip(num_own, num_after, strict=True))
    ids = torch.zeros(P, T, dtype=torch.long)
    positions = torch.zeros(P, T, dtype=torch.long)
    owner = torch.full((P, T), -1)  # 0 for the prompt, 1 for its first continuation; -1 for padding
    for row, question in enumerate(questions):
        length = len(question.context)
        end = T - num_after[row]  # of the prompt
        start = end - num_own[row]
        ids[row, start:end] = torch.tensor(list(question.context[past[row] :]))
        positions[row, start:end] = torch.arange(past[row], length)
        owner[row, start:end] = 0
        for number, tokens in enumerate(question.continuations, start=1):
            inner = len(tokens) - 1
            first, end = end, end + inner
            ids[row, first:end] = torch.tensor(list(tokens[:-1]), dtype=torch.long)
            positions[row, first:end] = torch.arange(length, length + inner)
            owner[row, first:end] = number
    if num_past is None and all(question.is_plain for question in questions):
        mask = (owner >= 0).long()
    else:
        seen = _seen(owner, past)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return PackedBatch(
        ids.to(device),
        positions.to(device),
        mask.to(device),
        (owner == 0).to(device),
        past,
        num_own,
        num_after,
    )


def _seen(owner: Tensor, num_past: Sequence[int]) -> Tensor:
    """Return what each token sees, `[P, 1, T, F + T]` bool.

    Padding sees padding: a row of the mask without any key would give NaN.

    Args:
        owner: `[P, T]`, the continuation that each token belongs to; 0 for the prompt.
        num_past: For each row, how many of the F past columns hold tokens.
    """
    P, T = owner.shape
    sees, seen = owner[:, :, None], owner[:, None, :]
    own = torch.ones(T, T).tril().bool() & ((seen == 0) | (seen == sees))  # [P, T, T]
    F = max(num_past)
    past = torch.arange(F) >= F - torch.tensor(num_past)[:, None]  # [P, F]
    return torch.cat([past[:, None].expand(P, T, F), own], dim=2)[:, None]


def common_prefix(contexts: Sequence[Tokens]) -> list[int]:
    """Return the tokens that all prompts begin with: instructions, a system prompt, examples.

    Returns:
        Empty where there are fewer than `MIN_PREFIX`, or a single prompt. A prompt always keeps a
        token of its own after the prefix.
    """
    if len(contexts) < 2:
        return []
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False))
    length = min(len(list(alike)), min(map(len, contexts)) - 1)
    return list(contexts[0][:length]) if length >= MIN_PREFIX else []


@dataclass(frozen=True, slots=True)
class RowsOutput:
    """What a pass over packed rows gave.

    Attributes:
        logits: For each pair, those of the tokens to keep, `[S, V]`.
        cache: The cache of the pass; None where none was used.
        driver: What ran it, and holds its states until the pass is over.
    """

    logits: list[Tensor]
    cache: Cache | None
    driver: PrefixSharingDriver


class PackedRows:
    """Rows whose states under many paths are computed once and cached.

    Args:
        routed: The model.
        packed: The rows.
        states: Where states are cached; rows with different pasts may share it.
        keep_kv: Keep K/V too, so that these rows can be continued.
        past: The rows that are the past of these, which keep their K/V, and which one each row has.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        routed: RoutedModel,
        packed: PackedBatch,
        states: PrefixCache,
        *,
        keep_kv: bool = False,
        past: tuple[PackedRows, Sequence[int]] | None = None,
    ) -> None:
        self.routed = routed
        self.packed = packed
        self.states = states
        self.keep_kv = keep_kv
        self.past = past
        self.number = next(self._numbers)
        self._can_drop_tokens = can_drop_tokens(routed)

    @contextmanager
    def run(self, pairs: Sequence[Pair], keep_last: Sequence[int]) -> Iterator[RowsOutput]:
        """Run the states that are new; inside the block all states of these pairs are held.

        Args:
            pairs: Row and decisions.
            keep_last: For each pair, how many of its last tokens' logits are wanted.
        """
        if self.past is None:
            with self._run(pairs, keep_last, None) as shared:
                yield shared
            return
        rows, places = self.past
        before = list(dict.fromkeys((places[row], decisions) for row, decisions in pairs))
        with (
            rows.run(before, [0] * len(before)) as read,
            self._run(pairs, keep_last, Past(read.driver, places, self.packed.num_past)) as shared,
        ):
            yield shared

    @contextmanager
    def _run(
        self, pairs: Sequence[Pair], keep_last: Sequence[int], past: Past | None
    ) -> Iterator[RowsOutput]:
        driver = PrefixSharingDriver(
            pairs,
            self.states,
            self.packed.lengths,
            keep_last if self._can_drop_tokens else None,
            rows_number=self.number,
            keep_kv=self.keep_kv,
            past=past,
            bypass=self.routed.driver.bypass,
        )
        try:
            if driver.knows_all and not any(keep_last):
                yield RowsOutput([], None, driver)
                return
            with torch.no_grad(), self.routed.injection.driven_by(driver):
                output = self.routed.model(
                    input_ids=self.packed.ids,
                    attention_mask=self.packed.mask,
                    position_ids=self.packed.positions,
                    use_cache=self.keep_kv or past is not None,
                    logits_to_keep=0 if self._can_drop_tokens else max(1, *keep_last),
                )
            cache = next((value for value in output.values() if isinstance(value, Cache)), None)
            if self._can_drop_tokens:
                logits = list(torch.split(output.logits[0], list(keep_last)))
            else:
                each = zip(output.logits, keep_last, strict=True)
                logits = [values[len(values) - num :] for values, num in each]
            yield RowsOutput(logits, cache, driver)
        finally:
            driver.release()


class _DropToken:
    """Runs no layer and returns the first of two tokens after the last one."""

    def begin(self, forward: Forward) -> _DropToken:
        return self

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        return hidden[:, :1] if call.is_last else hidden

    def end(self) -> None:
        pass


def can_drop_tokens(routed: RoutedModel) -> bool:
    """Say whether a model's loop continues with fewer tokens than it was given.

    Some loops bring what the last layer returns back into the shape that they were given; these
    must carry all tokens. It is tried on two tokens, without running a layer.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=routed.model.device)
    with torch.no_grad(), routed.injection.driven_by(_DropToken()):
        try:
            output = routed.injection.decoder(input_ids=ids, use_cache=False)
        except RuntimeError as error:
            if "is invalid for input of size" not in str(error):  # not that of `Tensor.view`
                raise
            return False
    return bool(output[0].shape[1] == 1)


def packed_rows(
    routed: RoutedModel,
    questions: Sequence[Question],
    states: PrefixCache,
    *,
    keep_kv: bool = False,
    contexts: PackedRows | None = None,
) -> PackedRows:
    """Return the rows to run: after given contexts, after the common prefix, or whole.

    Args:
        routed: The model.
        questions: At least one.
        states: Where states are cached.
        keep_kv: Keep K/V too, so that these rows can be continued.
        contexts: Rows that hold the questions' contexts, if there are any.
    """
    model = routed.model
    where = {"dtype": model.dtype, "device": model.device}
    prefix = common_prefix([question.context for question in questions])
    if not can_split(model) or (contexts is None and not prefix):
        return PackedRows(routed, pack(questions, **where), states, keep_kv=keep_kv)
    if contexts is None:
        common = pack([Question(prefix)], **where)
        past = PackedRows(routed, common, states, keep_kv=True), [0] * len(questions)
        num_past = [len(prefix)] * len(questions)
    else:
        # A context's last token is run again, since its logits are needed.
        past = contexts, [*range(len(questions))]
        num_past = [len(question.context) - 1 for question in questions]
    packed = pack(questions, num_past=num_past, **where)
    return PackedRows(routed, packed, states, keep_kv=keep_kv, past=past)
