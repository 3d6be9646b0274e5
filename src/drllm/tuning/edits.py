"""What one edit makes of a static path: a layer or a sublayer skipped, a damped repeat.

Loads no torch.
"""

from collections.abc import Iterator

from drllm.paths import ALL, ATTENTION, MLP, StaticPath, Step, layer_of, step_of

LAYERS, SUBLAYERS, REPEATS = "layers", "sublayers", "repeats"
EDITS = (LAYERS, SUBLAYERS, REPEATS)
"""What a search may do: skip layers; skip their attention or MLP too; start from a repeat too."""

SCALES = (0.25, 0.5, 1.0)
"""Weights of a second pass's update. Published work on looping frozen models finds gains only below
1 (arXiv 2605.23872)."""
LONGEST_BLOCK = 7
"""Layers of a block that is repeated, at most."""


def skips(path: StaticPath, kind: str) -> Iterator[StaticPath]:
    """Yield the paths that leave out one thing more, each once; at least one step is left.

    A layer that runs more than once is left as it is: it was repeated for a reason.
    """
    layers = [layer_of(item) for item in path.steps]
    for place, item in enumerate(path.steps):
        step = step_of(item)
        if layers.count(step.layer) > 1:
            continue
        before, after = path.steps[:place], path.steps[place + 1 :]
        if before or after:
            yield StaticPath([*before, *after])
        if kind == SUBLAYERS and step.run == ALL:
            for run in (ATTENTION, MLP):
                yield StaticPath([*before, Step(step.layer, run), *after])


def repeats(num_layers: int) -> Iterator[StaticPath]:
    """Yield the full path with one block run a second time, damped or not."""
    full = tuple(range(num_layers))
    for size in range(1, min(LONGEST_BLOCK, num_layers) + 1):
        for start in range(num_layers - size + 1):
            end = start + size
            for scale in SCALES:
                again = [Step(layer, ALL, scale) for layer in full[start:end]]
                yield StaticPath([*full[:end], *again, *full[end:]])
