"""Tensors that say they lie on a GPU and compute on the CPU, for machines without one.

Inside `Devices()` everything that is made on or moved to `cuda:0`, `cuda:1`, … is such a tensor.
An operation fails where a GPU's would: with tensors of two devices, or of the CPU but for a single
number. What makes the program wait for a GPU, or copies between devices, is counted by the line
of the library that asked for it.

What can't be seen so: time, memory, kernels that compute other digits, streams.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import drllm

aten = torch.ops.aten
CPU = torch.device("cpu")

CUDA, META = 1, 14
"""Numbers of device types in torch (c10/core/DeviceType.h)."""

MEMORY = 2**34
"""Bytes of a pretended device."""

WAIT, COPY, RUN = "wait", "copy", "run"
"""Kinds of events: the host waits for a device, as it does for a copy from it, or to it out of
memory that isn't pinned; a tensor goes from one device to another; the host tells a device to
compute, which takes it a few microseconds, however little there is to compute."""

WAITS = {
    aten._local_scalar_dense.default: "item",  # of bool(), int(), float(), .item() as well
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operations whose result's shape or value the host has to know."""
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index.Tensor,
}
"""Take indices that lie on the CPU too, and copy them."""

ON_HOST = {Tensor.tolist: "tolist", Tensor.numpy: "numpy"}
PACKAGE = "drllm"
"""Whose lines events are counted by; of other packages they are counted by the package."""


@dataclass(frozen=True)
class Event:
    """Something that a GPU would make the host wait for, or a copy."""

    kind: str
    what: str  # the operation, or the way: "cpu to cuda:0"
    where: str  # "drllm/models/routing/driver.py:120", or another package's name


class Pretended(Tensor):
    """A tensor that says it lies on another device than the one that it computes on."""

    inner: Tensor
    is_pretended_pinned = False

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Pretended:
        """Wrap a tensor of the CPU."""
        assert type(inner) is not Pretended
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        self.inner = inner.detach()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.inner}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["inner"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: Any, device: Any, size: Any, stride: Any) -> Pretended:
        return Pretended(parts["inner"], device)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the CPU, once it is one that a GPU could run."""
        kwargs = kwargs or {}
        if func is aten._to_copy.default:
            return _moved(args[0], **kwargs)
        if func is aten.copy_.default:
            _count_copy(args[1], args[0].device)
            _count(RUN, "copy_")
            _unwrapped(args[0]).copy_(_unwrapped(args[1]))
            return args[0]
        device = _device_of(func, args, kwargs)
        if func in WAITS:
            _count(WAIT, WAITS[func])
        if "device" in kwargs and kwargs["device"] is not None:
            device = torch.device(kwargs["device"])
            kwargs = {**kwargs, "device": CPU}
        out = func(*[_unwrapped(each) for each in args], **_unwrapped(kwargs))
        if device.type == "cpu":
            return out
        if not _is_view(func):
            _count(RUN, func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            wrapped: Any = Pretended(out, device)
        else:
            wrapped = tree_map_only(Tensor, lambda each: Pretended(each, device), out)
        if not _shares_memory(func):
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


@cache
def _shares_memory(func: Any) -> bool:
    """Tell whether an operation changes an argument or returns a view of one."""
    return any(each.alias_info is not None for each in func._schema.arguments)


@cache
def _is_view(func: Any) -> bool:
    """Tell whether an operation only looks at an argument's memory in another way."""
    aliases = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _unwrapped(value: Any) -> Any:
    """Return an argument with the tensors that compute."""
    if isinstance(value, Pretended):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)([_unwrapped(each) for each in value])
    return {k: _unwrapped(each) for k, each in value.items()} if isinstance(value, dict) else value


def _tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments, those in lists too."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            found += _tensors_in(each)
    return found


