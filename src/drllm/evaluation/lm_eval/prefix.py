"""What prompts begin with, such as worked examples, is read once for all that follow one plan.

Axes: B prompts, L layers, T tokens.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.models.base.layers import can_split
from drllm.models.routing.batch_generation import LOOKS_BACK
from drllm.models.routing.generate import options_of
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import Policy, one_plan
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import MIN_PREFIX, prefix_length


class CommonPrefix:
    """Reads what the prompts of a batch begin with once, and keeps it for the batches that follow.

    That takes one plan for all, known before they are read, and a model that may read a prompt in
    parts (see `can_split`). What is generated is the same, up to the last bits of the logits.
    """

    def __init__(self, routed: RoutedModel) -> None:
        self.routed = routed
        self._can_split = can_split(routed.model)
        self._last: tuple[Any, list[int], Any, Any] = None, [], None, None

    def before(
        self, policy: Policy, ids: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any], Tensor] | None:
        """Return the prompts, the options with the K/V of their prefix, and the routes `[B, L]`.

        Padding, on the left of `ids` `[B, T]`, goes behind the prefix. The options are those of
        `generate`, the mask among them. None where the prompts have to be read whole.
        """
        option, mask = options_of(self.routed.model, options), options["attention_mask"]
        copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        plan = one_plan(policy, self.routed.num_layers)
        others = any(map(option, (*LOOKS_BACK, "cache_implementation")))
        if plan is None or copies > 1 or others or not self._can_split:
            return None
        starts = (ids.shape[1] - mask.sum(dim=1)).tolist()
        rows = [row[start:] for row, start in zip(ids.tolist(), starts, strict=True)]
        common = rows[0][: prefix_length(rows)]
        followed, tokens, *_ = self._last
        num = len(tokens) if followed == plan and tokens == common[: len(tokens)] else 0
        if len(rows) > 1 and len(common) >= max(MIN_PREFIX, 2 * num):
            num = len(common)
            self._last = plan, common, *self._read(plan, common)
        if num == 0:
            return None
        order = [[*range(s, s + num), *range(s), *range(s + num, ids.shape[1])] for s in starts]
        index = torch.tensor(order, device=ids.device)
        *_, cache, route = copy.deepcopy(self._last)
        cache.batch_repeat_interleave(len(rows))
        given = {"attention_mask": mask.gather(1, index), cache_argument(self.routed.model): cache}
        return ids.gather(1, index), {**options, **given}, route.expand(len(rows), -1)

    def _read(self, plan: Any, tokens: list[int]) -> tuple[Cache, Tensor]:
        ids = torch.tensor([tokens], device=self.routed.model.device)
        with torch.no_grad(), self.routed.using(self.routed.policy_of(plan)):
            output = self.routed.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = next(value for value in output.values() if isinstance(value, Cache))
        return cache, self.routed.last_route
