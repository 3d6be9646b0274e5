"""Paths and decisions: the two ways to write down which layers run, and how they convert.

A *path* lists layer indices in the order executed (`0 1 3 3 4`). *Decisions* hold one count per
layer: 0 skip, 1 execute, 2 repeat (`1 1 0 2 1`). Every decision vector is a path; a path is a
decision vector only if it visits the layers in order and none more than twice. A `StaticPath` can
say more: that of a layer only the attention or the MLP runs, that its update counts less, or that
it runs with an adapter. Loads no torch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

from drllm.errors import PathError, unknown_name

Decisions: TypeAlias = tuple[int, ...]
"""One decision per layer, `[L]`, each 0, 1 or 2, at least one of them not 0."""

Path: TypeAlias = tuple[int, ...]  # layer indices from 0 in the order executed, at least one


class Decision(IntEnum):
    """What happens at one layer; the value is the number of executions.

    Source: Dr.LLM (arXiv 2510.12773), section 3.
    """

    SKIP = 0
    EXECUTE = 1
    REPEAT = 2


def check_decisions(decisions: Sequence[int], num_layers: int | None = None) -> Decisions:
    """Return the decisions as a tuple, or say by PathError why no model can run them.

    None as the number of layers accepts any length of at least 1.
    """
    if num_layers is not None and len(decisions) != num_layers:
        raise PathError(
            f"{len(decisions)} decisions were given for a model of {num_layers} layers; "
            f"give one of 0 (skip), 1 (execute), 2 (repeat) per layer"
        )
    for layer, value in enumerate(decisions):
        if value not in (0, 1, 2):
            raise PathError(
                f"decision {value!r} at layer {layer} is not one of "
                f"0 (skip), 1 (execute), 2 (repeat)"
            )
    values = tuple(int(value) for value in decisions)
    if not any(values):
        raise PathError("all layers are skipped; at least one layer must be executed")
    return values


def full_decisions(num_layers: int) -> Decisions:
    """Return the decisions of the base model itself: every layer once."""
    return (int(Decision.EXECUTE),) * num_layers


def num_executions(decisions: Sequence[int]) -> int:
    """Count the layer executions that decisions cost."""
    return sum(int(value) for value in decisions)


def to_path(decisions: Sequence[int]) -> Path:
    """Write decisions as the path they run; PathError as for `check_decisions`.

    Example:
        >>> to_path([1, 1, 0, 2, 1])
        (0, 1, 3, 3, 4)
    """
    checked = check_decisions(decisions)
    return tuple(layer for layer, count in enumerate(checked) for _ in range(count))


def to_decisions(path: Sequence[int], num_layers: int) -> Decisions:
    """Write a path as decisions `[L]`, if it is one that decisions can express.

    Raises:
        PathError: An index outside the model, a layer visited out of order or more than twice,
            or an empty path.

    Example:
        >>> to_decisions([0, 1, 3, 3, 4], num_layers=5)
        (1, 1, 0, 2, 1)
    """
    if not len(path):
        raise PathError("the path is empty; at least one layer must be executed")
    for place, layer in enumerate(path):
        _check_layer(layer, place, num_layers)
    counts = [0] * num_layers
    for previous, layer in zip((0, *path), path, strict=False):
        if layer < previous:
            raise PathError(
                f"layer {layer} follows layer {previous}; decisions can only express paths "
                f"that visit the layers in order"
            )
        counts[int(layer)] += 1
        if counts[int(layer)] > Decision.REPEAT:
            raise PathError(
                f"layer {layer} is visited more than twice; decisions can only express "
                f"paths that visit a layer once or twice"
            )
    return tuple(counts)


def sketch(decisions: Sequence[int]) -> str:
    """Draw decisions as one character per layer: `·` skip, `█` execute, `2` repeat.

    Example:
        >>> sketch([1, 0, 2])
        '█·2'
    """
    return "".join("·█2"[int(value)] for value in decisions)


def _check_layer(layer: object, place: int, num_layers: int) -> None:
    if isinstance(layer, bool) or layer not in range(num_layers):
        raise PathError(
            f"{layer!r} at position {place} of the path (counted from 0) is not a layer of a "
            f"model of {num_layers} layers; give indices from 0 to {num_layers - 1}"
        )


ALL, ATTENTION, MLP = "all", "attention", "mlp"
RUNS = (ALL, ATTENTION, MLP)
"""What a step may run of a layer: all of it, or one sublayer while the other adds nothing."""


class Step(NamedTuple):
    """One execution of a layer, or of a part of it.

    Attributes:
        layer: Index of the layer, from 0.
        run: `all`, or the one sublayer that runs: `attention` or `mlp`.
        scale: What the update counts, in (0, 1]: the step leads from a state h to
            h + scale · (layer(h) − h).
        adapter: The adapter that it runs with, by its name in the routed model; empty for none.
    """

    layer: int
    run: str = ALL
    scale: float = 1.0
    adapter: str = ""


Steps: TypeAlias = "tuple[int | Step, ...]"
"""What a path runs in order: an index is a whole layer, undamped."""


def step_of(item: int | Step) -> Step:
    """Return an item of `Steps` as a step."""
    return item if isinstance(item, Step) else Step(item)


def layer_of(item: int | Step) -> int:
    """Return the layer of an item of `Steps`."""
    return item.layer if isinstance(item, Step) else item


@dataclass(frozen=True, slots=True)
class StaticPath:
    """A path that is the same for a whole task: steps in the order executed, at least one.

    Given are layer indices, `Step`s, or mappings with their fields. Steps that run a whole layer
    undamped, without an adapter, are kept as its index, so that equal paths compare equal.

    Raises:
        PathError: No steps, a sublayer that there isn't, or a scale outside (0, 1].

    Example:
        >>> StaticPath([0, Step(1), {"layer": 2, "run": "mlp"}]).steps
        (0, 1, Step(layer=2, run='mlp', scale=1.0, adapter=''))
    """

    steps: Steps

    def __init__(self, steps: Iterable[int | Step | Mapping[str, Any]]) -> None:
        checked = tuple(_checked(step, place) for place, step in enumerate(steps))
        if not checked:
            raise PathError("the path is empty; at least one layer must be executed")
        object.__setattr__(self, "steps", checked)

    @property
    def runs_parts(self) -> bool:
        """Whether a step runs the attention or the MLP of a layer alone."""
        return any(step_of(item).run != ALL for item in self.steps)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that its steps run with, each once."""
        return tuple(dict.fromkeys(s.adapter for s in map(step_of, self.steps) if s.adapter))

    @property
    def departure(self) -> int:
        """The first layer that isn't executed exactly once, before all later ones."""
        for place, step in enumerate(self.steps):
            if step != place:
                return min(place, layer_of(step))
        return len(self.steps)

    def with_adapter(self, name: str, first_layer: int = 0) -> "StaticPath":
        """Return the path with an adapter on its layers from the first one on; none if unnamed."""
        steps = map(step_of, self.steps)
        return StaticPath(s._replace(adapter=name) if s.layer >= first_layer else s for s in steps)

    def check(self, num_layers: int) -> "StaticPath":
        """Return the path itself if a model of L layers has all of its layers; else a PathError."""
        for place, item in enumerate(self.steps):
            _check_layer(layer_of(item), place, num_layers)
        return self

    def path(self) -> Path:
        """Return the layer indices of a path of whole layers; a PathError for any other."""
        for item in self.steps:
            if isinstance(item, Step):
                raise PathError(
                    f"the path runs {_part(item)}, which indices of layers can't express"
                )
        return tuple(int(item) for item in self.steps if not isinstance(item, Step))

    def decisions(self, num_layers: int) -> Decisions:
        """Return the same as decisions `[L]`; a PathError where these can't express it."""
        return to_decisions(self.path(), num_layers)

    def plan(self, num_layers: int) -> "Plan":
        """Return the same as decisions `[L]` where these can express it, else the path itself."""
        try:
            return self.decisions(num_layers)
        except PathError:
            return self

    def edits(self, num_layers: int) -> str:
        """Say in words what the path changes about the full one of L layers.

        Example:
            >>> StaticPath([0, Step(1, "mlp"), 3, Step(3, scale=0.5)]).edits(4)
            'skips layer 2, skips the attention of layer 1, repeats layer 3 at half weight'
        """
        return _edits(self.steps, num_layers) + ", with an adapter" * bool(self.adapters)


