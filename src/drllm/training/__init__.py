"""Teacher-forced training of the routers on features of the frozen model.

`stage.train` is the whole stage. This file doesn't import torch.
"""

from pathlib import Path

from drllm.models.routers.places import WEIGHTS_FILE

CHECKPOINT_FILE = "checkpoint.safetensors"
"""File in the routers' folder with the state of a training that hasn't ended."""


def is_finished(output: Path) -> bool:
    """Tell whether a folder holds routers whose training has ended."""
    return (output / WEIGHTS_FILE).exists() and not (output / CHECKPOINT_FILE).exists()
