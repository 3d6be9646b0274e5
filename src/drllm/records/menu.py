"""`menu.json`: a few static paths, what each is worth to each kind of prompt, and at what price."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from drllm.paths import StaticPath
from drllm.records.codec import read_json
from drllm.records.static_paths import MENU_FILE as MENU_FILE
from drllm.records.static_paths import PathFile, StaticPaths, read_path

CHOOSER_FILE, ADAPTERS_FOLDER = "chooser.safetensors", "adapters"
RIVALS = ("best single path", "permuted choices", "oracle by kind")
BEST_SINGLE, PERMUTED_CHOICES, BY_KIND = RIVALS  # what a menu is compared with

Shares: TypeAlias = dict[str, float]  # by path, the share of some questions that run it


class MenuFile(StaticPaths, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A menu without its chooser, whose digest it has; the full path comes first.

    The kinds are the tasks, in their order; on the tasks `chosen_on` paths were tuned or trained.
    By task and path there is in `select` what the path has more of the objective than the full one,
    on average over these questions, and in `chosen` which share of them takes it.
    The price is in nats for all layers together.
    """

    chosen_on: tuple[str, ...] = ()
    reads_at: int
    price: float
    select: dict[str, dict[str, float]]
    chosen: dict[str, Shares]
    chooser_sha256: str

    def __post_init__(self) -> None:
        if not self.paths or self.paths[0].path != StaticPath(range(self.num_layers)):
            raise ValueError("the first path isn't the full one")
        if any([*self.select.get(task, ())] != [*self.executions] for task in self.tasks):
            raise ValueError("`select` hasn't each path's value for each task")

    @property
    def executions(self) -> dict[str, float]:
        """The cost of each path in layer equivalents."""
        return {path.name: path.executions for path in self.paths}

    def worth(self, task: str) -> dict[str, float]:
        """Return what each path is worth to a kind of prompts, less what it costs."""
        rate, costs = self.price / self.num_layers, self.executions
        return {name: change - rate * costs[name] for name, change in self.select[task].items()}

    def best_for(self, task: str) -> str:
        """Return the path that is worth most to a kind of prompts."""
        worth = self.worth(task)
        return max(worth, key=worth.__getitem__)

    def rivals(self, own: Shares, tasks: Sequence[str]) -> dict[str, list[Shares]]:
        """Return the shares of each task's questions that run the paths, for each rival.

        Given are the menu's own shares over all tasks, whose mean executions the first two rivals
        don't exceed. Nothing but `select` chooses; the oracle is told each question's task, and is
        left out where one of them is no kind of the menu.
        """
        costs = self.executions
        values = {name: sum(self.select[task][name] for task in self.tasks) for name in costs}
        single = best_mixture(values, costs, sum(own[name] * costs[name] for name in own))
        found: dict[str, list[Shares]] = {
            BEST_SINGLE: [single] * len(tasks),
            PERMUTED_CHOICES: [own] * len(tasks),
        }
        if set(tasks) <= set(self.tasks):
            found[BY_KIND] = [{self.best_for(task): 1.0} for task in tasks]
        return found


def best_mixture(values: Shares, costs: Shares, most: float) -> dict[str, float]:
    """Return the shares of one or two things of the greatest mean value within a mean cost."""
    found: list[tuple[float, dict[str, float]]] = []
    for name, value in values.items():
        if costs[name] <= most + 1e-9:
            found.append((value, {name: 1.0}))
            continue
        for below in (each for each in values if costs[each] < most):
            share = (most - costs[below]) / (costs[name] - costs[below])
            mean = share * value + (1 - share) * values[below]
            found.append((mean, {name: share, below: 1 - share}))
    return max(found, key=lambda each: each[0])[1]


class Menu(NamedTuple):
    """A menu's file, in its folder, and what it says."""

    file: Path
    record: MenuFile


def find_menu(given: Path | str) -> Menu | None:
    """Return the menu in a folder, given that or its `menu.json`; None where there is none.

    One that can't be read is a RecordError.
    """
    file = Path(given)
    file = file / MENU_FILE if file.is_dir() else file
    is_there = file.name == MENU_FILE and file.is_file()
    return Menu(file, read_json(file, MenuFile)) if is_there else None


def read_plan(given: str) -> PathFile | Menu:
    """Read what decides without routers: a menu, or a path as `read_path` does."""
    return find_menu(given) or read_path(given)
