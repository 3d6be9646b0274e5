"""Read the common beginning of prompts, such as worked examples, only once.

This is possible if one plan is run for all prompts.

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
    """Prompts whose common beginning is in a cache, as arguments of `generate`."""

    ids: Tensor  # [B, T]
    options: dict[str, Any]  # with the mask and the cache
    routes: Tensor  # [B, L]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The beginning of prompts, and its cache from reading it under a plan."""

    plan: Any
    tokens: list[int]
    cache: Cache  # with one row
    route: Tensor  # [1, L]


class CommonPrefix:
    """Reads the common beginning of a batch's prompts once, and keeps it for later batches.

    This needs a single plan for all prompts that is known before they are read, and a model that
    can read prompts in parts (see `can_split`). The generated text is the same as for prompts that
    are read whole, up to the last bits of the logits.
    """

    def __init__(self, routed: RoutedModel) -> None:
        self.routed = routed
        self._can_split = can_split(routed.model)
        self._last: _Prefix | None = None

    def read(
        self, policy: Policy, ids: Tensor, options: Mapping[str, Any]
    ) -> PrefixedPrompts | None:
        """Read the common beginning of prompts, unless an earlier batch has done so.

        Args:
            policy: Decides on the prompts.
            ids: Prompts, padded on the left, `[B, T]`. The result has the padding after the
                beginning.
            options: The options of `generate`, with the mask.

        Returns:
            The prompts, or None if they have to be read whole.
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
        columns = []
        for start in starts:
            end = start + len(prefix.tokens)
            beginning = range(start, end)
            padding = range(start)
            remainder = range(end, ids.shape[1])
            columns.append([*beginning, *padding, *remainder])
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
        """Tell whether `generate` needs whole prompts, copies of prompts, or another cache."""
        option = make_option_lookup(self.routed.model, options)
        num_beams = option("num_beams") or 1
        num_sequences = option("num_return_sequences") or 1
        if num_beams > 1 or num_sequences > 1:
            return True
        return any(option(name) for name in (*LOOKS_BACK, "cache_implementation"))

    def _find(self, plan: Any, prompts: list[list[int]]) -> _Prefix | None:
        """Return the beginning to use; None if there is none.

        The last beginning is used again if it fits, unless the prompts have twice as much in
        common.
        """
        common = prompts[0][: count_common_tokens(prompts)]
        prefix = self._last
        if prefix is not None:
            begins_alike = prefix.tokens == common[: len(prefix.tokens)]
            if prefix.plan != plan or not begins_alike:
                prefix = None
        num_read = 0 if prefix is None else len(prefix.tokens)
        if len(prompts) > 1 and len(common) >= max(MIN_PREFIX, 2 * num_read):
            prefix = self._run(plan, common)
            self._last = prefix
        return prefix

    def _run(self, plan: Any, tokens: list[int]) -> _Prefix:
        """Read a beginning under a plan."""
        ids = torch.tensor([tokens], device=self.routed.model.device)
        with torch.no_grad(), self.routed.using(self.routed.policy_of(plan)):
            output = self.routed.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = next(value for value in output.values() if isinstance(value, Cache))
        return _Prefix(plan, tokens, cache, self.routed.last_route)
