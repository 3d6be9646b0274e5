"""Greedy answers for many (prompt, decisions) pairs at once, each until it can be graded.

Prompts are read as packed rows, so that paths of one prompt share their common prefixes, within a
call and across calls, and prompts share what they begin with; then they are decoded as an ordinary
routed batch with a cache of its own.

Axes: P prompts, N pairs, V vocabulary.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from drllm.models.base.devices import on_device
from drllm.models.routing.generate import end_tokens
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize, prefix_cache
from drllm.models.scoring.kl import KlFromFull
from drllm.models.scoring.packing import Request, Tokens
from drllm.models.scoring.prefix_sharing import Pair, packed_rows

Grader: TypeAlias = Callable[[int, str, bool], float | None]
"""Called with a pair's place, its text so far, and whether that is all; None while undecided."""

# Steps' worth of work on answered rows before they are dropped, which copies all others' K and V.
MOST_IDLE = 0.3


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """A greedily generated answer."""

    text: str  # as far as it was generated
    tokens: tuple[int, ...]  # without the end-of-sequence token
    grade: float
    logprob: float  # mean over the tokens generated (with the end of sequence), in nats
    kl: float | None = None  # as in a `Score`


class AnswerBatch:
    """Prompts, as tokens, that are answered greedily, each pair under its own decisions.

    `state_cache_gb` and `paths_per_pass` are those of a `ChoiceBatch`; `rows` are the prompts'
    rows, with the states of their paths.
    """

    def __init__(
        self,
        routed: RoutedModel,
        tokenizer: Any,
        contexts: Sequence[Tokens],
        state_cache_gb: float | None,
        *,
        paths_per_pass: int | None = None,
    ) -> None:
        self.routed = routed
        self.tokenizer = tokenizer
        self.states = prefix_cache(state_cache_gb, routed.model.device)
        questions = [Request(context) for context in contexts]
        self.rows = packed_rows(routed, questions, self.states, keep_kv=True)
        self._kl = KlFromFull(self.rows)
        self.forget = self._kl.forget
        self._batcher = MemoryBatcher(routed.model, self.states, paths_per_pass)
        self._lengths = torch.tensor([len(context) for context in contexts])
        self._ends = set(end_tokens(routed.model.generation_config.eos_token_id))
        self._cache_argument = cache_argument(routed.model)

    def answers(
        self,
        pairs: Sequence[Pair],
        max_new_tokens: Sequence[int],
        grader: Grader,
        *,
        kl: bool = False,
    ) -> list[ScoredAnswer]:
        """Generate until every pair of a prompt's place and decisions is graded.

        An answer stops as soon as the grader has graded the text so far. As far as it goes, it is
        what greedy `generate` of the routed model gives without logits processors: a repetition
        penalty in a model's generation settings is not applied (docs/differences.md, D-19). `kl`
        measures that too, in the passes that read the prompts.
        """
        read, written = self.rows.packed.mask.shape[-1], max(max_new_tokens, default=0)
        size = PathSize(read + written, read if kl else 1, keeps_kv=True)

        def generate(places: Sequence[int]) -> list[ScoredAnswer]:
            answers: dict[int, ScoredAnswer] = {}
            tokens: dict[int, list[int]] = {place: [] for place in places}
            totals = dict.fromkeys(places, 0.0)
            going = list(places)
            wanted = [pairs[place] for place in places]
            asked = self._kl.with_full(wanted) if kl else list(dict.fromkeys(wanted))
            num_kept = [self.rows.packed.num_own[row] if kl else 1 for row, _ in asked]
            with self.rows.run(asked, num_kept) as shared:
                last = {pair: values[-1] for pair, values in zip(asked, shared.logits, strict=True)}
                kls = self._kl.measure(asked, shared.logits) if kl else {}
                logits = torch.stack([last[pair] for pair in wanted])  # [N, V]
                cache = shared.routed_cache(wanted)
            lengths = self._lengths[[pairs[place][0] for place in places]][:, None]
            width = int(lengths.max())
            lengths = on_device(lengths, logits.device)
            mask = (torch.arange(width, device=logits.device) >= width - lengths).long()
            positions, idle = lengths - 1, 0.0
            for step in itertools.count(1):
                highest, best = logits.float().max(dim=-1)  # [rows]
                logprobs = highest - logits.float().logsumexp(dim=-1)
                said = zip(going, best.tolist(), logprobs.tolist(), strict=True)
                for place, token, logprob in said:
                    if place in answers:
                        continue
                    totals[place] += logprob
                    is_end = token in self._ends
                    if not is_end:
                        tokens[place].append(token)
                    text = self.tokenizer.decode(tokens[place], skip_special_tokens=True)
                    grade = grader(place, text, is_end or step == max_new_tokens[place])
                    if grade is not None:
                        own, mean = tuple(tokens[place]), totals[place] / step
                        answers[place] = ScoredAnswer(text, own, grade, mean, kls.get(pairs[place]))
                left = [row for row, place in enumerate(going) if place not in answers]
                over = [row for row, place in enumerate(going) if place in answers]
                if not left:
                    break
                idle += len(over) / len(going)
                if idle > MOST_IDLE:
                    idle, over = 0.0, []
                    keep = on_device(left, best.device)
                    cache.batch_select_indices(keep)
                    best, mask, positions = best[keep], mask[keep], positions[keep]
                    going = [going[row] for row in left]
                mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
                positions = positions + 1
                if over:  # never beyond the context, nor the largest position of all
                    positions[on_device(over, positions.device)] = 0
                with torch.no_grad(), self.routed.injection.driven_by(self.routed.driver):
                    logits = self.routed.model(
                        input_ids=best[:, None],
                        attention_mask=mask,
                        position_ids=positions,
                        use_cache=True,
                        **{self._cache_argument: cache},
                    ).logits[:, -1]
            return [answers[place] for place in places]

        return self._batcher.run(range(len(pairs)), size, generate)
