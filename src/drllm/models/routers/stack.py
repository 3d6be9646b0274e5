"""The routers: what they compute, and what is saved of them.

Owns `RouterStack` (one router per layer, computed in one batch) and what their config and weights
must be like. Leaves to `pooling` what they read of a prompt, to `checkpoints` the files, to
`policies` what is done with the logits, to `training` how they come about, and to `pretrained`
whether they fit a base model.

Axes: B rows, T tokens, D hidden, L layers, W windows, H router width, C = 3 decisions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from drllm.errors import CheckpointError, ConfigError, unknown_name
from drllm.models.routers import folder as router_files
from drllm.models.routers.folder import CARD_FILE, CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE
from drllm.models.routers.pooling import Windows

NUM_DECISIONS = 3
ROUTER_WIDTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Which routers these are and for which base model; saved as `router_config.json`.

    Attributes:
        num_layers: L of the base model.
        hidden_size: D of the base model.
        num_windows: W.
        router_width: H.
        base_model: Hub id, alias or path of the base model.
        base_revision: Its revision, where known.
        base_class: Class name of the base model.
        base_fingerprint: Hash over three named weight tensors of the base model.
        label_counts: `[L][3]`: how often each decision was the target at each layer in training;
            empty where the routers weren't trained on targets.
        training: Settings and final metrics, for the reader. Only `rewards`, the rewards that the
            prompts trained on were made for, are interpreted, and only for a note to the user.

    Raises:
        ConfigError: A value of another kind, or a size below 1.
    """

    num_layers: int
    hidden_size: int
    num_windows: int = 8
    router_width: int = ROUTER_WIDTH
    base_model: str = ""
    base_revision: str | None = None
    base_class: str = ""
    base_fingerprint: str = ""
    label_counts: tuple[tuple[int, int, int], ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_windows", "router_width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:  # True is an int too
                raise ConfigError(f"{name!r} is {value!r}; expected a whole number from 1")
        for name in ("base_model", "base_revision", "base_class", "base_fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "base_revision" and value is None):
                raise ConfigError(f"{name!r} is {value!r}; expected a text")
        if not isinstance(self.training, dict):
            raise ConfigError("'training' is not a JSON object; give settings and metrics by name")
        if not _are_label_counts(self.label_counts, self.num_layers):
            raise ConfigError("'label_counts' isn't num_layers rows of 3 counts")


class RouterStack(nn.Module):
    """One small router per layer: Linear(D→H), GELU, Linear(H→3), mean over windows.

    All L routers live in four stacked tensors, so that training evaluates them in two batched
    products. Weights are Xavier-uniform per layer, biases zero; everything is float32.

    Args:
        config: Shapes and the base model they belong to.
        generator: Source of the initial weights.

    Source: Dr.LLM section 3.2 and appendix (bottleneck 128).

    Example:
        >>> stack = RouterStack(RouterConfig(num_layers=28, hidden_size=3072))
        >>> sum(weight.numel() for weight in stack.parameters())
        11024468
    """

    def __init__(self, config: RouterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        L, D, H = config.num_layers, config.hidden_size, config.router_width
        self.hidden_weight = nn.Parameter(torch.empty(L, H, D))
        self.hidden_bias = nn.Parameter(torch.zeros(L, H))
        self.decision_weight = nn.Parameter(torch.empty(L, NUM_DECISIONS, H))
        self.decision_bias = nn.Parameter(torch.zeros(L, NUM_DECISIONS))
        for stacked in (self.hidden_weight, self.decision_weight):
            for weight in stacked.data:
                nn.init.xavier_uniform_(weight, generator=generator)

    def forward(self, means: Tensor, filled: Tensor) -> Tensor:
        """Return the logits of every layer's router on its own input.

        Args:
            means: `[B, L, W, D]` windows of each layer's input.
            filled: `[B]` windows that hold tokens.

        Returns:
            `[B, L, 3]` logits: the mean over the filled windows.
        """
        inner = torch.einsum("blwd,lhd->blwh", means, self.hidden_weight)
        inner = inner + self.hidden_bias[:, None, :]
        inner = nn.functional.gelu(inner, approximate="tanh")
        inner = _mean_over_filled(inner, filled[:, None])  # [B, L, H]
        return torch.einsum("blh,lch->blc", inner, self.decision_weight) + self.decision_bias

    def layer_logits(self, layer: int, windows: Windows) -> Tensor:
        """Return the logits of one layer's router, `[B, 3]`, wherever that layer itself runs."""
        linear, device = nn.functional.linear, self.hidden_weight.device
        means, filled = windows.means.to(device), windows.filled.to(device)
        inner = linear(means, self.hidden_weight[layer], self.hidden_bias[layer])  # [B, W, H]
        inner = nn.functional.gelu(inner, approximate="tanh")
        # A plain mean spares four small steps a layer.
        whole = windows.are_all_filled
        inner = inner.mean(dim=-2) if whole else _mean_over_filled(inner, filled)  # [B, H]
        return linear(inner, self.decision_weight[layer], self.decision_bias[layer])

    def save(self, folder: Path | str, *, card: str | None = None) -> None:
        """Write `router_config.json` and `routers.safetensors`; the base model is not saved.

        All files are replaced or none is; what else lies in the folder stays there.

        Args:
            folder: Made if need be.
            card: Text of a `README.md` to be written with them.

        Raises:
            CheckpointError: Weights that no folder could be loaded with, or a folder that can't
                be written.
        """
        tensors = {
            name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()
        }
        misfit = _misfit(tensors, self.config)
        if misfit is not None:
            raise CheckpointError(f"these routers can't be saved: {misfit}")
        values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self.config)}
        try:
            text = json.dumps(values, indent=2) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"these routers can't be saved: their config's 'training' isn't JSON ({error})"
            ) from error
        # One note only: safetensors writes several in an order that varies from run to run.
        notes = {"num_windows": str(self.config.num_windows)}
        files = {WEIGHTS_FILE: to_safetensors(tensors, notes), CONFIG_FILE: text.encode()}
        if card is not None:
            files[CARD_FILE] = card.encode()
        router_files.replace(Path(folder), files)

    @classmethod
    def load(cls, folder: Path | str) -> RouterStack:
        """Read routers that `save` has written.

        Raises:
            CheckpointError: A missing or broken file, a future format, unknown or missing keys,
                tensors of another shape or dtype, values that are not finite, or weights that were
                saved with another config.
        """
        folder = Path(folder)
        config = read_config(folder)
        tensors, notes = router_files.read_weights(folder)
        path = folder / WEIGHTS_FILE
        misfit = _misfit(tensors, config)
        if misfit is not None:
            raise CheckpointError(f"{path}: {misfit}")
        saved_for = notes.get("num_windows", str(config.num_windows))
        if saved_for != str(config.num_windows):
            raise CheckpointError(
                f"{path} was saved for num_windows {saved_for}, {CONFIG_FILE} says "
                f"{config.num_windows}; put the config back that belongs to the weights"
            )
        with torch.device("meta"):  # no weights are drawn only to be replaced
            stack = cls(config)
        stack.load_state_dict(tensors, assign=True)
        return stack


