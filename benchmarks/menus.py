"""Whether a menu of paths pays: against its best single path, chance, and the task told to it.

Of each task it asks the questions that `drllm tune` and `drllm heal` leave to be tested on, along
each path of the menus; a menu's answer to a question is that of the path it chooses for it. What
`healed.py` reads of a path is compared, over all tasks: each menu less its rivals, with the 95 %
interval. Menus of several seeds are made from the same paths, so nothing is asked again for them.

    python benchmarks/menus.py --menus DIR,... [--paths FILE[:NAME],...] [--tasks TASKS]
        [--questions N] [--texts N] [--quick] [--json FILE] [--data-dir DIR] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import common
from common.compare import compared, in_words
from common.quantities import QUICK, WHOLE, Quantity, less_full, quantities

from drllm.config import TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.errors import ConfigError
from drllm.models.healed import load_path
from drllm.models.routers.depth_control import routes_of
from drllm.models.routing.menu import load_menu
from drllm.models.routing.routed_model import RoutedModel
from drllm.records.menu import Menu, Shares, find_menu
from drllm.records.static_paths import TEST, read_path_list
from drllm.tuning.parts import parts_of_tasks

Chosen = dict[str, dict[str, list[str]]]
"""By task and quantity, the path of each question."""


def paths_chosen(
    routed: RoutedModel, menu: Menu, asked: Mapping[str, dict[str, Quantity]]
) -> Chosen:
    """Return the path that a menu chooses for each question, given what `quantities` returns."""
    policy = load_menu(routed, menu)
    named = dict(zip(policy.by_route, policy.paths, strict=True))

    def prompts(quantity: Quantity) -> list[tuple[int, ...]]:
        return [tuple(item.question.context) for item in quantity.asked]

    read = (each for own in asked.values() for each in own.values())
    every = [*dict.fromkeys(prompt for each in read for prompt in prompts(each))]  # each once
    routes = routes_of(routed, policy, every).tolist()
    path_of = {prompt: named[tuple(route)] for prompt, route in zip(every, routes, strict=True)}
    return {
        task: {name: [path_of[prompt] for prompt in prompts(each)] for name, each in own.items()}
        for task, own in asked.items()
    }


def mixed(by_path: Mapping[str, Sequence[float]], shares: Shares) -> list[float]:
    """Return a rival's value of each question: of each path's its share."""
    rows = zip(*(by_path[name] for name in shares), strict=True)
    return [sum(map(float.__mul__, shares.values(), row)) for row in rows]


def against_rivals(
    menu: Menu, chosen: Chosen, asked: Mapping[str, dict[str, Quantity]], places: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what a menu chose, and its differences from each rival and path over all tasks.

    `places` says where in `Quantity.values` the paths are, those too that aren't on the menu.
    """
    record, tasks = menu.record, [*asked]
    counts = {
        task: Counter(name for names in by_quantity.values() for name in names)
        for task, by_quantity in chosen.items()
    }
    total = sum(counts.values(), Counter())
    own = {name: number / total.total() for name, number in total.items()}
    rivals = record.rivals(own, tasks)
    rivals |= {name: [{name: 1.0}] * len(tasks) for name in places}
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in rivals}
    for number, (task, by_quantity) in enumerate(asked.items()):
        for name, (_, values) in by_quantity.items():
            by_path = {path: values[place] for path, place in places.items()}
            ours[name] += [by_path[path][q] for q, path in enumerate(chosen[task][name])]
            for rival, shares in rivals.items():
                theirs[rival][name] += mixed(by_path, shares[number])
    costs = record.executions
    of_all = {
        "executions": sum(share * costs[name] for name, share in own.items()),
        "chosen": {task: dict(each) for task, each in counts.items()},
        "rivals": {name: rivals[name] for name in rivals if name not in places},
    }
    less = {
        rival: {name: compared(name, ours[name], each[name]) for name in ours}
        for rival, each in theirs.items()
    }
    return of_all, less


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--menus", required=True, help="folders of menus that have the same paths")
    parser.add_argument("--paths", default="", help="further static paths to compare with")
    parser.add_argument("--tasks", help="comma list; a menu's own unless given")
    parser.add_argument("--questions", type=int, help="with options, of a task at most")
    parser.add_argument("--texts", type=int, help="whose next-token loss is read, of a task")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    found: dict[str, Menu] = {}
    for folder in options.menus.split(","):
        if (menu := find_menu(folder)) is None:
            raise ConfigError(f"{folder} holds no menu; make one with drllm menu")
        found[folder] = menu
    first = next(iter(found.values()))
    for folder, menu in found.items():
        if menu.record.paths != first.record.paths:
            raise ConfigError(
                f"{folder} has other paths than {first.file.parent}; compare it alone"
            )
    # A healing trains on all questions that may be fitted on.
    config = TuneConfig(data_dir=options.data_dir, num_fit=LARGEST_INT)
    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    paths = dict(load_menu(routed, first).paths)
    for name, file in read_path_list(options.paths).items():
        if name in paths:
            raise ConfigError(f"a path of the menus is called {name!r} too; rename a file")
        paths[name] = load_path(routed, file)
    asked = {
        parts.task.name: quantities(routed, parts, TEST, [*paths.values()], sizes)
        for parts in parts_of_tasks(config, options.tasks or ",".join(first.record.tasks))
    }
    places = {name: place for place, name in enumerate(paths)}
    options.clock = "none"
    figures: dict[str, Any] = {"of": common.of(base, options), "tasks": {}, "menus": {}}
    for task, by_quantity in asked.items():
        figures["tasks"][task] = less_full(task, TEST, by_quantity, [*paths])
    for folder, menu in found.items():
        chosen = paths_chosen(routed, menu, asked)
        of_all, less = against_rivals(menu, chosen, asked, places)
        figures["menus"][folder] = {**of_all, "less": less}
        print(f"{folder}: {of_all['executions']:.2f} executions on average; over all tasks, less")
        for rival, by_name in less.items():
            for name, row in by_name.items():
                print(f"  {rival:24} {name:24} {in_words(name, row)}", flush=True)
    common.write(options, figures)


if __name__ == "__main__":
    main()
