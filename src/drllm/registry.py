"""A registry of classes or functions that users choose by name, such as tasks or baselines.

To add an entry, decorate a class or function with `register` in a module that the registry imports.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from drllm.errors import ConfigError, DrllmError, unknown_name

T = TypeVar("T")
Entry = TypeVar("Entry")


class Registry(Generic[T]):
    """Classes or functions of one kind by name, in the order of their registration.

    Args:
        kind: What a name stands for, in the singular, for messages ("baseline").
        modules: Modules that register entries. They are imported on the first look-up. `package.*`
            means every module of a package.
        error: The error for an unknown name.
    """

    def __init__(
        self, kind: str, modules: Sequence[str] = (), error: type[DrllmError] = ConfigError
    ) -> None:
        self.kind = kind
        self._modules = tuple(modules)
        self._error = error
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[Entry], Entry]:
        """Register the decorated class or function under a name and its aliases.

        Defining the same class or function again, for example in a notebook cell that is run twice,
        replaces the first definition. Raises ValueError if the name of another entry is used again.
        """

        def add(entry: Any) -> Any:
            for name in names:
                self._add(name, entry)
            return entry

        return add

    def _add(self, name: str, entry: Any) -> None:
        is_new = name not in self._entries
        if not is_new and _definition(self._entries[name]) != _definition(entry):
            raise ValueError(f"there is a {self.kind} {name!r} already")
        self._entries[name] = entry

    def get(self, name: str) -> T:
        """Return the entry of a name. The error for an unknown name suggests the nearest name."""
        entries = self._load_entries()
        if name not in entries:
            raise self._error(unknown_name(self.kind, name, entries))
        return entries[name]

    def summaries(self) -> dict[str, str]:
        """Return the first line of each entry's docstring by the name of the entry."""
        summaries = {}
        for name, entry in self._load_entries().items():
            docstring = inspect.getdoc(entry) or ""
            summaries[name] = docstring.partition("\n")[0]
        return summaries

    def __contains__(self, name: object) -> bool:
        return name in self._load_entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load_entries())

    def _load_entries(self) -> dict[str, T]:
        """Return the entries; the first call imports the modules that register them."""
        for name in self._modules:
            module = importlib.import_module(name.removesuffix(".*"))
            if name.endswith(".*"):
                for submodule in pkgutil.iter_modules(module.__path__, f"{module.__name__}."):
                    importlib.import_module(submodule.name)
        self._modules = ()  # nothing is left to import
        return self._entries


def _definition(entry: Any) -> Any:
    """Return the qualified name, which stays the same when a class or function is redefined."""
    return getattr(entry, "__qualname__", entry)
