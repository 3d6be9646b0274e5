"""Read the text that all prompts of a batch begin with, such as worked examples, only once.

This is possible if all prompts run the same plan.

Axes: B prompts, L layers, T tokens.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.model.layers import can_split
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import LOOKS_BACK
from drllm.models.routing.generate import make_option_lookup
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import Policy, find_shared_plan
from drllm.models.scoring.prefix_sharing import MIN_PREFIX, count_common_tokens


@dataclass(frozen=True, slots=True)
class PrefixedPrompts:
    """Arguments of `generate` for prompts whose common beginning is already read.

    Attributes:
        ids: The whole prompts, padded between the common beginning and the remainder, `[B, T]`.
        options: The options of `generate`, with the mask, and the cache of the beginning.
        routes: The routes of the prompts, `[B, L]`.
    """

    ids: Tensor
    options: dict[str, Any]
    routes: Tensor


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The common beginning of prompts, which was read under a plan."""

    plan: Any
    tokens: list[int]
    cache: Cache  # the K/V of the tokens, in one row
    route: Tensor  # [1, L]


class CommonPrefix:
    """Reads the common beginning of a batch's prompts once, and keeps it for later batches.

    All prompts must have the same plan, which must be known before they are read. The model must be
    able to read prompts in parts (see `can_split`). The generated text is the same as for prompts
    that are read whole, up to the last bits of the logits.
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
            ids: Prompts, padded on the left, `[B, T]`.
            options: The options of `generate`, with the mask.

        Returns:
            The arguments of `generate`, or None if the prompts have to be read whole.
        """
        plan = find_shared_plan(policy, self.routed.num_layers)
        if plan is None or not self._can_split or self._needs_whole_prompts(options):
            return None
        mask = options["attention_mask"]
        starts = (ids.shape[1] - mask.sum(dim=1)).tolist()
        prompts = [row[start:] for row, start in zip(ids.tolist(), starts, strict=True)]
        prefix = self._find(plan, prompts)
        if prefix is None:
            return None
        index = _order_columns(starts, len(prefix.tokens), ids.shape[1]).to(ids.device)
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(prompts))
        options = {
            **options,
            "attention_mask": mask.gather(1, index),
            cache_argument(self.routed.model): cache,
        }
        routes = prefix.route.expand(len(prompts), -1)
        return PrefixedPrompts(ids.gather(1, index), options, routes)

    def _needs_whole_prompts(self, options: Mapping[str, Any]) -> bool:
        """Tell whether `generate` must read the prompts itself with these options.

        It must for options that copy prompts, read earlier tokens, or choose another cache.
        """
        option = make_option_lookup(self.routed.model, options)
        num_beams = option("num_beams") or 1
        num_sequences = option("num_return_sequences") or 1
        if num_beams > 1 or num_sequences > 1:
            return True
        return any(option(name) for name in (*LOOKS_BACK, "cache_implementation"))

    def _find(self, plan: Any, prompts: list[list[int]]) -> _Prefix | None:
        """Return a common beginning of the prompts; None if it is too short to be read once.

        The last beginning is used again if the prompts have it, unless they have at least twice as
        many tokens in common.
        """
        common = prompts[0][: count_common_tokens(prompts)]
        prefix = self._last
        if prefix is not None:
            fits_prompts = prefix.tokens == common[: len(prefix.tokens)]
            if prefix.plan != plan or not fits_prompts:
                prefix = None
        num_read = 0
        if prefix is not None:
            num_read = len(prefix.tokens)
        if len(prompts) > 1 and len(common) >= max(MIN_PREFIX, 2 * num_read):
            prefix = self._read_tokens(plan, common)
            self._last = prefix
        return prefix

    def _read_tokens(self, plan: Any, tokens: list[int]) -> _Prefix:
        """Run the model on a beginning under a plan, and return its cache and route."""
        ids = torch.tensor([tokens], device=self.routed.model.device)
        with torch.no_grad(), self.routed.using(self.routed.build_policy(plan)):
            output = self.routed.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = next(value for value in output.values() if isinstance(value, Cache))
        return _Prefix(plan, tokens, cache, self.routed.last_route)


def _order_columns(starts: list[int], num_common: int, num_columns: int) -> Tensor:
    """Return the columns of left-padded prompts in a new order, with the beginning first, `[B, T]`.

    The columns of each prompt are those of the common beginning, then the padding, then the
    remainder of the prompt. The cache of the beginning fits all rows then.

    Args:
        starts: The column of each prompt's first token.
        num_common: The number of tokens of the common beginning.
        num_columns: T.
    """
    order = []
    for start in starts:
        end = start + num_common
        beginning = range(start, end)
        padding = range(start)
        remainder = range(end, num_columns)
        order.append([*beginning, *padding, *remainder])
    return torch.tensor(order)
