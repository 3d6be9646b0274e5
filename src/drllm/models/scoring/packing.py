"""Rows of tokens that many paths are run on, and what may stand in front of them.

Owns laying questions out as rows (`pack`), the tokens that all prompts of a block begin with
(`stem_of`), and the forward pass of rows under many paths (`SharedRows`). A row's *front* is what
it goes on from without reading it again: the K/V that another row left under the same path. The
stem is a front of all prompts; a prompt is a front of the continuations that are scored behind
it. Leaves which states are run to `sharing`, and what the logits mean to `scoring` and
`answering`.

Axes: P rows, N pairs, T tokens of a row, F tokens in front, S kept tokens, V vocabulary.
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

from drllm.models.base.capabilities import can_drop_tokens, can_split
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_cache import StateCache
from drllm.models.scoring.prefix_sharing import Front, Pair, SharingDriver

Tokens: TypeAlias = Sequence[int]

MIN_STEM = 8
"""Fewer common tokens than these aren't worth a pass of their own."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the continuations to score behind it, as tokens.

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
    def num_behind(self) -> int:
        """Tokens behind the context that are read: the last of a continuation is only predicted."""
        return sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def length(self) -> int:
        """Tokens that are read, all continuations behind one copy of the prompt."""
        return len(self.context) + self.num_behind

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
class Packed:
    """Questions as rows that end in a common column; padding stands on the left.

    Attributes:
        ids: `[P, T]`.
        positions: `[P, T]`, each token's place in the prompt that it belongs to.
        mask: `[P, 1, T, F + T]`, added to attention scores; or `[P, T]`, which tokens are real, for
            plain questions without a front: any attention can take it, and keeps its own window.
        context: `[P, T]`, which columns hold the prompt's own tokens.
        num_ahead: For each row, the tokens of the prompt that stand in front.
        num_own: For each row, the prompt's other tokens.
        num_behind: For each row, its tokens behind the prompt.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    context: Tensor
    num_ahead: list[int]
    num_own: list[int]
    num_behind: list[int]

    @property
    def lengths(self) -> list[int]:
        """For each row, its tokens."""
        return [own + behind for own, behind in zip(self.num_own, self.num_behind, strict=True)]

    @property
    def num_columns(self) -> int:
        """F + T."""
        return self.mask.shape[-1]


def pack(
    questions: Sequence[Question],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_ahead: Sequence[int] | None = None,
) -> Packed:
    """Lay questions out, the continuations of each behind one copy of its prompt.

    The mask keeps continuations from seeing one another and each goes on at the position where
    the prompt ends, so every log-probability is what a row of its own would give.

    Args:
        questions: At least one.
        dtype: Of the mask.
        device: Where the rows lie.
        num_ahead: For each question, how many tokens of its prompt stand in front, the last of
            F columns; None for none.
    """
    P = len(questions)
    ahead = [0] * P if num_ahead is None else list(num_ahead)
    num_own = [len(q.context) - a for q, a in zip(questions, ahead, strict=True)]
    num_behind = [question.num_behind for question in questions]
    T = max(own + behind for own, behind in zip(num_own, num_behind, strict=True))
    ids = torch.zeros(P, T, dtype=torch.long)
    positions = torch.zeros(P, T, dtype=torch.long)
    owner = torch.full((P, T), -1)  # 0 for the prompt, 1 for its first continuation; -1 for padding
    for row, question in enumerate(questions):
        length = len(question.context)
        end = T - num_behind[row]  # of the prompt
        start = end - num_own[row]
        ids[row, start:end] = torch.tensor(list(question.context[ahead[row] :]))
        positions[row, start:end] = torch.arange(ahead[row], length)
        owner[row, start:end] = 0
        for number, tokens in enumerate(question.continuations, start=1):
            inner = len(tokens) - 1
            first, end = end, end + inner
            ids[row, first:end] = torch.tensor(list(tokens[:-1]), dtype=torch.long)
            positions[row, first:end] = torch.arange(length, length + inner)
            owner[row, first:end] = number
    if num_ahead is None and all(question.is_plain for question in questions):
        mask = (owner >= 0).long()
    else:
        seen = _seen(owner, ahead)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return Packed(
        ids.to(device),
        positions.to(device),
        mask.to(device),
        (owner == 0).to(device),
        ahead,
        num_own,
        num_behind,
    )


def _seen(owner: Tensor, num_ahead: Sequence[int]) -> Tensor:
    """Return what each token sees, `[P, 1, T, F + T]` bool.

    Padding sees padding: a row of the mask without any key would give NaN.

    Args:
        owner: `[P, T]`, the continuation that each token belongs to; 0 for the prompt.
        num_ahead: For each row, how many of the F columns in front hold tokens.
    """
    P, T = owner.shape
    sees, seen = owner[:, :, None], owner[:, None, :]
    behind = torch.ones(T, T).tril().bool() & ((seen == 0) | (seen == sees))  # [P, T, T]
    F = max(num_ahead)
    ahead = torch.arange(F) >= F - torch.tensor(num_ahead)[:, None]  # [P, F]
    return torch.cat([ahead[:, None].expand(P, T, F), behind], dim=2)[:, None]


def stem_of(contexts: Sequence[Tokens]) -> list[int]:
    """Return the tokens that all prompts begin with: instructions, a system prompt, examples.

    Returns:
        Empty where there are fewer than `MIN_STEM`, or a single prompt. A prompt always keeps a
        token of its own behind the stem.
    """
    if len(contexts) < 2:
        return []
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False))
    length = min(len(list(alike)), min(map(len, contexts)) - 1)
    return list(contexts[0][:length]) if length >= MIN_STEM else []


@dataclass(frozen=True, slots=True)
class Shared:
    """What a pass over shared rows gave.

    Attributes:
        logits: For each pair, those of the tokens to keep, `[S, V]`.
        cache: The cache of the pass; None where none was used.
        driver: What ran it, and holds its states until the pass is left.
    """

    logits: list[Tensor]
    cache: Cache | None
    driver: SharingDriver


class SharedRows:
    """Rows whose states under many paths are computed once and held, within a bound.

    Args:
        routed: The model.
        packed: The rows.
        states: Where states are held; rows with different fronts may share it.
        keep_kv: Keep K/V too, so that something can go on behind these rows.
        front: The rows in front, which keep their K/V, and the row there of each row here.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        routed: RoutedModel,
        packed: Packed,
        states: StateCache,
        *,
        keep_kv: bool = False,
        front: tuple[SharedRows, Sequence[int]] | None = None,
    ) -> None:
        self.routed = routed
        self.packed = packed
        self.states = states
        self.keep_kv = keep_kv
        self.front = front
        self.number = next(self._numbers)
        self._can_drop_tokens = can_drop_tokens(routed)

    @contextmanager
    def run(self, pairs: Sequence[Pair], keep_last: Sequence[int]) -> Iterator[Shared]:
        """Run the states that are new; inside the block all states of these pairs are held.

        Args:
            pairs: Row and decisions.
            keep_last: For each pair, how many of its last tokens' logits are wanted.
        """
        if self.front is None:
            with self._run(pairs, keep_last, None) as shared:
                yield shared
            return
        rows, places = self.front
        ahead = list(dict.fromkeys((places[row], decisions) for row, decisions in pairs))
        with (
            rows.run(ahead, [0] * len(ahead)) as before,
            self._run(
                pairs, keep_last, Front(before.driver, places, self.packed.num_ahead)
            ) as shared,
        ):
            yield shared

    @contextmanager
    def _run(
        self,
        pairs: Sequence[Pair],
        keep_last: Sequence[int],
        front: Front | None,
    ) -> Iterator[Shared]:
        driver = SharingDriver(
            pairs,
            self.states,
            self.packed.lengths,
            keep_last if self._can_drop_tokens else None,
            rows_number=self.number,
            keep_kv=self.keep_kv,
            front=front,
            bypass=self.routed.driver.bypass,
        )
        try:
            if driver.knows_all and not any(keep_last):
                yield Shared([], None, driver)
                return
            with torch.no_grad(), self.routed.injection.driven_by(driver):
                output = self.routed.model(
                    input_ids=self.packed.ids,
                    attention_mask=self.packed.mask,
                    position_ids=self.packed.positions,
                    use_cache=self.keep_kv or front is not None,
                    logits_to_keep=0 if self._can_drop_tokens else max(1, *keep_last),
                )
            cache = next((value for value in output.values() if isinstance(value, Cache)), None)
            if self._can_drop_tokens:
                logits = list(torch.split(output.logits[0], list(keep_last)))
            else:
                each = zip(output.logits, keep_last, strict=True)
                logits = [values[len(values) - num :] for values, num in each]
            yield Shared(logits, cache, driver)
        finally:
            driver.release()


