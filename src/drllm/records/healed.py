"""`path.json` of a healed path: the path, and how its adapter was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from drllm.errors import RecordError
from drllm.paths import StaticPath
from drllm.records.codec import read_json, sha256
from drllm.records.removed import refuse_removed
from drllm.records.results import Header, StepRecord

HEALED_SCHEMA = "drllm.healed_path"
HEALED_FILE = "path.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"


class HealPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measurement during the training of an adapter.

    Both KL divergences are from the full path, in nats per token: the mean over recent training
    texts (None before the first step), and the mean over held-out texts.
    """

    step: int
    tokens: int
    seconds: float
    train_kl: float | None = None
    held_out_kl: float


class Losses(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Next-token losses on held-out texts, in nats per token."""

    full: float  # of the full path
    path: float  # of the path without the adapter
    healed: float  # of the path with the adapter
    num_texts: int | None = None  # not in older files


class HealedPath(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path and its LoRA adapter, as `drllm heal` writes them.

    Attributes:
        first_layer: The adapter changes the layers of the path from this layer on.
        rank: The rank of the adapter.
        alpha: LoRA's alpha.
        adapter_sha256: The hash of the adapter's weights.
        tasks: The tasks that the adapter was trained on.
        texts: The names of other sources of texts that the adapter was trained on, such as files.
        divided: The tasks whose own splits weren't used. Their questions were divided again.
        questions_sha256: The hash of all questions and texts.
        curve: The measurements during the training, in order.
        held_out: The losses, by the name of the task or of the source of texts.
    """

    name: str
    steps: tuple[StepRecord, ...]
    executions: float
    num_layers: int
    first_layer: Annotated[int, msgspec.Meta(ge=0)]
    rank: Annotated[int, msgspec.Meta(ge=1)]
    alpha: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    adapter_sha256: str
    # Only in older files: further routes that the adapter was trained for.
    others: tuple[tuple[StepRecord, ...], ...] = ()
    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    questions_sha256: str = ""
    runtime: dict[str, Any] = msgspec.field(default_factory=dict)
    curve: tuple[HealPoint, ...] = ()
    held_out: dict[str, Losses] = msgspec.field(default_factory=dict)

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
        """The layers that the adapter changes, in order."""
        return sorted({step.layer for step in self.steps if step.layer >= self.first_layer})


def read_healed(file: Path) -> HealedPath:
    """Read the `path.json` of a healed path.

    Raises:
        RecordError: The file can't be read, the adapter beside it is missing or was changed, or
            this version can't run the path.
    """
    record = read_json(file, HealedPath)
    refuse_parts_of_layers(record.steps, file)
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


def refuse_parts_of_layers(steps: Sequence[StepRecord], file: Path) -> None:
    """Refuse steps that don't run a whole layer; older files may have these steps."""
    for step in steps:
        if step.run != "all":
            content = f"a path that runs the {step.run} of layer {step.layer} alone"
            refuse_removed(file, content, "give a path of whole layers")
        if step.scale != 1:
            content = f"a path that runs layer {step.layer} at weight {step.scale:g}"
            refuse_removed(file, content, "give a path of whole layers")
