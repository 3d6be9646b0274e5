"""Reads rows from data sets on the hub, and checks the fields of a row."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from drllm.errors import TaskError, shorten
from drllm.extras import need
from drllm.work.listener import quiet

HUB_SET = re.compile(r"([\w.-]+/[\w.-]+(?<!\.yaml))(?::([\w.-]*))?(?::([\w.-]+))?")
"""The name of a data set on the hub: OWNER/NAME[:CONFIG[:SPLIT]].

CONFIG may be empty, as in OWNER/NAME::SPLIT. A path to a `.yaml` file isn't such a name.
"""
HUB_ROWS = 10_000  # maximum number of rows to read from a data set on the hub
MAX_COLUMNS = 400  # how many characters of the names of columns a message shows


class MissingFieldError(TaskError):
    """A row lacks a field.

    Attributes:
        field: The name of the field.
        columns: The names of the row's columns.
    """

    def __init__(self, field: str, columns: Sequence[str]) -> None:
        super().__init__(f"{field!r} is missing (the line has: {name_columns(columns)})")
        self.field = field
        self.columns = columns


class EmptyTextError(TaskError):
    """A text is empty, so its row isn't usable; other rows of the set may be usable."""


def hub_rows(
    repository: str,
    config: str | None,
    split: str,
    *,
    what: str,
    instead: str,
    columns: Sequence[str] = (),
    stream: bool = False,
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a split of a data set on the hub.

    Args:
        repository: The id of the data set.
        config: The configuration; None if there is only one.
        split: The split.
        what: What is fetched, as the subject of an error message ("task 'piqa'").
        instead: What the user can give instead, for the error message.
        columns: The columns to read; empty for all columns.
        stream: Whether to fetch only the rows that the caller reads.

    Raises:
        TaskError: The rows can't be fetched.
    """
    need("eval", f"fetching {what} from the hub", "datasets")
    import datasets

    try:
        with quiet("huggingface_hub", "datasets"):  # our error says it in one line
            rows = datasets.load_dataset(repository, config, split=split, streaming=stream)
        if columns:
            rows = rows.select_columns([name for name in columns if name in rows.column_names])
        yield from rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # OSError: the hub is offline, or the set is gated or missing. ValueError: the repository or
        # the cache lacks the configuration or the split. DatasetsError: the files can't be read.
        cause = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(
            f"{what} can't fetch {split} of {repository} from the hub ({cause}); connect or log "
            f"in (hf auth login), or give {instead}"
        ) from error


def read_hub_set(name: str, kind: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of `OWNER/NAME[:CONFIG[:SPLIT]]`; the default split is `train`.

    `kind` says in an error message what is fetched, such as "task".
    """
    match = HUB_SET.fullmatch(name)
    assert match
    repository, config, split = match.groups()
    return hub_rows(
        repository,
        config or None,
        split or "train",
        what=f"{kind} {repository}",
        instead="another set, OWNER/NAME[:CONFIG[:SPLIT]], or a file",
        stream=True,
    )


def name_columns(columns: Iterable[str]) -> str:
    """List the names of a row's columns for a message."""
    return shorten(", ".join(columns), length=MAX_COLUMNS) or "nothing"


def read_text(row: Mapping[str, Any], key: str) -> str:
    """Return a text field of a row unchanged.

    Raises TaskError if the field is missing, blank or not a text.
    """
    value = _field(row, key)
    if not isinstance(value, str):
        raise TaskError(f"{key!r} is {shorten(repr(value))}; expected text")
    if not value.strip():
        raise EmptyTextError(f"{key!r} is empty; expected text")
    return value


def read_texts(row: Mapping[str, Any], key: str, minimum: int) -> tuple[str, ...]:
    """Return a field of a row that is a list of texts.

    Raises TaskError if there are fewer than `minimum` texts, or if a text is blank.
    """
    value = _field(row, key)
    if not isinstance(value, list):
        raise TaskError(f"{key!r} is {shorten(repr(value))}; expected a list of texts")
    for entry in value:
        if not isinstance(entry, str):
            raise TaskError(f"{key!r} holds {shorten(repr(entry))}; expected texts")
        if not entry.strip():
            raise EmptyTextError(f"{key!r} holds {shorten(repr(entry))}; expected texts")
    if len(value) < minimum:
        raise TaskError(f"{key!r} has {len(value)} entries; expected at least {minimum}")
    return tuple(value)


def read_object(row: Mapping[str, Any], key: str, *keys: str) -> Mapping[str, Any]:
    """Return a field of a row that is an object; `keys` only name its fields in the message."""
    value = row.get(key)
    if not isinstance(value, Mapping):
        expected = " and ".join(map(repr, keys))
        raise TaskError(f"{key!r} is {shorten(repr(value))}; expected an object with {expected}")
    return value


def read_messages(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the role and the text of each message of a row.

    Raises TaskError if there are no messages.
    """
    messages = row["messages"]
    expected = "objects with role and content"
    if not isinstance(messages, list) or not messages:
        raise TaskError(f"'messages' is {shorten(repr(messages))}; expected a list of {expected}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise TaskError(f"'messages' holds {shorten(repr(message))}; expected {expected}")
    return [(read_text(message, "role"), read_text(message, "content")) for message in messages]


def read_index(value: Any, count: int, key: str) -> int:
    """Return the value of the field `key`, which must be the index of an option, from 0.

    Raises TaskError if the value isn't the index of one of `count` options.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise TaskError(
            f"{key!r} is {shorten(repr(value))}; expected an index from 0 to {count - 1}"
        )
    return value


def _field(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise MissingFieldError(key, list(row))
    return row[key]
