"""The table of verbs: each is one function, registered once with its settings and its own flags.

The parser, the help texts and the messages are made from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drllm.config.settings import Settings, flag_of

if TYPE_CHECKING:
    from drllm.cli.terminal import Terminal

SettingsType = TypeVar("SettingsType", bound=Settings)


@dataclass(frozen=True, slots=True)
class Flag:
    """What a verb reads or writes, apart from its settings.

    Attributes:
        name: Of the flag, with underscores; of the place on the line for a positional one.
        help: One line.
        default: None where the user must give one, or may leave it out.
        required: The verb can't run without.
        many: Takes one value or more.
        positional: Given without a name.
        switch: Takes no value; False where it isn't given.
    """

    name: str
    help: str
    default: str | None = None
    required: bool = False
    many: bool = False
    positional: bool = False
    switch: bool = False

    @property
    def shown(self) -> str:
        """The name as a user writes it."""
        return self.name.upper() if self.positional else flag_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line, understood and checked.

    Attributes:
        verb: Name of the verb.
        settings: One object of each of the verb's groups.
        values: What its own flags say, by name.
        model_given: The user named a base model.
    """

    verb: str
    settings: tuple[Settings, ...]
    values: Mapping[str, Any]
    model_given: bool = False

    def of(self, kind: type[SettingsType]) -> SettingsType:
        """Return the settings of one group of the verb."""
        return next(group for group in self.settings if isinstance(group, kind))

    def text(self, name: str) -> str:
        """Return the value of a flag that is there."""
        return str(self.values[name])

    def path(self, name: str) -> Path:
        """Return the value of a flag that is there, as a path."""
        return Path(self.text(name)).expanduser()

    def paths(self, name: str) -> list[Path]:
        """Return the values of a flag that takes several."""
        return [Path(value).expanduser() for value in self.values[name]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        name: As typed.
        help: One line for `drllm --help`.
        example: A command line that works.
        run: Does the work.
        settings: The groups of settings that become flags.
        flags: What it reads and writes.
        model_from_routers: Without `--model`, the routers name the base model.
        resumes: The same command resumes after an interruption.
    """

    name: str
    help: str
    example: str
    run: Callable[[Request, Terminal], None]
    settings: tuple[type[Settings], ...] = ()
    flags: tuple[Flag, ...] = ()
    model_from_routers: bool = False
    resumes: bool = False


VERBS: dict[str, Verb] = {}
"""Filled when the modules that `drllm.cli` names are imported, in the order of `--help`."""

FOREIGN: dict[str, str] = {
    "lm-eval": "lm-evaluation-harness' own command line, with our model as --model drllm",
}
"""Verbs whose words somebody else reads, and what they do."""


def verb(
    name: str, **described: Any
) -> Callable[[Callable[[Request, Terminal], None]], Callable[[Request, Terminal], None]]:
    """Register a function as a verb; see `Verb` for what describes it."""

    def register(
        function: Callable[[Request, Terminal], None],
    ) -> Callable[[Request, Terminal], None]:
        VERBS[name] = Verb(name=name, run=function, **described)
        return function

    return register


def overview() -> str:
    """Return the text of `drllm --help`."""
    lines = {name: each.help for name, each in VERBS.items()} | FOREIGN
    width = max(map(len, lines))
    verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in lines.items())
    return (
        "usage: drllm VERB [flags]\n\n"
        "Layer routing for frozen Hugging Face language models: skip, execute or repeat each\n"
        "layer, once per prompt.\n\n"
        f"verbs:\n{verbs}\n\n"
        "flags:\n"
        "  --help       this text; after a verb, its flags\n"
        "  --version    the version\n\n"
        f"first try: {VERBS['run'].example}\n"
    )
