"""Changes of valid files: at one place of their JSON, or in single bytes.

A change is drawn with a `random.Random`, so that a seed names it.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

FOREIGN: tuple[Any, ...] = (
    *(None, True, -1, 0, 3.5, 1e308, 10**30),
    *("", "x", "\u0000", "../../etc", [], {}, [None], {"x": [1]}),
)
"""Values that a key or an item is replaced by."""

Place = tuple[str | int, ...]
"""Where a value is in a JSON document: its keys and indices from the top."""


class Change(NamedTuple):
    """A JSON document with one change.

    Attributes:
        document: The changed document.
        place: Where the change is; empty if the whole document was replaced.
    """

    document: Any
    place: Place


def list_places(value: Any, place: Place = ()) -> list[Place]:
    """Return where all values of a JSON document are."""
    places = [place] if place else []
    if isinstance(value, dict):
        for key, inner in value.items():
            places += list_places(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            places += list_places(inner, (*place, number))
    return places


def change_document(document: Any, draw: random.Random) -> Change:
    """Change a JSON document at one place: a value, a key or an item."""
    document = copy.deepcopy(document)
    places = list_places(document)
    if not places:
        return Change(draw.choice(FOREIGN), ())
    place = draw.choice(places)
    *way, last = place
    parent = document
    for key in way:
        parent = parent[key]
    kind = draw.choice(("foreign", "near", "near", "delete", "rename"))
    if kind == "delete":
        del parent[last]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw.choice(("x", f"{last}s"))] = parent.pop(last)
    elif kind == "near":
        parent[last] = make_near_value(parent[last], draw)
    else:
        parent[last] = copy.deepcopy(draw.choice(FOREIGN))
    return Change(document, place)


def make_near_value(value: Any, draw: random.Random) -> Any:
    """Return a value that is nearly right: of another type, out of range, or of another length."""
    if isinstance(value, bool):
        return draw.choice((int(value), str(value).lower(), not value))
    if isinstance(value, (int, float)):
        choices = (str(value), True, -value - 1, value + 0.5, value + 1, float(value), float("nan"))
        return draw.choice((*choices, float("inf")))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], " " + value, len(value), [value]))
    if isinstance(value, list):
        return draw.choice((value[:-1], value + value[-1:], value[::-1], value[1:]))
    if isinstance(value, dict):
        return draw.choice((list(value), list(value.values()), {**value, "x": 1}))
    return draw.choice((0, "null", [None]))


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes that are cut off, changed, or longer."""
    where = draw.randrange(max(1, len(content)))
    kind = draw.choice(("cut", "change", "insert", "empty"))
    if kind == "cut":
        return content[:where]
    if kind == "change":
        return content[:where] + bytes([draw.randrange(256)]) + content[where + 1 :]
    if kind == "insert":
        return content[:where] + draw.randbytes(draw.randint(1, 8)) + content[where:]
    return b""


def change_file(file: Path, draw: random.Random) -> None:
    """Change a file at one place, its JSON or its bytes."""
    content = file.read_bytes()
    if file.suffix not in (".json", ".jsonl") or draw.random() < 0.3:
        file.write_bytes(change_bytes(content, draw))
        return
    if file.suffix == ".json":
        document, _ = change_document(json.loads(content), draw)
        file.write_text(json.dumps(document))
        return
    lines = content.decode().splitlines()
    number = draw.randrange(len(lines))
    document, _ = change_document(json.loads(lines[number]), draw)
    lines[number] = json.dumps(document)
    file.write_text("\n".join(lines) + "\n")


def write_otherwise(document: Any, draw: random.Random) -> str:
    """Write a JSON document with other white space, and with or without escapes."""
    indent = draw.choice((None, 1, 2, "\t"))
    text = json.dumps(document, indent=indent, ensure_ascii=draw.random() < 0.5)
    return draw.choice(("", "\n", "  ")) + text + draw.choice(("", "\n", "\r\n", " \t\n"))


def shuffle_keys(value: Any, draw: random.Random) -> Any:
    """Return a JSON document with the keys of each object in another order."""
    if isinstance(value, list):
        return [shuffle_keys(item, draw) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    draw.shuffle(keys)
    return {key: shuffle_keys(value[key], draw) for key in keys}
