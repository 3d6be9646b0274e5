"""The class `CommandLine`, the result of parsing: the verb, its settings and its flags' values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from drllm.config.fields import Settings

Group = TypeVar("Group", bound=Settings)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A parsed command line whose values are checked.

    Attributes:
        verb: The name of the verb.
        settings: One object for each group of settings that the verb has.
        values: The values of the verb's own flags by name, with underscores.
        names_model: Whether the user named a base model, by flag or in a file.
    """

    verb: str
    settings: tuple[Settings, ...]
    values: Mapping[str, Any]
    names_model: bool

    def get_settings(self, kind: type[Group]) -> Group:
        """Return the settings of a group, by its class."""
        return next(group for group in self.settings if isinstance(group, kind))

    def path(self, name: str) -> Path:
        """Return the value of a required flag as a path."""
        return Path(self.values[name]).expanduser()

    def optional_path(self, name: str) -> Path | None:
        """Return the value of a flag as a path; None without the flag."""
        return self.path(name) if self.values[name] else None

    def paths(self, name: str) -> list[Path]:
        """Return all values of a flag as paths; an empty list without the flag."""
        return [Path(value).expanduser() for value in self.values[name] or ()]
