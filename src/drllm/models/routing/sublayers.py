"""Attention and MLP of a layer, found by a rule, and how one of them is left out.

A sublayer that is left out contributes exactly nothing: its module isn't computed and gives zeros
of the form that it always gives. So the layer computes what it would if the sublayer's last linear
map, weight and bias, were zero. That is right only where a layer adds what its sublayers give to
its state; a probe tries it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of, evaluating, hooked, one_token
from drllm.models.routing.context import ThreadValue
from drllm.models.routing.injection import Driver, ForwardOverride, Injection, LayerCall
from drllm.models.routing.kv_cache import entry_of
from drllm.paths import ATTENTION, MLP

NONE = "none"  # in place of the sublayer that runs: neither does. Only the probe asks for it
LEAST_MATRICES = 2  # fewer than these and a module is no MLP: it has to go up and down again


class Sublayers:
    """The attention and the MLP of each layer of a model, and the overrides that leave them out.

    Overrides are put on the modules when this is made, which runs one token through the model. They
    do nothing until `only` says so. A layer that has no such modules, or does more with what they
    give than add it to its state, is an ArchitectureError.
    """

    def __init__(self, injection: Injection) -> None:
        self._name = type(base_of(injection.model)).__name__
        self._only: ThreadValue[str] = ThreadValue()
        self._overrides: list[_Override] = []
        self.attention: list[nn.Module] = []  # [L]
        self.mlps: list[list[nn.Module]] = []  # [L], mostly one a layer; a shared expert is another
        self._num_results: dict[nn.Module, int] = {}  # of a tuple that a module gives; 0: a tensor
        try:
            _run_token(injection, self._find)
            self.install()
            _run_token(injection, self._check)
        except BaseException:
            self.remove()
            raise

    def install(self) -> None:
        """Put the overrides on; after `remove`, on again."""
        if not self._overrides:
            found = [(module, MLP) for module in self.attention]
            found += [(module, ATTENTION) for modules in self.mlps for module in modules]
            self._overrides = [
                _Override(module, run, self._only, self._num_results[module])
                for module, run in found
            ]
        for override in self._overrides:
            override.put_on()

    def remove(self) -> None:
        """Take the overrides off again."""
        for override in self._overrides:
            override.take_off()

    @contextmanager
    def only(self, run: str) -> Iterator[None]:
        """Let only one sublayer of each layer contribute inside the block: attention or MLP."""
        self._only.begin(run)
        try:
            yield
        finally:
            self._only.end()

    def _find(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Find the sublayers of one layer while it runs."""
        attention, mlps = list[nn.Module](), list[nn.Module]()
        lengths: dict[nn.Module, int] = {}

        def before(module: nn.Module, _args: Any) -> None:
            lengths[module] = _length(call)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, first = _first(args, kwargs), output[0] if isinstance(output, tuple) else output
            self._num_results[module] = len(output) if isinstance(output, tuple) else 0
            if _length(call) > lengths[module]:
                attention.append(module)
            elif sum(each.dim() > 1 for each in module.parameters()) >= LEAST_MATRICES:
                mlps.append(module)
            else:
                return
            if not isinstance(first, Tensor) or getattr(given, "shape", None) != first.shape:
                raise self._refused(call.index, "has a sublayer that changes the shape of a state")

        children = list(call.module.children())
        hooks = [child.register_forward_pre_hook(before) for child in children]
        hooks += [child.register_forward_hook(after, with_kwargs=True) for child in children]
        with hooked(hooks):
            hidden = call.run(hidden)
        if len(attention) != 1:
            raise self._refused(call.index, f"has {len(attention)} modules for its attention")
        if not mlps:
            raise self._refused(call.index, "has no module of its own for the MLP")
        self.attention.append(attention[0])
        self.mlps.append(mlps)
        return hidden

    def _check(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Try whether a layer without its sublayers leaves a state as it is."""
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(call.index))
        state = noise.to(hidden.device, hidden.dtype)
        with self.only(NONE):
            if not torch.equal(call.run(state), state):
                raise self._refused(
                    call.index, "does more with its attention and MLP than add what they give"
                )
        return hidden

    def _refused(self, layer: int, why: str) -> ArchitectureError:
        return ArchitectureError(
            f"layer {layer} of {self._name} {why}, so neither can be left out alone; give a path "
            f"of whole layers"
        )


class _Override(ForwardOverride):
    def __init__(
        self, module: nn.Module, run: str, only: ThreadValue[str], num_results: int
    ) -> None:
        super().__init__(module)
        self.left_out_for = (run, NONE)  # the sublayer that runs where this one is left out
        self.only = only
        self.num_results = num_results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sublayer, or give zeros in its place."""
        if self.only.get() not in self.left_out_for:
            return self.original()(*args, **kwargs)
        zeros = torch.zeros_like(_first(args, kwargs))
        return (zeros, *[None] * (self.num_results - 1)) if self.num_results else zeros


class _Each(Driver):
    def __init__(self, run: Callable[[LayerCall, Tensor], Tensor]) -> None:
        self._run = run

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        return self._run(call, hidden)


def _run_token(injection: Injection, layer: Callable[[LayerCall, Tensor], Tensor]) -> None:
    """Run one token through the model, with what happens at each layer."""
    with torch.no_grad(), evaluating(injection.decoder), injection.driven_by(_Each(layer)):
        injection.decoder(input_ids=one_token(injection.model), use_cache=True)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a module reads: its first argument."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def _length(call: LayerCall) -> int:
    return 0 if call.cache is None else int(entry_of(call.cache, call.index).get_seq_length())
