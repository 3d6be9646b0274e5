"""The config of routers, `router_config.json`: their shapes and their base model.

Axes: D hidden, L layers, W windows, H router width.
"""

import dataclasses
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from drllm.errors import CheckpointError, ConfigError, RecordError, unknown_name
from drllm.model.prompts import PromptForm
from drllm.models.routers.files import find_routers
from drllm.models.routers.places import CONFIG_FILE, explain_missing_config
from drllm.records.codec import describe_invalid, read_json

FORMAT_VERSION = 1
ROUTER_WIDTH = 128

Size = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class TrainingValues(msgspec.Struct, frozen=True):
    """The values of `training` that later stages use; the others may be anything."""

    tasks: dict[str, int] | None = None
    rewards: list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Shapes of routers and the base model they belong to; saved as `router_config.json`.

    Attributes:
        num_layers: L of the base model.
        hidden_size: D of the base model.
        num_windows: W.
        router_width: H.
        base_model: Hub id, alias or path of the base model.
        base_revision: Revision of the base model, if known.
        base_class: Class name of the base model.
        base_fingerprint: The `fingerprint` of the base model's weights; empty if unknown.
        bypass: The hash of the bypass that the routers were trained with; empty for none.
        label_counts: `[L][3]`: how often each decision was the target at each layer in training;
            empty if the routers weren't trained on targets.
        training: Settings and final metrics, for the model card. Only two keys are used otherwise:
            `rewards` and `prompt_form`, the rewards and the form of the training's prompts.

    Raises:
        ConfigError: A value has the wrong type, or a size is below 1.
    """

    num_layers: Size
    hidden_size: Size
    num_windows: Size = 8
    router_width: Size = ROUTER_WIDTH
    base_model: str = ""
    base_revision: str | None = None
    base_class: str = ""
    base_fingerprint: str = ""
    bypass: str = ""
    label_counts: tuple[tuple[Count, Count, Count], ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check and convert every value, such as a list to a tuple."""
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            try:
                converted = msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                message = f"{name!r}: {describe_invalid(error)}; it is {reprlib.repr(value)}"
                raise ConfigError(message) from error
            object.__setattr__(self, name, converted)  # the dataclass is frozen
        try:
            msgspec.convert(self.training, TrainingValues)
        except msgspec.ValidationError as error:
            raise ConfigError(f"'training': {describe_invalid(error)}") from error
        num_rows = len(self.label_counts)
        if num_rows not in (0, self.num_layers):
            raise ConfigError(
                f"'label_counts' has {num_rows} of {self.num_layers} rows; give a row for each "
                f"layer, or none"
            )

    @classmethod
    def from_pretrained(cls, routers: Path | str, **options: Any) -> "RouterConfig":
        """Read the config of routers without their weights.

        Args:
            routers: A folder, or OWNER/NAME on the hub.
            options: `revision`, `token`, `cache_dir` and `local_files_only` for the hub.

        Raises what `find_routers` and `read_config` raise.
        """
        return read_config(find_routers(routers, **options))

    @property
    def prompt_form(self) -> PromptForm | None:
        """The form of the training's prompts; None if it isn't recorded."""
        try:
            return msgspec.convert(self.training.get("prompt_form"), PromptForm | None)
        except msgspec.ValidationError as error:
            raise ConfigError(f"'training.prompt_form': {describe_invalid(error)}") from error


def read_config(folder: Path | str) -> RouterConfig:
    """Read the `router_config.json` in a folder of routers.

    Raises:
        CheckpointError: The file is missing, broken, or not the config of routers.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(explain_missing_config(path.parent))
    try:
        values = read_json(path, dict[str, Any])
    except RecordError as error:
        raise CheckpointError(f"{error}; train the routers again") from error
    _check_version(values.pop("format_version", None), path)
    _check_keys(values, path)
    try:
        return RouterConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_version(version: Any, path: Path) -> None:
    """Refuse a config that isn't one of routers, or that a newer drllm has written."""
    if type(version) is not int or version < 1:  # True is an int too
        raise CheckpointError(
            f"{path}: 'format_version' is {version!r}; expected a whole number from 1 to "
            f"{FORMAT_VERSION}; is it the config of routers?"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this drllm reads up to {FORMAT_VERSION}; "
            f"install a newer drllm"
        )


def _check_keys(values: dict[str, Any], path: Path) -> None:
    """Refuse unknown and missing keys."""
    names = [field.name for field in dataclasses.fields(RouterConfig)]
    for name in values:
        if name not in names:
            raise CheckpointError(f"{path}: {unknown_name('key', name, names)}")
    for name in names:
        if name not in values and name != "bypass":  # which routers without a bypass lack
            raise CheckpointError(f"{path} lacks the key {name!r}; train the routers again")
