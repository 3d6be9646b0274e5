"""What a record means: that it says what its file says, and that no number is out of range."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from drllm.errors import DrllmError

COUNTS = frozenset(
    [
        "asked",
        "attempts",
        "batch_size",
        "copies",
        "draws",
        "epoch",
        "epochs_done",
        "examples",
        "layer",
        "lost",
        "n",
        "needed",
        "new_tokens",
        "next_layer",
        "num_available",
        "num_bytes",
        "num_failed",
        "num_fewshot",
        "num_layers",
        "num_prompts",
        "num_questions",
        "num_records",
        "num_seeds",
        "num_tests",
        "num_texts",
        "num_tokens",
        "passed",
        "prompt_tokens",
        "rank",
        "refit_tokens",
        "schema_version",
        "simulation",
        "tokens",
        "won",
    ]
)
"""Fields whose numbers can't be negative."""
SHARES = frozenset(
    [
        "accuracy",
        "chance",
        "correct",
        "grades",
        "macro_f1",
        "p",
        "p_corrected",
        "reward",
        "right",
        "unchanged_routes",
    ]
)
"""Fields whose numbers are from 0 to 1."""
AMOUNTS = frozenset(
    [
        "attention",
        "decode_executions",
        "deviation",
        "excluded_loss",
        "executions",
        "kv_bytes_per_token",
        "max_drop",
        "max_loss_increase",
        "minutes",
        "ridge",
        "seconds",
        "speed",
        "weights",
    ]
)
"""Fields whose numbers can't be negative, and needn't be whole."""

FREE = frozenset(
    ("config", "files", "made_from", "model", "plan", "runtime", "summary", "training")
)
"""Fields that may hold anything: what a stage was made from, for the reader and for comparisons."""


class Refusal(str):
    """The message of the error by which a reader refused a file."""


def read_or_refuse(read: Callable[[Path], Any], file: Path) -> Any:
    """Return what a reader makes of a file, or its refusal, which is one line with the file."""
    try:
        return read(file)
    except DrllmError as error:
        message = Refusal(error)
    assert "\n" not in message
    assert file.name in message or file.parent.name in message, message
    return message


def assert_sound(document: Any, record: Any, *, has_free_keys: bool = False) -> None:
    """Assert that a record says what a JSON document says, and that no number is out of range."""
    read_document = to_document(record)
    assert_same_meaning(document, read_document, has_free_keys=has_free_keys)
    assert list(find_unsound(read_document)) == []


def to_document(value: Any) -> Any:
    """Return a record as a JSON document with every field, also those that have their default."""
    if isinstance(value, msgspec.Struct):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        return to_document(
            {name: item for name, item in fields.items() if item is not msgspec.UNSET}
        )
    if isinstance(value, dict):
        return {name: to_document(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_document(item) for item in value]
    return msgspec.to_builtins(value)


def assert_same_meaning(
    document: Any, record: Any, *, has_free_keys: bool, place: str = ""
) -> None:
    """Assert that a record says what a JSON document says.

    A field that the document lacks has its default. `has_free_keys` allows keys that aren't read.
    """
    if isinstance(document, dict) and isinstance(record, dict):
        unread = document.keys() - record.keys()
        assert has_free_keys or not unread, f"{place} has keys that aren't read: {unread}"
        for key in document.keys() & record.keys():
            inner_place = f"{place}.{key}"
            inner = document[key], record[key]
            assert_same_meaning(*inner, has_free_keys=has_free_keys, place=inner_place)
    elif isinstance(document, list) and isinstance(record, list):
        assert len(document) == len(record), place
        for number, inner in enumerate(zip(document, record, strict=True)):
            inner_place = f"{place}[{number}]"
            assert_same_meaning(*inner, has_free_keys=has_free_keys, place=inner_place)
    else:
        assert is_same_value(document, record), f"{place}: {document!r} was read as {record!r}"


def is_same_value(written: Any, read: Any) -> bool:
    """Tell whether a value was read as it was written; 3 may be read as 3.0, but not True as 1."""
    if isinstance(written, bool) or isinstance(read, bool):
        return written is read
    if isinstance(written, int) and isinstance(read, float):
        return float(written) == read
    return type(written) is type(read) and bool(written == read)


def find_unsound(value: Any, place: str = "") -> Iterator[str]:
    """Yield the places of a record where a number is out of its range, or lists don't fit."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from find_unsound(item, f"{place}[{number}]")
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        inner_place = f"{place}.{name}"
        if is_out_of_range(name, item):
            yield f"{inner_place} is {item!r}"
        if name not in FREE:
            yield from find_unsound(item, inner_place)


def is_out_of_range(name: str, value: Any) -> bool:
    """Tell whether the value of a field is a number that the field can't have."""
    if name == "decisions" and isinstance(value, list):
        return not set(value) <= {0, 1, 2} or not any(value)
    if name == "interval":
        low, high = value
        return low > high
    if isinstance(value, list):
        return any(is_out_of_range(name, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if not math.isfinite(value):
        return True
    if name in SHARES:
        return not 0 <= value <= 1
    return name in COUNTS | AMOUNTS and value < 0
