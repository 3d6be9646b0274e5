"""The K/V cache under routing, which stores K and V only for the rows that ran a layer.

`RoutedCacheLayer` replaces an entry of a `Cache` in place, whether transformers or the user made
the cache. The new entry has one *pass* for each execution of its layer. Lengths, masks, beam
reordering and continuation keep working, and the pinned decisions travel with the cache.

Axes: B rows, H heads, T tokens, E head size.
"""

import copy
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from drllm.errors import RoutingError
from drllm.model.devices import on_device
from drllm.model.layers import is_kv
from drllm.paths import StaticPath

ROOM = 32  # tokens of spare room behind K and V; without room, each step would copy all tokens


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` with spare room, so that a step copies only its new tokens.

    If gradients are recorded or a graph is compiled, a step copies all tokens, as `DynamicLayer`
    does.
    """

    keys: Any
    values: Any
    is_initialized = False  # transformers sets this attribute only after 4.56
    _room: list[Tensor] | None = None  # K and V, with space behind them for later tokens
    # `keys` after the last update. Other methods, such as reordering, replace `keys`; then the room
    # is out of date.
    _view: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store K and V of new tokens, `[B, H, T, E]`, and return K and V of all tokens."""
        start = self.get_seq_length()
        is_first = not start or key_states.dtype != self.keys.dtype  # or the model was converted
        if is_first or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        new = [key_states, value_states]
        end = start + key_states.shape[-2]
        if not self._has_room(end):
            self._make_room(new, start, end)
        assert self._room is not None
        for room, states in zip(self._room, new, strict=True):
            room.narrow(-2, start, end - start).copy_(states)
        self.keys = self._room[0].narrow(-2, 0, end)
        self.values = self._room[1].narrow(-2, 0, end)
        self._view = self.keys
        return self.keys, self.values

    def offload(self) -> None:
        """Move K and V off the accelerator, and free their room there."""
        self._room = None
        self._view = None
        super().offload()

    def __copy__(self) -> "GrowingLayer":
        """Return an entry with the same K and V that makes its own room at the next token."""
        entry = type(self)()
        entry.__dict__.update(self.__dict__)
        entry._room = None
        entry._view = None
        return entry

    def _has_room(self, end: int) -> bool:
        """Say whether the room holds the current keys and has space for `end` tokens."""
        if self._room is None or self.keys is not self._view:
            return False
        # A tensor of inference mode can't be changed outside of it.
        is_writable = self._room[0].is_inference() == torch.is_inference_mode_enabled()
        return is_writable and end <= self._room[0].shape[-2]

    def _make_room(self, new: Sequence[Tensor], start: int, end: int) -> None:
        """Copy K and V into a room with space for `end` tokens and `ROOM` more."""
        self._room = []
        for states, stored in zip(new, (self.keys, self.values), strict=True):
            room = states.new_empty(*states.shape[:-2], end + ROOM, states.shape[-1])
            room.narrow(-2, 0, start).copy_(stored)
            self._room.append(room)


class RoutedCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache entry of one layer: the pinned decisions, and an inner entry for each pass.

    Pass k holds K and V of exactly the rows that execute the layer more than k times. A layer that
    no row runs has a *shadow* instead of passes: an entry of the same class that stores the number
    1 for each token, so that the class itself computes lengths and masks.

    Args:
        pristine: The empty entry that was in this place of the cache. Every pass starts as a copy.

    Attributes:
        decisions: The pinned decisions `[B]`; None until `pin` is called.
        path: The pinned static path, if all rows run one.
        passes: The inner entries, one for each execution of the layer.
        rows: The rows of each pass.
        shadow: The shadow; None if the layer has passes.
    """

    max_batch_size = 0
    """A size that fits no batch. Up to 5.0, transformers keeps a static cache for the next
    `generate`, which must not see the decisions of this one."""

    decisions: tuple[int, ...] | None
    path: StaticPath | None
    passes: list[CacheLayerMixin]
    rows: list[tuple[int, ...]]
    shadow: CacheLayerMixin | None

    def __init__(self, pristine: CacheLayerMixin) -> None:
        # super().__init__() isn't called: it would set `keys` and `values`, which are properties.
        # The empty entry may have memory for all rows already. Each pass allocates its own memory.
        pristine.keys = None
        pristine.values = None
        pristine.is_initialized = False
        self.pristine = GrowingLayer() if type(pristine) is DynamicLayer else pristine
        self.is_sliding = getattr(pristine, "is_sliding", False)
        self.is_croppable = getattr(pristine, "is_croppable", True)
        self.max_cache_len = getattr(pristine, "max_cache_len", 0)
        # If True, the mask code masks the places that the inner entries haven't filled yet.
        self.is_compileable = getattr(pristine, "is_compileable", False)
        self.reset()
        self._active: CacheLayerMixin | None = None  # the pass that runs now

    def pin(self, decisions: tuple[int, ...], path: StaticPath | None = None) -> None:
        """Fix the decisions `[B]` of all rows, once, before the first token is stored.

        If all rows run a static path, it is pinned too. The decisions then say how often the path
        runs this layer.
        """
        self.decisions = decisions
        self.path = path
        for count in range(max(decisions)):
            self.passes.append(copy.deepcopy(self.pristine))
            rows = [row for row, value in enumerate(decisions) if value > count]
            self.rows.append(tuple(rows))
        if not self.passes:
            self.shadow = copy.deepcopy(self.pristine)
        self.is_plain = path is None and set(decisions) == {1}

    def begin_pass(self, index: int) -> tuple[int, ...]:
        """Let `update` and the lengths use one pass until `end_pass`, and return its rows."""
        self._active = self.passes[index]
        return self.rows[index]

    def end_pass(self) -> None:
        """End the pass that `begin_pass` began."""
        self._active = None

    def list_lengths(self) -> list[int]:
        """Return how many tokens each pass has stored; they differ after an exception."""
        return [int(entry.get_seq_length()) for entry in self._entries()]

    def check_complete(self) -> None:
        """Raise RoutingError if a forward pass after the prompt was interrupted."""
        if self.is_incomplete:
            raise RoutingError(
                "a forward pass with this cache was interrupted, so some layers lack its tokens; "
                "start with a new cache"
            )

    def lengthen_shadow(self, num_tokens: int, like: Tensor) -> None:
        """Count the tokens that passed a layer that no row runs.

        Tokens after the prompt are only counted. They are stored when somebody reads the length.
        The mask code reads the lengths of a few layers only, so skipping any other layer costs
        almost nothing.

        Args:
            num_tokens: The number of tokens that passed.
            like: Any tensor with the device and dtype of the layer.
        """
        assert self.shadow is not None
        # A compiled graph would treat the count as a constant, so it stores the tokens at once.
        if self.shadow.is_initialized and not torch.compiler.is_compiling():
            self._unstored += num_tokens
        else:
            _feed_ones(self.shadow, num_tokens, like)

    @property
    def is_initialized(self) -> bool:
        """Whether decisions are pinned."""
        return self.decisions is not None

    @property
    def keys(self) -> Any:
        """K of a layer that every row executes once, `[B, H, T, E]`; None while it is empty."""
        return self._only_pass().keys

    @keys.setter
    def keys(self, value: Any) -> None:
        self._only_pass().keys = value

    @property
    def values(self) -> Any:
        """V of a layer that every row executes once, `[B, H, T, E]`; None while it is empty."""
        return self._only_pass().values

    @values.setter
    def values(self, value: Any) -> None:
        self._only_pass().values = value

    @property
    def _sliding_window_tensor(self) -> Any:
        # transformers yields this tensor with K and V to a caller that iterates over the cache.
        return getattr(self._only_pass(), "_sliding_window_tensor", None)

    def __copy__(self) -> "RoutedCacheLayer":
        """Return an entry with the same tokens that grows independently."""
        new = type(self)(copy.copy(self.pristine))
        new.__dict__.update(self.__dict__)
        new.passes = [_copy_entry(entry) for entry in self.passes]
        new.rows = list(self.rows)
        new.shadow = _copy_entry(self.shadow)
        new.indices = {}
        return new

    def _only_pass(self) -> Any:
        """Return the only pass of a layer that every row executes once; refuse other layers."""
        if self.decisions is None:
            return self.pristine
        if set(self.decisions) != {1}:
            raise RoutingError(
                f"a layer that rows execute {list(self.decisions)} times has no K and V of the "
                f"whole batch, so this cache can't be converted or read layer by layer; use it as "
                f"it is, or run the prompt with every layer executed once"
            )
        return self.passes[0]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: each pass initialises itself at its first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store K and V of the running pass, `[R, H, T, E]`. Return K and V of all its tokens."""
        if self._active is None:
            raise RoutingError(
                "this cache belongs to a routed model, and its layer was run without routing; "
                "attach the routers again or start with a new cache"
            )
        return self._active.update(key_states, value_states, *args, **kwargs)

    # The class of the inner entries computes lengths and masks.

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Return how many tokens the layer has seen."""
        return self._representative().get_seq_length(*args, **kwargs)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """Return the number of keys that a mask covers, and where they start."""
        return self._representative().get_mask_sizes(*args, **kwargs)

    def get_max_length(self, *args: Any, **kwargs: Any) -> Any:
        """Return how many tokens the layer can hold."""
        return self._representative().get_max_length(*args, **kwargs)

    def get_max_cache_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Return how many tokens the layer can hold; the name of the method in transformers 4."""
        return self._representative().get_max_cache_shape(*args, **kwargs)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows (indices or a mask), in their order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row next to one another."""
        if self.decisions is not None:
            self.reorder_cache(torch.arange(len(self.decisions)).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Cut every pass to the same length. At length 0 the decisions are dropped too."""
        for entry in self._entries():
            entry.crop(*args, **kwargs)
        if self.decisions is not None and int(self.get_seq_length()) == 0:
            self.reset()

    def reset(self) -> None:
        """Drop all tokens and the decisions."""
        self.decisions = None
        self.path = None
        self.passes = []
        self.rows = []
        self.shadow = None
        self.is_plain = False  # whether all rows run the layer once, as without routing
        # Whether layers of the cache lack tokens of a forward pass that was interrupted. The entry
        # of the first layer knows it.
        self.is_incomplete = False
        self._unstored = 0  # tokens that were counted, but that the shadow doesn't store yet
        # The indices of a `Forward`. The entry of the first layer keeps them, since the pass of the
        # next token runs the same rows.
        self.indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def activate_past_recording(self) -> None:
        """Let every sliding pass keep the tokens that `crop` may bring back."""
        for entry in (self.pristine, *self._entries()):
            if hasattr(entry, "activate_past_recording"):
                entry.activate_past_recording()

    @property
    def record_past(self) -> bool:
        """Whether sliding passes keep the tokens that `crop` may bring back."""
        return bool(getattr(self.pristine, "record_past", False))

    @record_past.setter
    def record_past(self, value: bool) -> None:
        for entry in (self.pristine, *self._entries()):
            if hasattr(entry, "record_past"):
                entry.record_past = value

    def offload(self) -> None:
        """Move every pass off the accelerator."""
        for entry in self._entries():
            entry.offload()

    def prefetch(self) -> None:
        """Move every pass back to the accelerator."""
        for entry in self._entries():
            entry.prefetch()

    def _entries(self) -> list[CacheLayerMixin]:
        """Return all inner entries, after storing the shadow's counted tokens."""
        if self.shadow is None:
            return self.passes
        if self._unstored:
            num_tokens = self._unstored
            self._unstored = 0
            _feed_ones(self.shadow, num_tokens, self.shadow.keys)
        return [*self.passes, self.shadow]

    def _representative(self) -> CacheLayerMixin:
        """Return the running pass; if none runs, any entry, since all have the same length."""
        if self._active is not None:
            return self._active
        entries = self._entries()
        return entries[0] if entries else self.pristine

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make every row r a copy of the old row `beam_idx[r]`."""
        if self.decisions is None:
            return
        old_rows = _read_indices(beam_idx)
        length = int(self.get_seq_length())
        passes: list[CacheLayerMixin] = []
        rows: list[tuple[int, ...]] = []
        for entry, stored_rows in zip(self.passes, self.rows, strict=True):
            # The place of each old row in the entry.
            places = {row: place for place, row in enumerate(stored_rows)}
            new_rows = [row for row, old in enumerate(old_rows) if old in places]
            if new_rows:
                order = [places[old_rows[row]] for row in new_rows]
                entry.reorder_cache(on_device(order, entry.keys.device))
                passes.append(entry)
                rows.append(tuple(new_rows))
        if self.passes and not passes:  # no pass is left, so the shadow must know the length
            self.shadow = copy.deepcopy(self.pristine)
            _feed_ones(self.shadow, length, self.passes[0].keys)
        self.decisions = tuple([self.decisions[row] for row in old_rows])
        self.passes = passes
        self.rows = rows
        self.indices.clear()


def _read_indices(indices: Tensor) -> list[int]:
    """Return indices as numbers, and read the same tensor only once."""
    if indices.is_inference():  # tensors of inference mode don't count their changes
        numbers: list[int] = indices.tolist()
        return numbers
    return _read_indices_once(indices, indices._version)


@lru_cache(maxsize=1)
def _read_indices_once(indices: Tensor, version: int) -> list[int]:  # noqa: ARG001
    """Return indices as numbers. A tensor that was read last is taken from memory.

    All layers of a cache get the same tensor, so it is read once. `version` is a part of the key in
    the memory: every change of the tensor in place raises its version.
    """
    return indices.tolist()


def _copy_entry(entry: CacheLayerMixin | None) -> CacheLayerMixin | None:
    """Return an entry with the same tokens that grows independently."""
    if isinstance(entry, DynamicLayer):
        return copy.copy(entry)
    return copy.deepcopy(entry)  # a static entry writes new tokens into its own tensors


def _feed_ones(entry: CacheLayerMixin, num_tokens: int, like: Tensor) -> None:
    """Store the number 1 per token, `[1, 1, T, 1]`, in an entry that only has to know its length.

    The number 0 wouldn't do: up to transformers 5.0, the length of a static entry is its number of
    nonzero keys.
    """
    # `arange(length, …)` would read the length, which breaks a compiled graph.
    positions = torch.arange(num_tokens, device=like.device) + entry.get_seq_length()
    ones = torch.ones(1, 1, num_tokens, 1, dtype=like.dtype, device=like.device)
    # Static entries of transformers 4.56 need cache_position; later ones ignore the mapping.
    entry.update(ones, ones, {"cache_position": positions})


def find_entry(cache: Cache, index: int) -> Any:
    """Return a layer's entry. A cache that creates entries lazily creates this entry now."""
    if isinstance(cache, EncoderDecoderCache):
        raise RoutingError("the cache has a half for an encoder; it can't be routed")
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def routed_entry(cache: Cache, index: int) -> RoutedCacheLayer:
    """Return a layer's routed entry. At the first visit, put it in place of the cache's entry."""
    entry = find_entry(cache, index)
    if isinstance(entry, RoutedCacheLayer):
        return entry
    if not is_kv(entry):
        raise RoutingError(
            f"cache entry {index} is a {type(entry).__name__}, not K/V; it can't be routed"
        )
    if int(entry.get_seq_length()) > 0:
        raise RoutingError(
            "the cache was filled without routing; start with an empty cache, so that the prompt "
            "and its continuation run the same layers"
        )
    cache.layers[index] = RoutedCacheLayer(entry)
    return cache.layers[index]  # type: ignore[no-any-return]


def abort_pass(cache: Cache, *, reads_prompt: bool) -> None:
    """Clean up a cache after a forward pass that raised an exception.

    Args:
        cache: The cache of the pass. Some of its layers may have stored the tokens of the pass.
        reads_prompt: Whether the cache was empty before. Then it is empty again, so it can be used
            for the next prompt. Otherwise a later pass with it is refused, if layers lack tokens.
    """
    entries = [entry for entry in cache.layers if isinstance(entry, RoutedCacheLayer)]
    if reads_prompt:
        for entry in entries:
            entry.reset()
        return
    lengths: set[int] = set()
    for entry in entries:
        lengths.update(entry.list_lengths())
    if len(lengths) > 1:
        entries[0].is_incomplete = True  # the next pass looks there


def cache_argument(model: Any) -> str:
    """Return the name of a model's cache argument: transformers renamed it in 5.24."""
    accepted = inspect.signature(model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"
