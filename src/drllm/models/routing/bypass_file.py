"""The file of a bypass: its tensors as safetensors, and in their metadata which model it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from drllm.errors import CheckpointError, RecordError, RoutingError
from drllm.model.identity import describe
from drllm.models.routing.bypass import TENSORS, Bypass
from drllm.records.codec import decode, refuse_special_file, write_atomically
from drllm.records.identity import differ

BYPASS_FILE = "bypass.safetensors"
FORMAT = "drllm.bypass"
VERSION = 1
KEY = "drllm"  # of the metadata, which holds texts alone
IDENTITY = ("class", "num_layers", "hidden_size", "fingerprint")


class BypassRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file says about a bypass.

    Attributes:
        format: `FORMAT`.
        version: `VERSION`.
        model: The identity of the model that it was fitted for.
        texts: The names of the sources of the texts that it was fitted on.
        num_tokens: How many tokens these are.
        unexplained: For each layer, the squared error on held-out texts as a share of that of doing
            nothing.
        made_from: What it was made from: the settings, the model and the texts.
        drllm_version: The version that wrote the file.
    """

    format: str = FORMAT
    version: Annotated[int, msgspec.Meta(ge=1)] = VERSION
    model: dict[str, Any]
    texts: tuple[str, ...] = ()
    num_tokens: int = 0
    unexplained: tuple[float, ...] = ()
    made_from: dict[str, Any] = {}
    drllm_version: str = ""


def save_bypass(file: Path, bypass: Bypass, record: BypassRecord) -> None:
    """Write a bypass to a file; an old file stays if that fails."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in bypass.tensors().items()}
    metadata = {"format": "pt", KEY: msgspec.json.encode(record).decode()}
    write_atomically(file, save(tensors, metadata))


def load_bypass(file: Path | str) -> Bypass:
    """Read a bypass from a file.

    Args:
        file: A file that `drllm bypass` has written, or its folder.

    Raises:
        CheckpointError: The file is missing, is damaged, or isn't a bypass.
    """
    bypass, _ = load_bypass_with_record(file)
    return bypass


def load_bypass_with_record(file: Path | str) -> tuple[Bypass, BypassRecord]:
    """Read a bypass, and what its file says about it; as `load_bypass`."""
    file = Path(file).expanduser()
    if file.is_dir():
        file /= BYPASS_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} isn't a file; give a file that 'drllm bypass' has written")
    refuse_special_file(file, "read")
    try:
        with safe_open(file, framework="pt") as content:
            record = _read_record(file, content.metadata() or {})
            missing = set(TENSORS) - set(content.keys())
            if missing:
                raise CheckpointError(f"{file} has no tensor {min(missing)!r}; fit it anew")
            tensors = {name: content.get_tensor(name) for name in TENSORS}
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} isn't a safetensors file, or it is damaged ({error}); give a file that "
            f"'drllm bypass' has written"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read; see whether you may read it") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name!r} isn't made of finite float32 numbers")
    try:
        return Bypass(**tensors, model=record.model, file=str(file)), record
    except (RoutingError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read_record(file: Path, metadata: Mapping[str, str]) -> BypassRecord:
    """Return what a file says about its bypass."""
    if KEY not in metadata:
        raise CheckpointError(f"{file} isn't a bypass; give a file that 'drllm bypass' has written")
    try:
        values = decode(metadata[KEY], dict[str, Any], str(file))
    except RecordError as error:
        raise CheckpointError(f"{error}; fit the bypass anew") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{file} isn't a bypass; give a file that 'drllm bypass' has written")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{file} was written by drllm {values.get('drllm_version')} in version "
            f"{values.get('version')} of the format, and this drllm reads version {VERSION}; use "
            f"that version, or fit the bypass anew"
        )
    try:
        return msgspec.convert(values, BypassRecord)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {error}; fit the bypass anew") from error


def check_bypass(model: Any, bypass: Bypass) -> None:
    """Refuse a bypass that was fitted for another model; the message lists every difference.

    Args:
        model: The model.
        bypass: The bypass.
    """
    if not bypass.model:  # made by hand: only its shape is known
        text = model.config.get_text_config()
        bypass.check(int(text.num_hidden_layers), int(text.hidden_size))
        return
    identity = describe(model)
    differences = []
    for key in IDENTITY:
        expected = bypass.model.get(key)
        if expected and differ(key, expected, identity[key], "bypass"):
            differences.append(f"{key} {expected} (this model has {identity[key]})")
    if differences:
        raise CheckpointError(
            f"this bypass was fitted for {bypass.model.get('id') or 'another model'} with "
            f"{', '.join(differences)}; load that model, or fit a bypass for this one"
        )