def _device_of(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Return the device that an operation runs on; fail where a GPU would."""
    tensors = _tensors_in([*args, *kwargs.values()])
    if func in INDEXED:
        here = args[0].device
        for index in (each for each in args[1] if each is not None):
            if index.device == CPU:
                _count_copy(index, here)
            if index.dtype in (torch.bool, torch.uint8):
                _count(WAIT, "an index by a mask")
        tensors = [each for each in tensors if each.dim() and each.device != CPU]
    # A number of the CPU goes along with tensors of any device.
    devices = {each.device for each in tensors if each.dim() or each.device != CPU}
    if len(devices) > 1:
        raise RuntimeError(
            f"{func} got tensors on {', '.join(sorted(map(str, devices)))}; a GPU computes with "
            f"tensors of its own only"
        )
    return next(iter(devices), CPU)


def _moved(tensor: Tensor, **options: Any) -> Tensor:
    """Return a tensor on another device, or of another dtype on its own."""
    device = _with_index(torch.device(options.pop("device", None) or tensor.device))
    non_blocking = options.pop("non_blocking", False)
    _count_copy(tensor, device, non_blocking=non_blocking)
    inner = aten._to_copy.default(_unwrapped(tensor), **options)
    if device == tensor.device != CPU:
        _count(RUN, "_to_copy")
    return inner if device.type == "cpu" else Pretended(inner, device)


# --- counting ---

_counted: list[Event] | None = None


def _count(kind: str, what: str) -> None:
    if _counted is not None:
        _counted.append(Event(kind, what, _caller()))


def _count_copy(tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> None:
    if tensor.device == device or not tensor.numel():
        return
    way = f"{tensor.device} to {device}"
    _count(COPY, way)
    from_pinned = non_blocking and getattr(tensor, "is_pretended_pinned", False)
    if device.type == "cpu" or (tensor.device.type == "cpu" and not from_pinned):
        _count(WAIT, way)


def _caller() -> str:
    """Return the innermost line that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        if place := _place_of(frame.f_code.co_filename):
            return f"{place}:{frame.f_lineno}" if place.startswith(f"{PACKAGE}/") else place
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@cache
def _place_of(file_name: str) -> str:
    """Return a file from the package on, or another package's name; empty for what is passed by."""
    file = Path(file_name)
    if file == Path(__file__) or file.is_relative_to(Path(torch.__file__).parent):
        return ""
    own = Path(drllm.__file__).parent  # not by its name: a checkout is called like it, too
    if file.is_relative_to(own):
        return str(PACKAGE / file.relative_to(own))
    if "site-packages" in file.parts:
        return file.parts[file.parts.index("site-packages") + 1]
    return file.name


class _Reading(TorchFunctionMode):
    """Counts what reads a tensor in ways that no operation stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ON_HOST and isinstance(args[0], Pretended):
            _count(WAIT, ON_HOST[func])
            return func(args[0].inner, *args[1:], **kwargs)
        if func == Tensor.data.__set__ and type(args[0]) is not type(args[1]):
            return torch.utils.swap_tensors(args[0], args[1].detach())
        if func is Tensor.pin_memory:
            args[0].is_pretended_pinned = True
            return args[0]
        if func is nn.functional.scaled_dot_product_attention and isinstance(args[0], Pretended):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


class _Making(TorchDispatchMode):
    """Makes tensors on pretended devices, and moves them there from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or CPU)
        if any(isinstance(each, Pretended) for each in _tensors_in([*args, *kwargs.values()])):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return _moved(*args, **kwargs)
        if device.type == "cpu":
            return func(*args, **kwargs)
        return Pretended(func(*args, **{**kwargs, "device": CPU}), _with_index(device))


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention by its formula: a GPU's kernels aren't there to be chosen from."""
    global _counted
    _counted, kept = None, _counted  # a kernel makes no copies of its numbers
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
    result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    _counted = kept
    return result


def _backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
    *,
    accumulate_grad: bool,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """Do what autograd's engine does, which wants a stream of the GPU; hooks aren't called.

    Nodes run once all that depends on them has.
    """
    assert not create_graph
    roots = [_edge(each) for each in outputs]
    wanted = {_edge(each): place for place, each in enumerate(inputs)}
    found: list[Tensor | None] = [None] * len(inputs)
    waits_for, seen, left = Counter[Any](), set[Any](), [node for node, _ in roots]
    while left:
        if (node := left.pop()) not in seen:
            seen.add(node)
            following = [after for after, _ in node.next_functions if after is not None]
            waits_for.update(following)
            left += following
    given: dict[Any, dict[int, Tensor]] = {}

    def give(node: Any, number: int, gradient: Tensor | None) -> None:
        own = given.setdefault(node, {})
        if gradient is not None:
            like = node._input_metadata[number]
            gradient = gradient.sum_to_size(like.shape).to(like.dtype)  # of what was broadcast
            own[number] = own[number] + gradient if number in own else gradient

    for (node, number), output, gradient in zip(roots, outputs, gradients, strict=True):
        give(node, number, torch.ones_like(output) if gradient is None else gradient)
    ready = [node for node in given if not waits_for[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            own = given.pop(node, {})
            for number, gradient in own.items():
                if (place := wanted.get((node, number))) is not None:
                    found[place] = gradient
            variable = getattr(node, "variable", None)
            if variable is not None:
                if own and accumulate_grad and (not inputs or (node, 0) in wanted):
                    kept = variable.grad
                    variable.grad = own[0].detach() if kept is None else kept + own[0]
                continue
            if own:
                num = max(own) + 1
                made = node(*[own.get(number) for number in range(num)])
                made = made if isinstance(made, tuple) else (made,)
            else:
                made = (None,) * len(node.next_functions)
            for (after, number), gradient in zip(node.next_functions, made, strict=True):
                if after is not None:
                    give(after, number, gradient)
                    waits_for[after] -= 1
                    if not waits_for[after]:
                        ready.append(after)
    if accumulate_grad:
        for each, gradient in zip(inputs, found, strict=True):
            if each.grad_fn is not None and gradient is not None:
                each.grad = gradient if each.grad is None else each.grad + gradient
    return tuple(found)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Return where a tensor's gradient arrives: a node and the number of its output."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch.enable_grad():
        [(node, _)] = tensor.view_as(tensor).grad_fn.next_functions  # type: ignore[union-attr]
    return node, 0


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Let torch believe in a GPU: it is never started, and switched to as `meta` is, not at all."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guard, lifts = guards[CUDA], torch._C._only_lift_cpu_tensors()
    instead: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "mem_get_info", lambda _=None: (MEMORY // 2, MEMORY)),
        (torch.cuda, "memory_reserved", lambda _=None: 0),
        (torch.cuda, "memory_allocated", lambda _=None: 0),
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "synchronize", lambda _=None: _count(WAIT, "synchronize")),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "get_device_name", lambda _=None: "pretended"),
        (torch.autograd, "_engine_run_backward", _backward),
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in instead]
    guards[CUDA] = guards[META]
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` moves what it has made
    for each in instead:
        setattr(*each)
    try:
        yield
    finally:
        for each in kept:
            setattr(*each)
        torch._C._set_only_lift_cpu_tensors(lifts)
        guards[CUDA] = guard


@dataclass
class Devices:
    """Pretended devices for a block, and what happened on them.

    Example:
        with Devices() as devices:
            model.to("cuda:0")
            model(torch.tensor([[1, 2]], device="cuda:0"))
        assert not own_waits(devices.events)
    """

    events: list[Event] = field(default_factory=list)

    def __enter__(self) -> Devices:
        """Begin to pretend and to count."""
        global _counted
        assert _counted is None, "devices are pretended already"
        _counted = self.events
        self._modes = ExitStack()
        self._modes.enter_context(_without_gpu())
        self._modes.enter_context(_Reading())
        self._modes.enter_context(_Making())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop to pretend; tensors that are on pretended devices stay there."""
        global _counted
        _counted = None
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        self._modes.close()

    @contextmanager
    def counting(self) -> Iterator[list[Event]]:
        """Give the events of the block alone."""
        start, found = len(self.events), list[Event]()
        yield found
        found += self.events[start:]


def own_waits(events: Sequence[Event]) -> Counter[str]:
    """Return how often drllm waited, by its line and what it waited for."""
    waits = [each for each in events if each.kind == WAIT and each.where.startswith(f"{PACKAGE}/")]
    return Counter(f"{each.where}, {each.what}" for each in waits)


def placed(model: Any, num_devices: int) -> Any:
    """Put a model of the Llama family on `cuda:0`, or its second half on `cuda:1`."""
    if num_devices == 1:
        model.to("cuda:0").tie_weights()
        return model
    L = model.config.num_hidden_layers
    parts = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), "cuda:0")
    parts |= {f"model.layers.{n}": f"cuda:{int(n >= L // 2)}" for n in range(L)}
    parts |= dict.fromkeys(("model.norm", "lm_head"), "cuda:1")
    return dispatch_model(model, device_map=parts)
