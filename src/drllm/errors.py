"""Every exception that drllm raises on purpose.

Each is a `DrllmError`, and also a kind of the built-in exception that a caller would catch. A
message says what is wrong with which value, what was expected, the nearest valid choice, and what
to do. The command line prints the message on one line and exits with status 2. Any other exception
is a defect of drllm and keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks of the writing direction, and halves of surrogate pairs."""

MAX_VALUE = 80
"""How many characters of a value a message shows."""
MAX_NAME = 200
"""How many characters of an unknown name a message shows; it may be the path of a file."""


class DrllmError(Exception):
    """The base of all errors that a user can cause and mend."""


class ConfigError(DrllmError, ValueError):
    """A setting that is unknown, out of range, or without effect in this combination."""


class PathError(DrllmError, ValueError):
    """A path or decisions that no model of this depth can run."""


class TaskError(DrllmError, ValueError):
    """An unknown task, or a question that can't be used."""


class RecordError(DrllmError, ValueError):
    """A file of drllm that can't be trusted; the message names the file and the line."""


class ModelError(DrllmError, OSError):
    """A base model that can't be found, opened or verified."""


class CheckpointError(DrllmError, ValueError):
    """Routers that are broken, incomplete, or made for another base model."""


class ArchitectureError(DrllmError, LookupError):
    """A model whose layers can't be found, or can't be routed exactly."""


class RoutingError(DrllmError, RuntimeError):
    """A request to a routed model that can't be answered exactly."""


class NotShownError(DrllmError, RuntimeError):
    """A loss can't be shown to be small, which is known before the long work of a shrink.

    `drllm shrink` exits with status 1, as where it is known after the work.
    """


class WorkerError(DrllmError, RuntimeError):
    """A worker process that can't be started, or dies again and again."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return the message for an unknown name, with the closest valid names and all of them.

    Args:
        kind: What the name stands for, in the singular ("task", "flag").
        name: The unknown name.
        choices: All valid names; there should be few.
    """
    valid_names = sorted(choices)
    message = nearest_name(kind, name, valid_names)
    has_suggestion = message.endswith("?")
    if not has_suggestion:
        message += "."
    return f"{message} Valid: {', '.join(valid_names)}"


def nearest_name(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return the message for an unknown name, with only the closest valid names.

    Use it instead of `unknown_name` where there are many valid names.

    Example:
        >>> nearest_name("flag", "--num-epoch", ["--num-epochs", "--seed"])
        "unknown flag '--num-epoch'; did you mean '--num-epochs'?"
    """
    message = f"unknown {kind} {shorten(repr(name), MAX_NAME)}"
    closest_names = difflib.get_close_matches(name, sorted(choices), n=2)
    if not closest_names:
        return message
    suggestion = " or ".join(repr(closest) for closest in closest_names)
    return f"{message}; did you mean {suggestion}?"


def shorten(text: str, length: int = MAX_VALUE) -> str:
    """Return a text for a message, cut off with an ellipsis after some characters.

    The value of a setting, a cell or a field is shown this way: a wrong file can hold a whole book
    there.

    Example:
        >>> shorten("a very long value", length=8)
        'a very …'
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(text: str) -> str:
    r"""Return a text with its control characters as escapes, except line ends and tabs.

    All output for people passes through this function once. A terminal obeys control characters.
    Characters that change the writing direction can make a text look like another text.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
