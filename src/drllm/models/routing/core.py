"""`Routing`: a policy on a frozen model decides how often each layer runs.

`RoutedModel` (routed_model.py) adds to it what users expect of a model: loading and saving,
devices and precisions, and functions for many prompts. Everything that only runs a routed model
needs this class alone.

Axes: B rows, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.model import load as loading
from drllm.model.layers import unwrap_peft
from drllm.models.routers.checkpoint import check_routers
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import check_bypass
from drllm.models.routing.driver import RoutingDriver
from drllm.models.routing.generate import GenerateHandle, take_off_overrides
from drllm.models.routing.injection import Driver, Injection
from drllm.models.routing.policies import (
    FixedPolicy,
    FullPolicy,
    PathPolicy,
    Policy,
    RouterPolicy,
    describe_policy,
)
from drllm.paths import StaticPath
from drllm.records.static_paths import read_path

PlanLike: TypeAlias = "StaticPath | Sequence[int] | Sequence[Sequence[int]] | Tensor"
"""What prompts can be pinned to: a path or decisions."""

MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))
"""The attributes by which torch, accelerate and the Trainer of transformers read a module."""


def take_off_routing(model: Any) -> Callable[[], None]:
    """Take the routing off a model, and return a function that puts it back."""
    injection = Injection.find(model)
    if injection is None:
        return lambda: None
    base = unwrap_peft(model)
    injection.remove()
    overrides = take_off_overrides(base)

    def put_back() -> None:
        injection.install()
        for name, override in overrides.items():
            setattr(base, name, override)

    return put_back


def _explain_missing(name: str) -> str:
    """Say why a routed model doesn't have an attribute, and what to do if torch looks for it."""
    message = f"'RoutedModel' object has no attribute {name!r}"
    if name not in MODULE_ATTRIBUTES:
        return message
    return (
        f"{message}, since it isn't a torch.nn.Module; give routed.model instead, which is routed "
        f"too (with 'with routed.disabled():' around the call, it isn't)"
    )


