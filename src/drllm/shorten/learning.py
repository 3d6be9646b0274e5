"""The loss of a shortened model that learns right answers, and the passes that compute it.

For a question with options, an option's score is its log-probability divided by its characters, and
the loss is the cross-entropy of the right option among the softmax of the scores. For a right
answer in text it is the mean next-token loss of the answer. To both comes the KL from the full
model, a token, on the question and the right answer. Texts have the KL alone.

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
KL_WEIGHT = 0.5


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


@dataclass(frozen=True, slots=True)
class Layout:
    """Questions as rows of tokens.

    Attributes:
        ids: Token ids, `[P, T]`.
        positions: The place of each token in its own text, `[P, T]`.
        mask: `[1, 1, T, T]`, added to attention scores, if one row holds all; else `[P, T]`.
        targets: For each item and answer, the places in the flat rows that predict the answer's
            tokens.
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
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    owners: list[list[tuple[int, int]]] = []  # (item, 0 for the prompt or the answer's number)
    targets: list[list[list[int]]] = []
    prompts: list[list[int]] = []
    places: list[list[tuple[int, int]]] = []
    is_packed = can_pack(model, sum(item.num_tokens for item in items))
    for number, item in enumerate(items):
        answers = [item.answers[item.gold]] if gold_only else list(item.answers)
        item_targets = []
        for place, answer in enumerate(answers):
            if not is_packed or (number == 0 and place == 0):
                rows.append([])
                positions.append([])
                owners.append([])
            row = rows[-1]
            if not is_packed or place == 0:
                start = len(row)
                row += item.context
                positions[-1] += range(len(item.context))
                owners[-1] += [(number, 0)] * len(item.context)
                end = len(row) - 1
                if place == 0:
                    prompts.append([(len(rows) - 1, column) for column in range(start, len(row))])
            first = len(row)
            row += answer[:-1]
            positions[-1] += range(len(item.context), len(item.context) + len(answer) - 1)
            owners[-1] += [(number, place + 1)] * (len(answer) - 1)
            columns = [end, *range(first, len(row))]
            item_targets.append([(len(rows) - 1, column) for column in columns])
        targets.append(item_targets)
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    all_positions = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        all_positions[number, : len(row)] = torch.tensor(positions[number])
        mask[number, : len(row)] = 1
    if is_packed:
        owner = torch.tensor(owners[0])  # [T, 2]
        same_item = owner[:, None, 0] == owner[None, :, 0]
        is_seen = (owner[None, :, 1] == 0) | (owner[:, None, 1] == owner[None, :, 1])
        seen = (same_item & is_seen).tril()  # [T, T]
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, lowest)[None, None]
    flat = [
        [[row * width + column for row, column in part] for part in of_item] for of_item in targets
    ]
    flat_prompts = [[row * width + column for row, column in part] for part in prompts]
    device = model.device
    return Layout(ids.to(device), all_positions.to(device), mask.to(device), flat, flat_prompts)


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
    return logits.float().log_softmax(dim=-1)


def compute_losses(
    student: Any,
    teacher: Any,
    items: Sequence[Item],
    *,
    form: str = "options",
    kl_weight: float = KL_WEIGHT,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of right answers over items, and the mean KL from the teacher.

    Args:
        student: The shortened model.
        teacher: The full model; None leaves the KL out.
        items: The questions and texts.
    """
    layout = lay_out(items, student)
    places: list[int] = []
    for number in range(len(items)):
        places += layout.prompts[number]
        for target in layout.targets[number]:
            places += target
    places = sorted(set(places))
    order = {place: number for number, place in enumerate(places)}
    logprobs = run_layout(student, layout, places)  # [K, V]
    losses = []
    for number, item in enumerate(items):
        scores = []
        gold_loss = None
        for place, answer in enumerate(item.answers):
            slots = [order[place] for place in layout.targets[number][place]]
            values = logprobs[slots].gather(
                1, torch.tensor(answer, device=logprobs.device)[:, None]
            )[:, 0]
            first = item.num_unscored[place] if item.num_unscored else 0
            if item.lengths:
                scores.append(values[first:].sum() / item.lengths[place])
            if place == item.gold:
                gold_loss = -values[first:].mean()
        if item.is_text:
            continue
        if item.lengths and form in ("options", "both"):
            target = torch.tensor([item.gold], device=logprobs.device)
            losses.append(F.cross_entropy(SHARPNESS * torch.stack(scores)[None], target))
        if not item.lengths or form in ("answer", "both"):
            losses.append(gold_loss)
    loss = torch.stack(losses).sum() / len(items) if losses else logprobs.new_zeros(())
    if teacher is None or kl_weight == 0:
        return loss, logprobs.new_zeros(())
    teacher_layout = lay_out(items, teacher, gold_only=True)
    teacher_places = []
    student_places = []
    weights = []
    for number, item in enumerate(items):
        own = teacher_layout.prompts[number] + teacher_layout.targets[number][0][1:]
        teacher_places += own
        student_places += layout.prompts[number] + layout.targets[number][item.gold][1:]
        weights += [1 / (len(own) * len(items))] * len(own)
    with torch.no_grad():
        expected = run_layout(teacher, teacher_layout, teacher_places)  # [K, V]
    found = logprobs[[order[place] for place in student_places]]
    kls = F.kl_div(found, expected, log_target=True, reduction="none").sum(dim=-1)  # [K]
    kl = (kls * torch.tensor(weights, device=kls.device)).sum()
    return loss, kl
