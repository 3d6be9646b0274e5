"""Tensors that say they lie on a GPU and compute on the CPU, for machines without one.

Inside `Devices()` everything that is made on or moved to `cuda:0`, `cuda:1`, … is such a tensor.
An operation fails where a GPU's would: with tensors of two devices, or of the CPU but for a single
number. What makes the program wait for a GPU, or copies between devices, is counted by the line
of the library that causes it.

What can't be seen so: time, memory, kernels that compute other digits, streams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from devices.backward import run_backward
from devices.events import RUN, WAIT, Event, is_recording, record, record_copy, recording

aten = torch.ops.aten
CPU = torch.device("cpu")

CUDA = 1
"""The number of the device type CUDA in torch (c10/core/DeviceType.h)."""
META = 14
"""The number of the device type `meta`."""

MEMORY = 2**34
"""Bytes of a pretended device."""

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
"""Operations that take indices that lie on the CPU too, and copy them."""

ON_HOST = {Tensor.tolist: "tolist", Tensor.numpy: "numpy"}
"""Functions that read a tensor on the host without an operation."""


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
            return _move(args[0], **kwargs)
        if func is aten.copy_.default:
            return _copy_into(args[0], args[1])
        device = _device_of(func, args, kwargs)
        if func in WAITS:
            record(WAIT, WAITS[func])
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            kwargs = {**kwargs, "device": CPU}
        result = func(*[_unwrap(value) for value in args], **_unwrap(kwargs))
        if device.type == "cpu":
            return result
        if not _is_view(func):
            record(RUN, func.overloadpacket.__name__)
        wrapped = _wrap(result, device)
        if not _shares_memory(func):
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


@cache
def _shares_memory(func: Any) -> bool:
    """Tell whether an operation changes an argument or returns a view of one."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


@cache
def _is_view(func: Any) -> bool:
    """Tell whether an operation only looks at an argument's memory in another way."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _wrap(result: Any, device: torch.device) -> Any:
    """Return an operation's result with tensors that say they lie on a device."""
    if isinstance(result, Tensor):
        return Pretended(result, device)
    return tree_map_only(Tensor, lambda tensor: Pretended(tensor, device), result)


def _unwrap(value: Any) -> Any:
    """Return an argument with the tensors that compute."""
    if isinstance(value, Pretended):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)([_unwrap(item) for item in value])
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    return value


def _tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments, those in lists too."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _tensors_in(value)
    return tensors


def _device_of(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Return the device that an operation runs on; fail where a GPU would."""
    tensors = _tensors_in([*args, *kwargs.values()])
    if func in INDEXED:
        _record_indices(args[1], args[0].device)
        tensors = [tensor for tensor in tensors if tensor.dim() and tensor.device != CPU]
    # A number of the CPU goes along with tensors of any device.
    devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"{func} got tensors on {names}; a GPU computes with tensors of its own only"
        )
    return next(iter(devices), CPU)


def _record_indices(indices: Any, device: torch.device) -> None:
    """Record what indexing a tensor of a device copies there and waits for."""
    for index in indices:
        if index is None:
            continue
        if index.device == CPU:
            record_copy(index, device)
        if index.dtype in (torch.bool, torch.uint8):
            record(WAIT, "an index by a mask")


def _move(tensor: Tensor, **options: Any) -> Tensor:
    """Return a tensor on another device, or in another dtype on its own device."""
    device = _with_index(torch.device(options.pop("device", None) or tensor.device))
    non_blocking = options.pop("non_blocking", False)
    record_copy(tensor, device, non_blocking=non_blocking)
    inner = aten._to_copy.default(_unwrap(tensor), **options)
    if device.type == "cpu":
        return inner
    if device == tensor.device:
        record(RUN, "_to_copy")
    return Pretended(inner, device)


def _copy_into(target: Tensor, source: Tensor) -> Tensor:
    """Copy the numbers of a tensor into another one."""
    record_copy(source, target.device)
    record(RUN, "copy_")
    _unwrap(target).copy_(_unwrap(source))
    return target


def _with_index(device: torch.device) -> torch.device:
    """Return `cuda` as `cuda:0`, and other devices as they are."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class _Reading(TorchFunctionMode):
    """Counts what reads a tensor in ways that no operation stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ON_HOST and isinstance(args[0], Pretended):
            record(WAIT, ON_HOST[func])
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
        tensors = _tensors_in([*args, *kwargs.values()])
        if any(isinstance(tensor, Pretended) for tensor in tensors):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return _move(*args, **kwargs)
        device = torch.device(kwargs.get("device") or CPU)
        if device.type == "cpu":
            return func(*args, **kwargs)
        return Pretended(func(*args, **{**kwargs, "device": CPU}), _with_index(device))


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
    """Compute attention by its formula, since a GPU's kernels aren't there to be chosen from."""
    with recording(None):  # a kernel makes no copies of its numbers
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
        result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return result


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Let torch believe in a GPU: it is never started, and switched to as `meta` is, not at all."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guard = guards[CUDA]
    lifts_cpu_tensors = torch._C._only_lift_cpu_tensors()
    functions = {
        "_lazy_init": lambda: None,
        "mem_get_info": lambda _=None: (MEMORY // 2, MEMORY),
        "memory_reserved": lambda _=None: 0,
        "memory_allocated": lambda _=None: 0,
        "device_count": lambda: 2,
        "synchronize": lambda _=None: record(WAIT, "synchronize"),
        "empty_cache": lambda: None,
        "get_device_name": lambda _=None: "pretended",
    }
    guards[CUDA] = guards[META]
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` moves what it has made
    try:
        with (
            mock.patch.multiple(torch.cuda, **functions),
            mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts_cpu_tensors)
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
        assert not is_recording(), "devices are pretended already"
        self._contexts = ExitStack()
        self._contexts.enter_context(recording(self.events))
        self._contexts.enter_context(_without_gpu())
        self._contexts.enter_context(_Reading())
        self._contexts.enter_context(_Making())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop to pretend; tensors that are on pretended devices stay there."""
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        self._contexts.close()

    @contextmanager
    def counting(self) -> Iterator[list[Event]]:
        """Give the events of the block alone."""
        start = len(self.events)
        events: list[Event] = []
        yield events
        events += self.events[start:]


def place_model(model: Any, num_devices: int) -> Any:
    """Put a model of the Llama family on `cuda:0`, or its second half on `cuda:1`."""
    if num_devices == 1:
        model.to("cuda:0").tie_weights()
        return model
    L = model.config.num_hidden_layers
    devices = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0"}
    for layer in range(L):
        devices[f"model.layers.{layer}"] = "cuda:0" if layer < L // 2 else "cuda:1"
    devices["model.norm"] = "cuda:1"
    devices["lm_head"] = "cuda:1"
    return dispatch_model(model, device_map=devices)