Plan: TypeAlias = "Decisions | StaticPath"
"""What one row runs: decisions, or a path that may say more."""


def steps_of(plan: Plan) -> Steps:
    """Return what a plan runs, in order."""
    return plan.steps if isinstance(plan, StaticPath) else to_path(plan)


def _checked(given: Any, place: int) -> int | Step:
    where = f"at position {place} of the path (counted from 0)"
    if isinstance(given, Mapping):
        given = Step(**given) if given.keys() <= set(Step._fields) and "layer" in given else None
    step = given if isinstance(given, Step) else Step(given)
    if not isinstance(step.layer, int) or isinstance(step.layer, bool) or step.layer < 0:
        raise PathError(f"{step.layer!r} {where} is no layer; give an index from 0, or a Step")
    if step.run not in RUNS:
        raise PathError(f"{where}: " + unknown_name("part of a layer", str(step.run), RUNS))
    if not 0 < step.scale <= 1:
        raise PathError(f"the scale {step.scale!r} {where} is not in (0, 1]; give 1 for all of it")
    plain = step.run == ALL and step.scale == 1 and not step.adapter
    return int(step.layer) if plain else step._replace(scale=float(step.scale))


def _part(step: Step) -> str:
    what = f"layer {step.layer}" if step.run == ALL else f"the {_SAID[step.run]} of {step.layer}"
    what = what if step.scale == 1 else f"{what} at weight {step.scale:g}"
    return f"{what} with an adapter" if step.adapter else what