class Routing:
    """The routing on a model; see `RoutedModel` for its arguments.

    Attributes:
        model: The model, which is routed wherever it is called.
        routers: The routers that decide, if any.
        driver: Asks the policy for decisions, and remembers routes.
        injection: Puts the driver between the model and its layers.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self,
        model: Any,
        routers: RouterStack | None = None,
        *,
        policy: Policy | None = None,
        tokenizer: Any = None,
        bypass: Bypass | None = None,
    ) -> None:
        if routers is not None and policy is not None:
            raise RoutingError("give routers or a policy, not both: only one of them can decide")
        if routers is not None:
            check_routers(model, routers, bypass="" if bypass is None else bypass.sha256)
            if model.device.type != "meta":  # else accelerate keeps the weights elsewhere
                routers = routers.to(model.device)
            policy = RouterPolicy(routers)
        if bypass is not None:
            check_bypass(model, bypass)
        self.model: Any = model
        self.routers = routers
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.driver = RoutingDriver(policy, bypass)
        self.injection = Injection(model, self.driver)
        GenerateHandle(unwrap_peft(model), self.driver).put_on()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or "model" not in self.__dict__:
                raise AttributeError(_explain_missing(name))
            return getattr(self.model, name)

    def __repr__(self) -> str:
        base = unwrap_peft(self.model)
        model = type(base).__name__
        name = getattr(base, "name_or_path", "")
        if name:
            model += f" {name!r}"
        dtype = str(self.model.dtype).removeprefix("torch.")
        parts = [model, f"{self.num_layers} layers", f"{dtype} on {self.model.device}"]
        if self.injection.is_installed:
            parts.append(describe_policy(self.policy, self.num_layers))
            if self.bypass is not None:
                parts.append(f"bypass of rank {self.bypass.rank}")
        else:
            parts.append("routing taken off")
        return f"RoutedModel({', '.join(parts)})"

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the model's forward pass under routing, with the model's arguments and outputs."""
        self.check_attached()
        return self.model(*args, **inputs)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if none was given and the model has no name."""
        return loading.load_tokenizer(self.model)

    @property
    def num_layers(self) -> int:
        """The number of layers, L."""
        return self.injection.num_layers

    @property
    def last_route(self) -> Tensor:
        """The decisions for the last prompts of this thread, int `[B, L]`.

        In `generate`, every beam and every answer is a row of its own. If this thread ran no
        prompt, this is the last route of any thread. For a compiled model it always is.

        Raises:
            RoutingError: No prompt has passed yet.
        """
        if not self.driver.last_route:
            raise RoutingError("no prompt has passed through this routed model yet")
        by_layer = torch.tensor(self.driver.last_route)  # [L, B]
        return by_layer.T.contiguous()

    @property
    def bypass(self) -> Bypass | None:
        """What runs in place of a skipped layer; None if nothing does."""
        return self.driver.bypass

    @property
    def policy(self) -> Policy:
        """The current policy: of the innermost `using` or `fixed` block, else of the model."""
        return self.driver.current_policy

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """Generate with the model's own `generate`; decisions are made once per prompt.

        Arguments and outputs are those of `routed.model.generate`. Beams, sampling, several
        answers, assisted decoding and streaming work, with a cache and without.

        Raises:
            RoutingError: The model is detached, or an option would make decisions wrong.
                `prefill_chunk_size` would let a policy decide on the first chunk of the prompt
                alone. `guidance_scale` without a cache would give its second prompt the decisions
                of the first. `assistant_early_exit` would leave out layers without routing.
        """
        self.check_attached()
        return self.model.generate(*args, **inputs)

    def using(self, policy: Policy) -> AbstractContextManager[None]:
        """Let another policy decide inside the block.

        The block is for the thread that entered it. A thread that is started inside doesn't
        inherit the policy: give the policy to `RoutedModel`, or open a block in that thread. Inside
        a block of `disabled`, it puts the routing on again.
        """
        self.check_attached()
        return self._decide_by(policy)

    @contextmanager
    def _decide_by(self, policy: Policy) -> Iterator[None]:
        with self.driver.using(policy), self.injection.driven_by(self.driver):
            yield

    def fixed(self, plan: PlanLike | str) -> AbstractContextManager[None]:
        """Pin decisions or a static path inside the block.

        Decisions are `[L]` for every row, or `[B, L]`. A static path may run its layers in any
        order; `last_route` then says how often each layer ran. A text names a path as `--path`
        does, such as `without:13,14` or the name of a file.

        Raises:
            PathError: This model can't run the decisions or the path.
            RecordError: The file of the path can't be read.
        """
        return self.using(self.build_policy(plan))

    def build_policy(self, plan: PlanLike | str) -> Policy:
        """Return the policy that follows a plan. The plan is as for `fixed`."""
        if isinstance(plan, str):
            plan = read_path(plan).path(self.num_layers)
        if not isinstance(plan, StaticPath):
            return FixedPolicy(plan, self.num_layers)
        decisions = plan.check(self.num_layers).plan(self.num_layers)
        if not isinstance(decisions, StaticPath):
            return FixedPolicy(decisions, self.num_layers)
        return PathPolicy(plan, self.num_layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model inside the block. As with `using`, the block is for one thread."""
        self.check_attached()
        with self.driver.using(FullPolicy()), self.injection.driven_by(Driver()):
            yield

    def prompt_lengths(self, lengths: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Tell routers where each row's prompt ends, inside the block.

        Routers then read the prompt alone, never the continuation that is scored. Lengths are `[B]`
        numbers of real tokens, at least 1.
        """
        return self.driver.prompt_lengths(torch.as_tensor(lengths))

    def detach(self) -> Any:
        """Take the routing off, and return the model exactly as it was before.

        Raises:
            RoutingError: The routing was taken off already, or other code has put an override over
                ours.
        """
        self.check_attached()
        take_off_routing(self.model)
        return self.model

    def check_attached(self) -> None:
        """Raise a RoutingError if the routing was taken off the model."""
        if not self.injection.is_installed:
            raise RoutingError(
                "this routing was taken off the model, by detach() or by another attach(); use "
                "drllm.attach(model, ...) to put it on again"
            )
