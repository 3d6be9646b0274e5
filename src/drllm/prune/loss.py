"""The loss of a shortened model that learns right answers, and the passes that compute it.

- A question with a right answer: the mean next-token loss of the answer.
- A question with options: to this comes the cross-entropy of the right option, where an option's
  score is its log-probability divided by its characters, times `SHARPNESS`.
- A text without a right answer: the mean KL from the full model, a token.

The questions of a step share one row, if the model's attention takes a mask: each prompt stands in
it once, and its options see the prompt and themselves.

Axes: P rows, T tokens, K scored positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drllm.model.layers import can_pack

SHARPNESS = 8.0
"""What scores are multiplied by before the softmax: nats a character differ little."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question or a text to learn from, as tokens.

    Attributes:
        context: What the model reads first, at least one token.
        answers: The options; or one right answer; or the rest of a text.
        gold: The right answer's place.
        lengths: The characters of each answer; empty if there are no options to compare.
        num_unscored: How many first tokens of each answer are read and not scored.
        is_text: Whether there is no right answer, so that only the KL counts.
    """

    context: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    gold: int = 0
    lengths: tuple[int, ...] = ()
    num_unscored: tuple[int, ...] = ()
    is_text: bool = False

    @property
    def num_tokens(self) -> int:
        """How many tokens a packed row has of it."""
        return len(self.context) + sum(len(answer) - 1 for answer in self.answers)


def make_text_item(tokens: Sequence[int], num_prompt: int = 1) -> Item:
    """Return a text without a right answer; its first tokens may be a prompt."""
    return Item(tuple(tokens[:num_prompt]), (tuple(tokens[num_prompt:]),), is_text=True)


@dataclass(frozen=True, slots=True)
class Layout:
    """Questions as rows of tokens. A *place* is a number of a token in the flat rows.

    Attributes:
        ids: Token ids, `[P, T]`.
        positions: The place of each token in its own text, `[P, T]`.
        mask: `[1, 1, T, T]`, added to attention scores, if one row holds all; else `[P, T]`.
        targets: For each item and answer, the places that predict the answer's tokens.
        prompts: For each item, the places of its prompt's tokens.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: list[list[list[int]]]
    prompts: list[list[int]]


def lay_out(items: Sequence[Item], model: Any, *, gold_only: bool = False) -> Layout:
    """Lay questions out as one row, or as a row for each answer if the model can't read that.

    Args:
        items: The questions.
        model: The model.
        gold_only: Whether to leave out all answers but the right one.
    """
    answers_of = [[item.answers[item.gold]] if gold_only else item.answers for item in items]
    sizes: list[int] = []  # of the rows, if each answer has its own
    num_tokens = 0  # of the row that holds all
    for item, answers in zip(items, answers_of, strict=True):
        sizes += [len(item.context) + len(answer) - 1 for answer in answers]
        num_tokens += len(item.context) + sum(len(answer) - 1 for answer in answers)
    is_packed = can_pack(model, num_tokens)
    shape = (1, num_tokens) if is_packed else (len(sizes), max(sizes))
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    item_of = torch.full(shape, -1)  # which item a token is of
    answer_of = torch.full(shape, -1)  # which answer it is of; -1 for a prompt
    targets: list[list[list[int]]] = []
    prompts: list[list[int]] = []
    row = 0
    column = 0

    def put(tokens: Sequence[int], position: int, item: int, answer: int) -> list[int]:
        """Put tokens into the rows, and return their places."""
        nonlocal column
        columns = slice(column, column + len(tokens))
        ids[row, columns] = torch.tensor(tokens, dtype=torch.long)
        positions[row, columns] = torch.arange(position, position + len(tokens))
        item_of[row, columns] = item
        answer_of[row, columns] = answer
        start = row * shape[1] + column
        column += len(tokens)
        return list(range(start, start + len(tokens)))

    for number, item in enumerate(items):
        targets.append([])
        for place, answer in enumerate(answers_of[number]):
            if place == 0 or not is_packed:
                prompt = put(item.context, 0, number, -1)
                if place == 0:
                    prompts.append(prompt)
            own = put(answer[:-1], len(item.context), number, place)
            targets[-1].append([prompt[-1], *own])
            if not is_packed:
                row += 1
                column = 0

    mask = (item_of >= 0).long()
    if is_packed:
        is_same_item = item_of[0, :, None] == item_of[0]
        is_seen = (answer_of[0] == -1) | (answer_of[0] == answer_of[0, :, None])
        seen = (is_same_item & is_seen).tril()  # [T, T]
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, lowest)[None, None]
    device = model.device
    return Layout(ids.to(device), positions.to(device), mask.to(device), targets, prompts)


def run_layout(model: Any, layout: Layout, places: Sequence[int]) -> Tensor:
    """Return the log-probabilities of the next token at some places, `[K, V]`."""
    index = torch.tensor(places, device=layout.ids.device)
    options: dict[str, Any] = {}
    is_one_row = len(layout.ids) == 1
    if is_one_row and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = index
    logits = model(
        input_ids=layout.ids,
        position_ids=layout.positions,
        attention_mask=layout.mask,
        use_cache=False,
        **options,
    ).logits
    logits = logits.flatten(0, 1)
    if not options:
        logits = logits[index]
    logprobs: Tensor = logits.float().log_softmax(dim=-1)
    return logprobs


def compute_losses(student: Any, teacher: Any, items: Sequence[Item]) -> list[Tensor]:
    """Return the loss of each question and text, each a scalar.

    Args:
        student: The shortened model.
        teacher: The full model.
        items: The questions and texts.
    """
    layout = lay_out(items, student)
    places: set[int] = set()
    for item, prompt, targets in zip(items, layout.prompts, layout.targets, strict=True):
        places.update(*targets)
        if item.is_text:
            places.update(prompt)
    ordered = sorted(places)
    row_of = {place: row for row, place in enumerate(ordered)}
    logprobs = run_layout(student, layout, ordered)  # [K, V]
    losses: list[Tensor] = []
    for item, prompt, targets in zip(items, layout.prompts, layout.targets, strict=True):
        if item.is_text:
            rows = [row_of[place] for place in [*prompt, *targets[0][1:]]]
            losses.append(_measure_kl(teacher, item, logprobs[rows]))
            continue
        scores: list[Tensor] = []  # the log-probabilities of each answer's tokens
        for answer, target in zip(item.answers, targets, strict=True):
            rows = [row_of[place] for place in target]
            tokens = torch.tensor(answer, device=logprobs.device)
            scores.append(logprobs[rows].gather(1, tokens[:, None])[:, 0])
        for place, first in enumerate(item.num_unscored):
            scores[place] = scores[place][first:]
        loss = -scores[item.gold].mean()
        if item.lengths:
            by_character = [
                score.sum() / length for score, length in zip(scores, item.lengths, strict=True)
            ]
            shares = (SHARPNESS * torch.stack(by_character)).log_softmax(dim=0)
            loss = loss - shares[item.gold]
        losses.append(loss)
    return losses


def _measure_kl(teacher: Any, item: Item, found: Tensor) -> Tensor:
    """Return the mean KL from the full model on a text; `found` are log-probabilities `[K, V]`."""
    layout = lay_out([item], teacher)
    with torch.no_grad():
        expected = run_layout(teacher, layout, [*layout.prompts[0], *layout.targets[0][0][1:]])
    return F.kl_div(found, expected, log_target=True, reduction="none").sum(dim=1).mean()