def read_config(folder: Path | str) -> RouterConfig:
    """Read and check the `router_config.json` of a routers folder.

    Raises:
        CheckpointError: Missing, broken, incomplete, of a future format, or with unknown keys.
    """
    values = router_files.read_values(Path(folder))
    path = Path(folder) / CONFIG_FILE
    fields = [declared.name for declared in dataclasses.fields(RouterConfig)]
    for name in values:
        if name not in fields:
            raise CheckpointError(f"{path}: " + unknown_name("key", name, fields))
    for name in fields:
        if name not in values:
            raise CheckpointError(f"{path} lacks the key {name!r}; train the routers again")
    counts = values["label_counts"]
    if isinstance(counts, list):
        values["label_counts"] = tuple(
            tuple(row) if isinstance(row, list) else row for row in counts
        )
    try:
        return RouterConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _misfit(tensors: Mapping[str, Tensor], config: RouterConfig) -> str | None:
    """Say in what weights aren't those of routers with this config; None where they are."""
    L, D, H = config.num_layers, config.hidden_size, config.router_width
    expected = {
        "hidden_weight": [L, H, D],
        "hidden_bias": [L, H],
        "decision_weight": [L, NUM_DECISIONS, H],
        "decision_bias": [L, NUM_DECISIONS],
    }
    for name in sorted(tensors.keys() - expected.keys()):
        return unknown_name("tensor", name, expected)
    for name, shape in expected.items():
        if name not in tensors:
            return f"lacks the tensor {name!r}; train the routers again"
        found = tensors[name]
        if list(found.shape) != shape:
            return f"{name!r} has shape {list(found.shape)}, {CONFIG_FILE} asks for {shape}"
        if found.dtype != torch.float32:
            dtype = str(found.dtype).removeprefix("torch.")
            return f"{name!r} has dtype {dtype}, expected float32; save routers.float() instead"
        if not torch.isfinite(found).all():
            return f"{name!r} holds NaN or infinity; train again"
    return None


def _are_label_counts(value: Any, num_layers: int) -> bool:
    """Tell whether a value is `[L][3]` whole numbers from 0, or empty."""
    return isinstance(value, (tuple, list)) and (
        not value
        or (
            len(value) == num_layers
            and all(
                isinstance(row, (tuple, list))
                and len(row) == NUM_DECISIONS
                and all(type(count) is int and count >= 0 for count in row)
                for row in value
            )
        )
    )


def _mean_over_filled(values: Tensor, filled: Tensor) -> Tensor:
    """Average axis -2 (W) over its first `filled` entries; `filled` has the axes before it."""
    W = values.shape[-2]
    present = torch.arange(W, device=values.device) < filled[..., None]  # [..., W]
    total = torch.where(present[..., None], values, 0.0).sum(dim=-2)
    return total / filled[..., None]
