"""A registry: the things of one kind that users choose by name, such as tasks or baselines.

Adding one is a class (or function) in a module that the registry knows, under its decorator.
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
    """Things of one kind by name, in the order of their registration.

    `kind` is what a name stands for, in the singular, for messages ("baseline"). The `modules`
    register on import, with the first look-up, so that making the registry loads nothing;
    `package.*` is every module of a package, so that adding one is adding a file.
    """

    def __init__(
        self, kind: str, modules: Sequence[str] = (), error: type[DrllmError] = ConfigError
    ) -> None:
        self.kind = kind
        self._modules = tuple(modules)
        self._error = error
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[Entry], Entry]:
        """Register the decorated class or function under a name, and under further aliases.

        What is defined again, as by a notebook cell that is run twice, replaces the earlier one; a
        name that is taken by something else is a ValueError.
        """

        def add(entry: Any) -> Any:
            own = getattr(entry, "__qualname__", entry)
            for name in names:
                taken = self._entries.get(name, entry)
                if getattr(taken, "__qualname__", taken) != own:
                    raise ValueError(f"there is a {self.kind} {name!r} already")
                self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return what is registered under a name; of an unknown one, the error has the nearest."""
        entries = self._loaded()
        if name not in entries:
            raise self._error(unknown_name(self.kind, name, entries))
        return entries[name]

    def summaries(self) -> dict[str, str]:
        """Return each name with the first line of its docstring, for listings."""
        docs = {name: inspect.getdoc(entry) or "" for name, entry in self._loaded().items()}
        return {name: doc.partition("\n")[0] for name, doc in docs.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._loaded()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def _loaded(self) -> dict[str, T]:
        for module in self._modules:
            found = importlib.import_module(module.removesuffix(".*"))
            if module.endswith(".*"):
                for each in pkgutil.iter_modules(found.__path__, f"{found.__name__}."):
                    importlib.import_module(each.name)
        self._modules = ()
        return self._entries
