"""Policies: what decides, for a prompt, which layers are skipped, executed or repeated.

Owns the one-method interface and the policies that come with the package. A policy of your own
is a class with `decide`; it may look at the prompt through the `PromptView` or ignore it. Leaves
executing the decisions, pinning them and keeping at least one execution to `routing`.

Axes: B rows, T tokens, D hidden, L layers, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.models.routers import RouterStack, Windows, pool
from drllm.paths import Decision, check_decisions


@dataclass(frozen=True, slots=True)
class PromptView:
    """The prompts of a batch as they arrive at one layer.

    Attributes:
        hidden: `[B, T, D]`, the layer's input; padded positions may hold anything.
        readable: `[B, T]` bool: real tokens of the prompt, without padding and without whatever
            lies behind a prompt length that the caller gave.
    """

    hidden: Tensor
    readable: Tensor

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.hidden.shape[0])

    def windows(self, num_windows: int) -> Windows:
        """Return the prompts averaged in W windows; computed when asked for."""
        return pool(self.hidden, self.readable, num_windows)


class Policy(Protocol):
    """Gives the decisions of every row at one layer."""

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one decision per row.

        Args:
            layer: Layer index from 0; layers are asked in order, once per prompt.
            prompts: What the layer is about to read.

        Returns:
            `[B]` integers 0, 1 or 2, on any device.
        """


class FullPolicy:
    """Execute every layer once: the base model."""

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return 1 for every row."""
        return torch.full((prompts.num_rows,), int(Decision.EXECUTE))


class FixedPolicy:
    """Follow given decisions, whatever the prompt says.

    Args:
        decisions: `[L]` for all rows, or `[B, L]`.
        num_layers: L of the model.
        rows_per_prompt: How many neighbouring rows share one row of `decisions`; `generate`
            lays beams and several answers out like that.

    Raises:
        PathError: Decisions that no model of L layers can run.
    """

    def __init__(
        self,
        decisions: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        num_layers: int,
        rows_per_prompt: int = 1,
    ) -> None:
        plan = torch.as_tensor(decisions).cpu()
        rows = plan.tolist() if plan.dim() == 2 else [plan.tolist()]
        self.plan = torch.tensor([check_decisions(row, num_layers) for row in rows])  # [B, L]
        self.shared = plan.dim() == 1
        self.rows_per_prompt = rows_per_prompt

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return column `layer` of the plan."""
        if self.shared:
            return self.plan[:, layer].expand(prompts.num_rows)
        if len(self.plan) * self.rows_per_prompt != prompts.num_rows:
            raise RoutingError(
                f"decisions for {len(self.plan)} prompts were given, the batch has "
                f"{prompts.num_rows // self.rows_per_prompt}; give one row each, or one for all"
            )
        return self.plan[:, layer].repeat_interleave(self.rows_per_prompt)


class LabelsPolicy(FixedPolicy):
    """Follow target paths and record what every router would have read (teacher forcing).

    After a forward pass `means` is `[B, L, W, D]` in float32 and `filled` is `[B]`.

    Args:
        decisions: `[B, L]` target decisions.
        num_windows: W.

    Source: Dr.LLM section 3.3; recording instead of training in the loop is ours (D-09).
    """

    def __init__(self, decisions: Sequence[Sequence[int]] | Tensor, num_windows: int) -> None:
        plan = torch.as_tensor(decisions)
        super().__init__(plan, plan.shape[-1])
        self.num_windows = num_windows
        self._means: list[Tensor] = []
        self.filled = torch.empty(0, dtype=torch.long)

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Record the windows at this layer and return its labels."""
        if layer == 0:
            self._means = []
        windows = prompts.windows(self.num_windows)
        self._means.append(windows.means)
        self.filled = windows.filled
        return super().decide(layer, prompts)

    @property
    def means(self) -> Tensor:
        """Every router's input, `[B, L, W, D]`."""
        return torch.stack(self._means, dim=1)


class RandomPolicy:
    """Draw each decision at random with the same probabilities at every layer.

    Args:
        probabilities: Of skip, execute and repeat; they add up to 1.
        generator: Source of randomness.
    """

    def __init__(
        self, probabilities: tuple[float, float, float], generator: torch.Generator
    ) -> None:
        self.probabilities = torch.tensor(probabilities)
        self.generator = generator

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one draw per row."""
        return torch.multinomial(
            self.probabilities, prompts.num_rows, replacement=True, generator=self.generator
        )


class RouterPolicy:
    """Ask the trained routers: argmax of a layer's logits on the windows of its input.

    Args:
        routers: One router per layer.

    Source: Dr.LLM section 3.2.
    """

    def __init__(self, routers: RouterStack) -> None:
        self.routers = routers

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return the routers' decisions."""
        windows = prompts.windows(self.routers.config.num_windows)
        with torch.autocast(prompts.hidden.device.type, enabled=False), torch.no_grad():
            return self.routers.layer_logits(layer, windows).argmax(dim=-1)
