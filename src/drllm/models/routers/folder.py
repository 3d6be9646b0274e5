"""The files of saved routers: written all at once, and read without trusting what they hold.

Owns the names of the files, replacing them so that a failure leaves the earlier ones, and refusing
what is missing, broken, of a future format, or no such file at all. Leaves what config and weights
mean, and whether they fit each other, to `routers`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from drllm.errors import CheckpointError

FORMAT_VERSION = 1
CONFIG_FILE = "router_config.json"
WEIGHTS_FILE = "routers.safetensors"
CARD_FILE = "README.md"
PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save and pickle begin a file


def replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, replacing those that are there: all of them, or none.

    Everything is on the disk before the first of the earlier files is touched, and these are put
    back if a later step fails. While they change places the config is away, so that a process
    killed in between leaves a folder that is refused, never one of two halves; the next save that
    succeeds takes away what it left beside them.

    Args:
        folder: Made if need be; other files in it stay as they are.
        files: Name → content; `CONFIG_FILE` among them.

    Raises:
        CheckpointError: The folder can't be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} in it is a folder")
        _exchange(folder, files)
    except OSError as error:
        raise CheckpointError(
            f"can't write routers to {folder}: {error.strerror}; "
            f"free some space or choose a folder that you may write to"
        ) from error


def _exchange(folder: Path, files: Mapping[str, bytes]) -> None:
    mark = uuid.uuid4().hex
    new = {name: folder / f".{name}.{mark}.new" for name in files}
    old = {name: folder / f".{name}.{mark}.old" for name in files}
    names = sorted(files, key=lambda name: name == CONFIG_FILE)  # the config last
    placed = []
    try:
        for name in names:
            with new[name].open("xb") as file:
                file.write(files[name])
                file.flush()
                os.fsync(file.fileno())
        for name in reversed(names):
            if (folder / name).exists():
                (folder / name).replace(old[name])
        for name in names:
            new[name].replace(folder / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (folder / name).unlink()
        for name in names:
            new[name].unlink(missing_ok=True)
            if old[name].exists():
                old[name].replace(folder / name)
        raise
    for name in names:
        for left in folder.glob(f".{name}.*"):  # and what a save that was killed left behind
            if left.suffix in (".new", ".old"):
                left.unlink(missing_ok=True)


def read_values(folder: Path) -> dict[str, Any]:
    """Read a folder's `router_config.json`, without its format version, which is checked.

    Raises:
        CheckpointError: No folder of routers, a broken file, or one of a future format.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(_no_config(folder))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON; train the routers again") from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object; train the routers again")
    version = values.pop("format_version", None)
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
    return values


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a folder's `routers.safetensors`: the tensors, and the notes in its header.

    Raises:
        CheckpointError: No such file, a broken one, or a pickle.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}; is it a folder of routers?")
    try:
        with safe_open(path, framework="pt") as file:
            # Copied, since the tensors would otherwise be a view of the file for ever.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            if raw.read(4).startswith(PICKLES):
                raise CheckpointError(
                    f"{path} is a pickle under another name; drllm opens no pickles, since they "
                    f"can run any code: save the routers with save_pretrained"
                ) from error
        raise CheckpointError(
            f"{path} is broken or cut off ({error}); train the routers again"
        ) from error


def _no_config(folder: Path) -> str:
    """Say what is given instead of a folder of routers, and what may have been meant."""
    if folder.is_file():
        return f"{folder} is a file; give the folder of routers that holds {CONFIG_FILE}"
    inner = folder / "routers"
    if (inner / CONFIG_FILE).is_file():
        return f"{folder} has no {CONFIG_FILE}; did you mean {inner}?"
    if (folder / "config.json").is_file():
        return f"{folder} has no {CONFIG_FILE}; is it a base model? Then give it as --model"
    give = "give a folder that 'drllm train' has written"
    if not folder.exists():
        return f"{folder} has no {CONFIG_FILE}, since it doesn't exist; {give}"
    if not any(folder.iterdir()):
        return f"{folder} has no {CONFIG_FILE}, since it is empty; {give}"
    return f"{folder} has no {CONFIG_FILE}; {give}"
