"""What reading a task's prompts costs under the routes that a system took: derived, not measured.

Owns the means over a task's questions. Leaves the counts of one prompt to `derived_cost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from drllm.errors import ArchitectureError
from drllm.evaluation.flops import ModelShape, forward_flops, kv_bytes
from drllm.paths import Decisions


@dataclass(frozen=True, slots=True)
class PromptCost:
    """The cost of routes on the prompts of one task.

    Attributes:
        shape: Of the model; None where its cost doesn't follow from its matrices.
        num_tokens: Of each prompt.
        note: Why nothing is derived; empty where it is.
    """

    shape: ModelShape | None
    num_tokens: Sequence[int]
    note: str = ""

    @classmethod
    def of(cls, model: Any, num_tokens: Sequence[int]) -> PromptCost:
        """Read a model's shape, unless its cost can't be derived.

        Args:
            model: The base model.
            num_tokens: Of each prompt.
        """
        try:
            return cls(ModelShape.of(model), num_tokens)
        except ArchitectureError as error:
            return cls(None, num_tokens, str(error))

    def row(self, draws: Sequence[Sequence[Decisions]]) -> dict[str, Any]:
        """Return what a system's line of the table says of its cost.

        Args:
            draws: For each draw, every question's decisions; empty where a path can't be expressed
                by decisions.

        Returns:
            `prompt_flops`: FLOPs of reading a prompt and predicting one token, the part that grows
            with the square of the length apart (`attention`); `kv_bytes_per_token`: of the cache.
            Means over questions and draws; None where they can't be derived.
        """
        if self.shape is None or not draws:
            return {"prompt_flops": None, "kv_bytes_per_token": None}
        flops = [
            forward_flops(self.shape, decisions, tokens)
            for draw in draws
            for decisions, tokens in zip(draw, self.num_tokens, strict=True)
        ]
        kept = [kv_bytes(self.shape, decisions) for draw in draws for decisions in draw]
        return {
            "prompt_flops": {
                "weights": fmean(each.weights for each in flops),
                "attention": fmean(each.attention for each in flops),
            },
            "kv_bytes_per_token": fmean(kept),
        }
