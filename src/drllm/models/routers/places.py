"""Check that a folder may hold routers, and explain why one doesn't. Doesn't import torch."""

from pathlib import Path

from drllm.errors import CheckpointError
from drllm.model.places import HUB_ID

CONFIG_FILE = "router_config.json"
WEIGHTS_FILE = "routers.safetensors"


def check_place(place: Path) -> None:
    """Raise CheckpointError if a place is neither a folder of routers nor a hub id.

    A hub id is only checked for its form. Whether it exists is known when the routers are fetched.
    """
    is_hub_id = HUB_ID.fullmatch(str(place)) is not None and not place.exists()
    if not is_hub_id and not (place / CONFIG_FILE).is_file():
        raise CheckpointError(explain_missing_config(place))


def explain_missing_config(folder: Path) -> str:
    """Say why a place isn't a folder of routers, and what to give instead."""
    if folder.is_file():
        return f"{folder} is a file; give the folder of routers that holds {CONFIG_FILE}"
    problem = f"{folder} has no {CONFIG_FILE}"
    advice = "give a folder that 'drllm train' has written"
    if (folder / "routers" / CONFIG_FILE).is_file():
        return f"{problem}; did you mean {folder / 'routers'}?"
    if (folder / "config.json").is_file():
        return f"{problem}; is it a base model? Then give it as --model"
    if not folder.exists():
        return f"{problem}, since it doesn't exist; {advice}"
    if not any(folder.iterdir()):
        return f"{problem}, since it is empty; {advice}"
    return f"{problem}; {advice}"
