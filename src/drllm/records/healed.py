"""`path.json` of a healed path: the path, and how the adapter that lies beside it was trained."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from drllm.errors import RecordError
from drllm.paths import StaticPath
from drllm.records.codec import read_json, sha256
from drllm.records.results import Header, StepRecord

HEALED_SCHEMA, HEALED_FILE = "drllm.healed_path", "path.json"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class Checked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far training was at one step; KL from the full path and losses in nats a token."""

    step: int
    tokens: int
    seconds: float
    train_kl: float | None = None
    held_out_kl: float


class Losses(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Next-token losses on held-out text, in nats a token: full path, path alone, healed path."""

    full: float
    path: float
    healed: float
    num_texts: int | None = None  # not in older files


class HealedPath(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path and its adapter, which runs on steps of all layers from `first_layer` on.

    `tasks` and `texts` name what it was trained on, `divided` the tasks whose own splits weren't
    used; the digest is that of the questions. `held_out` has the losses by source. Where the
    adapter was trained for several paths, `others` has those after the commonest.
    """

    name: str
    steps: tuple[StepRecord, ...]
    executions: float
    num_layers: int
    first_layer: Annotated[int, msgspec.Meta(ge=0)]
    rank: Annotated[int, msgspec.Meta(ge=1)]
    alpha: Annotated[float, msgspec.Meta(gt=0)]
    adapter_sha256: str
    others: tuple[tuple[StepRecord, ...], ...] = ()
    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    questions_sha256: str = ""
    runtime: dict[str, Any] = msgspec.field(default_factory=dict)
    curve: tuple[Checked, ...] = ()
    held_out: dict[str, Losses] = msgspec.field(default_factory=dict)

    @property
    def adapter(self) -> str:
        """The name under which a routed model holds the adapter."""
        return self.adapter_sha256[:16]

    @property
    def path(self) -> StaticPath:
        """The path itself, its steps with the adapter."""
        steps = StaticPath(msgspec.structs.asdict(step) for step in self.steps)
        return steps.with_adapter(self.adapter, self.first_layer)


def read_healed(file: Path) -> HealedPath:
    """Read the `path.json` of a healed path; a RecordError where the adapter isn't its own."""
    record, adapter = read_json(file, HealedPath), file.with_name(ADAPTER_FILE)
    if not adapter.is_file() or sha256(adapter) != record.adapter_sha256:
        state = "isn't the adapter" if adapter.is_file() else "isn't there,"
        raise RecordError(
            f"{adapter} {state} that {file.name} was written with; put that one back, or heal again"
        )
    return record
