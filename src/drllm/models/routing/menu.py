"""A menu: a few static paths, of which each prompt runs the one that is worth most to its kind.

Paths leave out whole layers, and nothing before the layer at which the prompt is read. So rows of
different paths run side by side in one batch, each as if alone.

Axes: B rows, D hidden, L layers, K kinds of prompts, P paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.errors import CheckpointError, PathError
from drllm.models.routing.policies import POLICIES, Policy, PromptView, full_precision
from drllm.paths import Decisions, StaticPath, step_of
from drllm.records.codec import refuse_odd_file, write_atomically
from drllm.records.menu import ADAPTERS_FOLDER, CHOOSER_FILE, Menu
from drllm.records.static_paths import PathFile, check_model, read_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drllm.models.routing.routed_model import RoutedModel


@POLICIES.register("menu")
class MenuPolicy(Policy):
    """Choose among a few paths, once a prompt, by its mean state at an early layer.

    `kinds` maps a prompt's mean state `[D]` before layer `reads_at` (None: the first that a path
    leaves out or runs with an adapter) to the logits of its kind, `[K]`, on the CPU; `worth`
    `[K, P]` is what each path is worth to each kind, less what it costs.

    A path that runs parts of layers or repeats one, or that differs from the full path before it is
    chosen, is a PathError, as are two that run the same layers.

    Source: ours; PuDDing (arXiv 2502.04348) picks among omission sets with a model of its own.
    """

    def __init__(
        self,
        paths: Mapping[str, StaticPath],
        kinds: nn.Linear,
        worth: Tensor,
        reads_at: int | None,
        num_layers: int,
    ) -> None:
        self.rows, self.reads_at = menu_rows(paths, num_layers, reads_at)
        self.paths, self.kinds, self.worth = dict(paths), kinds, worth
        routes = (decisions for decisions, _ in self.rows)  # all that prompts can take
        self.by_route = dict(zip(routes, paths.values(), strict=True))

    def choose(self, states: Tensor) -> list[int]:
        """Return the place of the path of the greatest expected worth, given states `[B, D]`."""
        with full_precision(states.device):
            expected = self.kinds(states).softmax(dim=1) @ self.worth  # [B, P]
        places: list[int] = expected.argmax(dim=1).tolist()
        return places

    def decide(self, layer: int, prompts: PromptView) -> Sequence[int]:
        """Return 1 before the prompts are read, then what the path of each row says."""
        if layer < self.reads_at:
            return [1] * prompts.num_rows
        if layer == self.reads_at:
            places = self.choose(prompts.mean().cpu())
            prompts.kept[self] = [self.rows[place] for place in places]
        return [decisions[layer] for decisions, _ in prompts.kept[self]]

    def adapters(self, layer: int, prompts: PromptView) -> Sequence[str]:
        """Return the adapter that each row's path runs the layer with."""
        return [
            names[layer] for _, names in prompts.kept.get(self, ())
        ]  # empty before it is chosen


def menu_rows(
    paths: Mapping[str, StaticPath], num_layers: int, reads_at: int | None
) -> tuple[list[tuple[Decisions, tuple[str, ...]]], int]:
    """Return decisions and adapters `[L]` of a menu's paths, and the layer that reads prompts."""
    rows: dict[Decisions, tuple[str, ...]] = {}
    first, by = num_layers - 1, ""
    for name, path in paths.items():
        try:
            row = path.check(num_layers).with_adapter("").decisions(num_layers)
            wrong = "it repeats a layer" * (max(row) > 1) or "another does so too" * (row in rows)
        except PathError as error:
            wrong = str(error)
        if wrong:
            raise PathError(
                f"path {name!r} {path.edits(num_layers)}, and can't be on the menu: {wrong}; give "
                f"paths that leave out whole layers, each others"
            )
        held = {step.layer: step.adapter for step in map(step_of, path.steps)}
        rows[row] = tuple(held.get(layer, "") for layer in range(num_layers))
        changed = (layer for layer in range(num_layers) if held.get(layer) != "")
        if (own := next(changed, first)) < first:
            first, by = own, name
    if reads_at is not None and not 0 <= reads_at <= first:
        raise PathError(
            f"--reads-at {reads_at}: path {by!r} leaves the full one at layer {first}, before it "
            f"could be chosen; give at most {first}, or leave that path out"
        )
    return [*rows.items()], first if reads_at is None else reads_at


def save_kinds(folder: Path, kinds: nn.Linear) -> str:
    """Write what tells kinds of prompts apart, and return the file's SHA-256."""
    from safetensors.torch import save

    data = save({name: each.contiguous() for name, each in kinds.state_dict().items()})
    write_atomically(folder / CHOOSER_FILE, data)
    return hashlib.sha256(data).hexdigest()


def load_policy(routed: RoutedModel, plan: PathFile | Menu) -> Policy:
    """Return the policy of a path or a menu that was read, its adapters held by the model."""
    from drllm.models.healed import load_path

    if isinstance(plan, Menu):
        return load_menu(routed, plan)
    return routed.policy_of(load_path(routed, plan))


def load_menu(routed: RoutedModel, menu: Menu) -> MenuPolicy:
    """Return the policy of a menu, the adapters of its healed paths held by the model.

    A menu of another model is a PathError, a chooser that is missing or another one than the menu
    was made with a CheckpointError, and such an adapter a RecordError.
    """
    import torch
    from safetensors.torch import load

    from drllm.models.base.identity import describe
    from drllm.models.healed import load_path

    record, file = menu.record, menu.file.with_name(CHOOSER_FILE)
    check_model(record, describe(routed.model), menu.file)
    data = file.read_bytes() if refuse_odd_file(file, "read") else b""
    if hashlib.sha256(data).hexdigest() != record.chooser_sha256:
        raise CheckpointError(
            f"{file} is missing or isn't the chooser that {menu.file} was made with; put it back, "
            f"or make the menu again"
        )
    for path in record.paths:
        if path.path.adapters:
            load_path(routed, read_path(str(menu.file.parent / ADAPTERS_FOLDER / path.name)))
    tensors: dict[str, Tensor] = load(data)
    K, D = tensors["weight"].shape
    kinds = torch.nn.Linear(D, K)
    kinds.load_state_dict(tensors)
    kinds.requires_grad_(False)
    worth = torch.tensor([list(record.worth(task).values()) for task in record.tasks])
    paths = {path.name: path.path for path in record.paths}
    return MenuPolicy(paths, kinds, worth, record.reads_at, routed.num_layers)
