"""`RoutedModel`: a frozen Hugging Face model with a policy that decides how often each layer runs.

Owns the public surface: attach, generate, pin decisions, say where prompts end, save, load,
detach. Leaves everything that happens inside a forward pass to `injection` and `routing`.

Axes: B rows, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.config import ModelConfig
from drllm.errors import CheckpointError, RoutingError
from drllm.models.injection import Injection
from drllm.models.loading import fingerprint, load
from drllm.models.policies import FixedPolicy, FullPolicy, Policy, RouterPolicy
from drllm.models.routers import RouterStack
from drllm.models.routing import PLANS, RoutingDriver


class RoutedModel:
    """A base model under routing.

    The model is used in place: `routed.model` is the same object, its weights and state-dict
    keys unchanged, and from then on its forward passes are routed. A pass that starts with an
    empty cache, or has none, is taken for a prompt; its decisions hold for whatever follows on
    the same cache. Generation without a cache has nothing to hold them in: use `generate` below,
    which keeps them, instead of the model's own. Without routers and without a policy every layer
    is executed once, bit for bit as before.

    Args:
        model: A decoder-only model of transformers.
        routers: Trained routers for exactly this model.
        policy: Any other policy; give routers or a policy, not both.
        tokenizer: The model's tokenizer, for whatever starts from texts (`search_path`).

    Raises:
        ArchitectureError: The model's layers can't be routed exactly.
        CheckpointError: The routers were made for another model.
        RoutingError: Both routers and a policy, or a model that is routed already.

    Source: Dr.LLM section 3; injection into stock models is ours (D-01).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=3, num_attention_heads=4)
        >>> routed = RoutedModel(LlamaForCausalLM(config))
        >>> with routed.fixed([1, 0, 2]):
        ...     output = routed.model(torch.tensor([[1, 2, 3]]))
        >>> routed.last_route
        tensor([[1, 0, 2]])
    """

    def __init__(
        self,
        model: Any,
        routers: RouterStack | None = None,
        *,
        policy: Policy | None = None,
        tokenizer: Any = None,
    ) -> None:
        if routers is not None and policy is not None:
            raise RoutingError("give routers or a policy, not both: only one of them can decide")
        if routers is not None:
            check_routers(model, routers)
            routers = routers.to(model.device)
            policy = RouterPolicy(routers)
        self.model: Any = model
        self.routers = routers
        self.tokenizer = tokenizer
        self.driver = RoutingDriver(policy)
        self.injection = Injection(model, self.driver)
        self._attached = True

    @classmethod
    def from_pretrained(
        cls,
        routers_dir: Path | str,
        base: Any = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
    ) -> RoutedModel:
        """Load routers and the base model they belong to.

        Args:
            routers_dir: A folder that `drllm train` or `save_pretrained` has written.
            base: The base model, or its id or folder; None takes it from `router_config.json`.
            dtype: Of the base model, as `--dtype`.
            device: Of the base model, as `--device`.

        Raises:
            CheckpointError: Broken routers, or routers of another model.
            ModelError: The base model can't be had.
        """
        routers = RouterStack.load(routers_dir)
        if base is None or isinstance(base, (str, Path)):
            name = str(base or routers.config.base_model)
            revision = routers.config.base_revision if base is None else None
            loaded = load(ModelConfig(model=name, revision=revision, dtype=dtype, device=device))
            return cls(loaded.model, routers, tokenizer=loaded.tokenizer)
        return cls(base, routers)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.injection.num_layers

    @property
    def last_route(self) -> Tensor:
        """The decisions of the last prompts that passed, int `[B, L]`.

        `generate` lays out a row for every beam and every answer, so B counts these.

        Raises:
            RoutingError: No prompt has passed yet.
        """
        if self.driver.last_route is None:
            raise RoutingError("no prompt has passed through this routed model yet")
        return self.driver.last_route

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """Generate with the base model's own `generate`; decisions are made once per prompt.

        Args:
            args: Whatever `model.generate` takes by position (the token ids).
            inputs: Whatever it takes by name.

        Returns:
            What `model.generate` returns.

        Raises:
            RoutingError: `use_cache=False` with beams, whose rows change places without a cache
                that could carry their decisions along; `prefill_chunk_size` with a policy that
                reads the prompt, since it would decide on the first chunk; a detached model.
        """
        self._check_attached()
        config = inputs.get("generation_config") or self.model.generation_config
        beams = inputs.get("num_beams") or config.num_beams or 1
        if inputs.get("use_cache", config.use_cache) is False and beams > 1:
            raise RoutingError(
                "beam search without a cache can't keep each row's decisions; use the cache"
            )
        policy = self.driver.current_policy
        chunk = inputs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if chunk is not None and not isinstance(policy, PLANS):
            raise RoutingError(
                f"prefill_chunk_size={chunk} would let the policy decide on the first chunk of the "
                f"prompt alone; leave it out, or pin a plan with routed.fixed(...)"
            )
        copies = max(beams, inputs.get("num_return_sequences") or config.num_return_sequences or 1)
        with self.driver.session():
            if isinstance(policy, FixedPolicy) and not policy.shared and copies > 1:
                expanded = FixedPolicy(policy.plan, self.num_layers, rows_per_prompt=copies)
                with self.driver.using(expanded):
                    return self.model.generate(*args, **inputs)
            return self.model.generate(*args, **inputs)

    @contextmanager
    def using(self, policy: Policy) -> Iterator[None]:
        """Let another policy decide inside the block."""
        self._check_attached()
        with self.driver.using(policy):
            yield

    @contextmanager
    def fixed(self, decisions: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Iterator[None]:
        """Pin a plan inside the block.

        Args:
            decisions: `[L]` for every row, or `[B, L]`.

        Raises:
            PathError: Decisions that this model can't run.
        """
        with self.using(FixedPolicy(decisions, self.num_layers)):
            yield

    @contextmanager
    def prompt_lengths(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Say where each row's prompt ends, for scoring continuations inside the block.

        Routers then read the prompt alone, never the continuation that is being scored.

        Args:
            lengths: `[B]`, in real tokens, from 1.
        """
        with self.driver.prompt_lengths(torch.as_tensor(lengths)):
            yield

    def detach(self) -> Any:
        """Take the routing off and return the model, exactly what it was before.

        Raises:
            RoutingError: It was taken off already, or somebody put another override over ours.
        """
        self._check_attached()
        self.injection.remove()
        self._attached = False
        return self.model

    def _check_attached(self) -> None:
        if not self._attached:
            raise RoutingError(
                "the routing was taken off this model by detach(); make a new RoutedModel"
            )

    def save_pretrained(self, folder: Path | str) -> None:
        """Save the routers; the base model isn't copied.

        Raises:
            RoutingError: There are no routers.
        """
        if self.routers is None:
            raise RoutingError("there are no routers to save: this model follows a policy")
        self.routers.save(folder)


def check_routers(model: Any, routers: RouterStack) -> None:
    """Refuse routers that were made for another model.

    Raises:
        CheckpointError: Another class, L, D or fingerprint; another id alone is a warning.
    """
    config = routers.config
    text = model.config.get_text_config()
    found = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "base_class": type(model).__name__,
        "base_fingerprint": fingerprint(model),
    }
    for name, value in found.items():
        expected = getattr(config, name)
        if expected not in ("", value):
            raise CheckpointError(
                f"these routers were trained for {config.base_model or 'another model'} with "
                f"{name} {expected}, this model has {value}; load the model they belong to, or "
                f"train routers for this one"
            )
    name = getattr(model, "name_or_path", "")
    if config.base_model and name and config.base_model != name:
        warnings.warn(
            f"the routers name {config.base_model!r} as their base, the model is {name!r}; "
            f"the weights are the same",
            stacklevel=2,
        )


__all__ = ["FullPolicy", "RoutedModel", "check_routers"]
