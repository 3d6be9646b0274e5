"""Read the common beginning of prompts, such as worked examples, once for all under one plan.

Axes: B prompts, L layers, T tokens.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.models.base.layers import can_split
from drllm.models.routing.batch_generation import LOOKS_BACK
from drllm.models.routing.generate import make_option_lookup
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import Policy, find_shared_plan
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import MIN_PREFIX, count_common_tokens


@dataclass(frozen=True, slots=True)
class PrefixedPrompts:
    """Prompts of which a beginning has been read."""

    ids: Tensor  # [B, T]
    options: dict[str, Any]  # of `generate`, with the K/V of the beginning
    routes: Tensor  # [B, L]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A beginning that was read under a plan."""

    plan: Any
    tokens: list[int]
    cache: Cache  # of one row
    route: Tensor  # [1, L]


class CommonPrefix:
    """Reads the common beginning of a batch's prompts once, and keeps it for later batches.

    It takes one plan for all, known before they are read, and a model that may read a prompt in
    parts (see `can_split`). What is generated is the same, up to the last bits of the logits.
    """

    def __init__(self, routed: RoutedModel) -> None:
        self.routed = routed
        self._can_split = can_split(routed.model)
        self._last: _Prefix | None = None

    def read(
        self, policy: Policy, ids: Tensor, options: Mapping[str, Any]
    ) -> PrefixedPrompts | None:
        """Read the common beginning of prompts, unless it is there from an earlier batch.

        Args:
            policy: Decides on the prompts.
            ids: Prompts, padded on the left, `[B, T]`. The padding goes behind the beginning.
            options: Those of `generate`, the mask among them.

        Returns:
            None where the prompts have to be read whole.
        """
        plan = find_shared_plan(policy, self.routed.num_layers)
        if plan is None or not self._can_split or self._looks_back(options):
            return None
        mask = options["attention_mask"]
        starts = (ids.shape[1] - mask.sum(dim=1)).tolist()
        prompts = [row[start:] for row, start in zip(ids.tolist(), starts, strict=True)]
        prefix = self._find(plan, prompts)
        if prefix is None:
            return None
        num = len(prefix.tokens)
        columns = []
        for start in starts:
            beginning = range(start, start + num)
            padding = range(start)
            rest = range(start + num, ids.shape[1])
            columns.append([*beginning, *padding, *rest])
        index = torch.tensor(columns, device=ids.device)
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(prompts))
        options = {
            **options,
            "attention_mask": mask.gather(1, index),
            cache_argument(self.routed.model): cache,
        }
        routes = prefix.route.expand(len(prompts), -1)
        return PrefixedPrompts(ids.gather(1, index), options, routes)

    def _looks_back(self, options: Mapping[str, Any]) -> bool:
        """Tell whether options of `generate` need the whole prompt, copies of it, or a cache."""
        option = make_option_lookup(self.routed.model, options)
        if (option("num_beams") or 1) > 1 or (option("num_return_sequences") or 1) > 1:
            return True
        return any(option(name) for name in (*LOOKS_BACK, "cache_implementation"))

    def _find(self, plan: Any, prompts: list[list[int]]) -> _Prefix | None:
        """Return the longest beginning that is worth using, read anew if it grew much."""
        common = prompts[0][: count_common_tokens(prompts)]
        last = self._last
        if last is not None and (last.plan != plan or last.tokens != common[: len(last.tokens)]):
            last = None
        num_read = 0 if last is None else len(last.tokens)
        if len(prompts) > 1 and len(common) >= max(MIN_PREFIX, 2 * num_read):
            last = self._last = self._run(plan, common)
        return last

    def _run(self, plan: Any, tokens: list[int]) -> _Prefix:
        ids = torch.tensor([tokens], device=self.routed.model.device)
        with torch.no_grad(), self.routed.using(self.routed.policy_of(plan)):
            output = self.routed.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = next(value for value in output.values() if isinstance(value, Cache))
        return _Prefix(plan, tokens, cache, self.routed.last_route)