_SAID = {ATTENTION: "attention", MLP: "MLP"}


def _edits(steps: Steps, num_layers: int) -> str:
    first: dict[int, Step] = {}
    again: list[Step] = []
    for step in map(step_of, steps):
        if step.layer in first:
            again.append(step)
        else:
            first[step.layer] = step
    skipped: list[tuple[str, list[str]]] = [
        ("layer", [str(layer) for layer in range(num_layers) if layer not in first])
    ]
    for run, other in ((MLP, ATTENTION), (ATTENTION, MLP)):
        layers = [str(layer) for layer, step in sorted(first.items()) if step.run == run]
        skipped.append((f"the {_SAID[other]} of layer", layers))
    parts = [f"skips {_listed(what, layers)}" for what, layers in skipped if layers]
    damped = [step for step in first.values() if step.scale != 1]
    for verb, found in (("runs", damped), ("repeats", again)):
        alike: dict[tuple[str, float, int], list[str]] = {}
        for step, times in Counter(found).items():
            alike.setdefault((step.run, step.scale, times), []).append(str(step.layer))
        for (run, scale, times), layers in alike.items():
            what = "layer" if run == ALL else f"the {_SAID[run]} of layer"
            weight = {1.0: "", 0.5: " at half weight", 0.25: " at a quarter of the weight"}
            often = {1: "", 2: " twice"}.get(times, f" {times} times")
            at = weight.get(scale, f" at weight {scale:g}")
            parts.append(f"{verb} {_listed(what, layers)}{often}{at}")
    order = [layer_of(item) for item in steps]
    return ", ".join(parts) or (
        "runs every layer once" if order == sorted(order) else "runs the layers in another order"
    )


def _listed(what: str, names: Sequence[str]) -> str:
    *others, last = names
    return f"{what}s {', '.join(others)} and {last}" if others else f"{what} {last}"
