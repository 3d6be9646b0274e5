"""`path.json` of a healed path: the path, and how its adapter was solved and trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from drllm.errors import PathError, RecordError
from drllm.paths import StaticPath
from drllm.records.codec import sha256
from drllm.records.manifest import Executions, NumLayers, check_runtime
from drllm.records.removed import refuse_removed
from drllm.records.results import Header, StepRecord, read_result_file
from drllm.statistics.ranges import Amount, Count

HEALED_SCHEMA = "drllm.healed_path"
HEALED_FILE = "path.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"


class HealPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measurement during the training of an adapter.

    Both KL divergences are from the full path, in nats per token: the mean over recent training
    texts (None before the first step), and the mean over held-out texts.
    """

    step: Count
    tokens: Count
    seconds: Amount
    train_kl: float | None = None
    held_out_kl: float


class Losses(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Next-token losses on held-out texts, in nats per token."""

    full: float  # of the full path
    path: float  # of the path without the adapter
    refit: float | None = None  # of the path with the refit alone; None if it wasn't measured
    healed: float  # of the path with the adapter
    num_texts: Count | None = None  # not in older files


class GapRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gap of a path, and the linear map before the gap that was solved anew."""

    layer: Count  # the layer that runs before the gap
    next_layer: Count  # the layer that runs after the gap; at the end of the model the number L
    map: str  # the name of the map, such as `11.mlp.down_proj`
    ridge: Amount  # λ
    norm: str = ""  # the name of the norm behind the MLP, solved too; empty if there is none


class RefitRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the refit of a path was solved."""

    gaps: Annotated[tuple[GapRecord, ...], msgspec.Meta(min_length=1)]
    num_tokens: Annotated[int, msgspec.Meta(ge=1)]  # calibration tokens
    seconds: Amount | None = None  # how long it took to solve them

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the norms that have a new weight."""
        return tuple(gap.norm for gap in self.gaps if gap.norm)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all modules that have a new weight: linear maps and norms."""
        return (*(gap.map for gap in self.gaps), *self.norms)


class HealedPath(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path and its adapter, as `drllm heal` writes them.

    The adapter has LoRA weights, a refit, or both.

    Attributes:
        first_layer: LoRA changes the layers of the path from this layer on.
        rank: LoRA's rank; 0 if the adapter has no LoRA weights.
        alpha: LoRA's alpha.
        refit: How the refit was solved; None if the adapter has no refit.
        adapter_sha256: The hash of the adapter's weights.
        tasks: The tasks that the adapter was trained on.
        texts: The names of other sources of texts that the adapter was trained on, such as files.
        divided: The tasks whose own splits weren't used. Their questions were divided again.
        questions_sha256: The hash of all questions and texts.
        prompts_sha256: The hash of the first questions and texts as the model read them; empty in
            older files.
        curve: The measurements during the training, in order.
        held_out: The losses, by the name of the task or of the source of texts.
    """

    name: str
    steps: tuple[StepRecord, ...]
    executions: Executions
    num_layers: NumLayers
    first_layer: Count
    rank: Count
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    refit: RefitRecord | None = None
    adapter_sha256: str
    # Only in older files: further routes that the adapter was trained for.
    others: tuple[tuple[StepRecord, ...], ...] = ()
    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    questions_sha256: str = ""
    prompts_sha256: str = ""
    runtime: dict[str, Any] = msgspec.field(default_factory=dict)
    curve: tuple[HealPoint, ...] = ()
    held_out: dict[str, Losses] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_runtime(self.runtime)

    @property
    def adapter(self) -> str:
        """The name of the adapter in a routed model."""
        return self.adapter_sha256[:16]

    @property
    def path(self) -> StaticPath:
        """The path itself, with the adapter."""
        return StaticPath([step.layer for step in self.steps], self.adapter)

    @property
    def adapted_layers(self) -> list[int]:
        """The layers that have LoRA weights, in order."""
        if self.rank == 0:
            return []
        return sorted({step.layer for step in self.steps if step.layer >= self.first_layer})

    def describe_repair(self) -> str:
        """Say how the path was repaired, after "it was".

        Such as "repaired in closed form (2 layers' weights solved on 50,000 tokens), then trained
        for 10 minutes".
        """
        parts = []
        if self.refit is not None:
            num_maps = len(self.refit.gaps)
            layers = "1 layer's weights" if num_maps == 1 else f"{num_maps} layers' weights"
            tokens = f"{self.refit.num_tokens:,} tokens"
            parts.append(f"repaired in closed form ({layers} solved on {tokens})")
        if self.rank > 0:
            time = f" for {_write_time(self.curve[-1].seconds)}" if self.curve else ""
            parts.append(f"trained{time}")
        return ", then ".join(parts)


def _write_time(seconds: float) -> str:
    """Write a time in whole seconds, minutes or hours: the first unit with fewer than 120."""
    number = round(seconds)
    unit = "second"
    for larger_unit in ("minute", "hour"):
        if number >= 120:
            number = round(number / 60)
            unit = larger_unit
    return f"1 {unit}" if number == 1 else f"{number} {unit}s"


def read_healed(file: Path) -> HealedPath:
    """Read the `path.json` of a healed path.

    Raises:
        RecordError: The file can't be read, the adapter beside it is missing or was changed, or
            this version can't run the path.
    """
    record = read_result_file(file, HealedPath, HEALED_SCHEMA)
    refuse_parts_of_layers(record.steps, file)
    check_steps(record, record.num_layers, file)
    _check_adapter(record, file)
    if record.others:
        content = f"a healed path with an adapter for {1 + len(record.others)} routes"
        refuse_removed(file, content, "heal one path again")
    adapter = file.with_name(ADAPTER_FILE)
    if not adapter.is_file():
        raise RecordError(
            f"{adapter} is missing, the adapter of {file.name}; put it back, or heal again"
        )
    if sha256(adapter) != record.adapter_sha256:
        raise RecordError(
            f"{adapter} isn't the adapter that {file.name} was written with; put the right adapter "
            f"back, or heal again"
        )
    return record


def _check_adapter(record: HealedPath, file: Path) -> None:
    """Refuse an adapter without weights, and a refit that doesn't fit the gaps of the path."""
    if record.rank > 0 and record.alpha == 0:
        raise RecordError(f"{file} has LoRA weights of rank {record.rank} and alpha 0; heal again")
    if record.rank == 0 and record.refit is None:
        raise RecordError(
            f"{file} has neither LoRA weights (its rank is 0) nor a refit; heal again"
        )
    if record.refit is None:
        return
    gaps = _list_gaps(record)
    layers = set()
    for gap in record.refit.gaps:
        if gaps.get(gap.layer) != gap.next_layer or gap.layer in layers:
            raise RecordError(
                f"{file} has a refit for a gap from layer {gap.layer} to {gap.next_layer}, which "
                f"isn't a gap of its path, or comes twice; heal again"
            )
        for name in (gap.map, gap.norm or gap.map):
            if name.partition(".")[0] != str(gap.layer):
                raise RecordError(
                    f"{file} has a refit of {name!r}, expected a module of layer {gap.layer}; heal "
                    f"again"
                )
        layers.add(gap.layer)


def _list_gaps(record: HealedPath) -> dict[int, int]:
    """Return the gaps of a path that can be refitted: the layer before a gap → the layer after it.

    A path that doesn't visit the layers in order, once each, has no such gap.
    """
    try:
        gaps = record.path.gaps(record.num_layers)
    except PathError:
        return {}
    return {gap.layer: gap.next_layer for gap in gaps}


class WrittenPath(Protocol):
    """A path in a file: its name, its steps and its cost."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def steps(self) -> tuple[StepRecord, ...]:
        """The steps, each the run of one layer."""

    @property
    def executions(self) -> float:
        """The cost in layer equivalents."""


def check_steps(path: WrittenPath, num_layers: int, file: Path) -> None:
    """Refuse a path that a model of L layers can't run, or that has another cost than its steps."""
    try:
        StaticPath(step.layer for step in path.steps).check(num_layers)
    except PathError as error:
        raise RecordError(f"{file}: path {path.name!r}: {error}") from error
    if path.executions != len(path.steps):
        raise RecordError(
            f"{file}: path {path.name!r}: 'executions' is {path.executions:g}, the steps cost "
            f"{len(path.steps)}"
        )


def refuse_parts_of_layers(steps: Sequence[StepRecord], file: Path) -> None:
    """Refuse steps that don't run a whole layer; older files may have these steps."""
    for step in steps:
        if step.run != "all":
            content = f"a path that runs the {step.run} of layer {step.layer} alone"
            refuse_removed(file, content, "give a path of whole layers")
        if step.scale != 1:
            content = f"a path that runs layer {step.layer} at weight {step.scale:g}"
            refuse_removed(file, content, "give a path of whole layers")
