"""A command line after parsing: the verb, its settings, and the values of its flags."""

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
        values: The values of the verb's own flags, by name.
        names_model: Whether the user named a base model.
    """

    verb: str
    settings: tuple[Settings, ...]
    values: Mapping[str, Any]
    names_model: bool

    def get_settings(self, kind: type[Group]) -> Group:
        """Return the settings of one group."""
        return next(group for group in self.settings if isinstance(group, kind))

    def path(self, name: str) -> Path:
        """Return the value of a required flag as a path."""
        return Path(self.values[name]).expanduser()

    def optional_path(self, name: str) -> Path | None:
        """Return the value of a flag as a path; None if the flag is missing."""
        return self.path(name) if self.values[name] else None

    def paths(self, name: str) -> list[Path]:
        """Return all values of a flag as paths."""
        return [Path(value).expanduser() for value in self.values[name] or ()]