def shared_rows(
    routed: RoutedModel,
    questions: Sequence[Question],
    states: StateCache,
    *,
    keep_kv: bool = False,
    contexts: SharedRows | None = None,
) -> SharedRows:
    """Return the rows to run: behind given contexts, behind the prompts' stem, or whole.

    Args:
        routed: The model.
        questions: At least one.
        states: Where states are held.
        keep_kv: Keep K/V too, so that something can go on behind these rows.
        contexts: Rows that hold the questions' contexts, if there are any.
    """
    model = routed.model
    where = {"dtype": model.dtype, "device": model.device}
    lengths = [len(question.context) for question in questions]
    stem = stem_of([question.context for question in questions])
    if not can_split(model) or (contexts is None and not stem):
        return SharedRows(routed, pack(questions, **where), states, keep_kv=keep_kv)
    if contexts is None:
        common = pack([Question(stem)], **where)
        ahead = SharedRows(routed, common, states, keep_kv=True)
        front, num_ahead = (ahead, [0] * len(questions)), [len(stem)] * len(questions)
    else:
        # A context's last token is run again, since its logits are needed.
        front, num_ahead = (contexts, [*range(len(questions))]), [num - 1 for num in lengths]
    packed = pack(questions, num_ahead=num_ahead, **where)
    return SharedRows(routed, packed, states, keep_kv=keep_kv, front=front)
