"""Making a menu as a stage: static paths and questions of several tasks in, a menu's folder out.

What tells kinds of prompts apart is fitted on one part of the questions. On another, which no
healing has trained on, it is measured what paths are worth to a kind, and chosen what a layer
costs; see `parts`.

Axes: K tasks, P paths, Q questions, D hidden.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.bisection import bisect
from drllm.config import MenuConfig
from drllm.config.fields import changed
from drllm.errors import ConfigError, PathError
from drllm.listener import Listener
from drllm.models.healed import load_path
from drllm.models.routers.card import template
from drllm.models.routers.depth_control import recorded
from drllm.models.routers.logistic import fit_logistic
from drllm.models.routing.menu import menu_rows, save_kinds
from drllm.models.routing.policies import PromptView
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.paths import StaticPath
from drllm.records import healed
from drllm.records.codec import digest_of, read_json, write_atomically, write_json
from drllm.records.manifest import new_manifest
from drllm.records.menu import ADAPTERS_FOLDER, MENU_FILE, MenuFile
from drllm.records.places import only_writer
from drllm.records.resume import Chunks
from drllm.records.static_paths import FIT, SELECT, NamedPath, read_path_list, steps_to_write
from drllm.tasks.base import Task
from drllm.tuning.parts import parts_of_tasks
from drllm.tuning.run import TaskScorer

CHUNKS_FOLDER = "menu.partial"
FULL = "full"


def make_menu(
    model: Any,
    tasks: Task | str | Sequence[Task | str] | None = None,
    config: MenuConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> MenuFile:
    """Make a menu of static paths, of which each prompt runs the one that suits its kind.

    Args:
        model: As for `tune`.
        tasks: The kinds: at least two tasks, their names or files of questions.
        config: The settings, with the paths among them; the full path is added.
        output_dir: Folder for the menu; None writes nothing that stays.
        tokenizer: As for `tune`.
        listener: Hears how far it is.
        settings: Settings of `MenuConfig` by name, in place of the config's.

    Returns:
        The menu's file: paths, what they are worth to each task, the price, and what is chosen.

    Raises:
        ConfigError: One task, no paths, too few executions, or a folder of another run or a menu.
        PathError: Paths that no menu can have; see `MenuPolicy`.
        TaskError: An unknown task, or too few questions.

    Source: ours.
    """
    config, listener = changed(MenuConfig, config, settings), listener or Listener()
    given, divided = read_path_list(config.paths or ""), parts_of_tasks(config.tuning(), tasks)
    if not given or len(divided) < 2:
        raise ConfigError(
            "a menu needs paths (--paths FILE[:NAME],...) and at least two --tasks, whose prompts "
            f"it tells apart; there are {len(given)} paths and {len(divided)} tasks"
        )
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        if (folder / MENU_FILE).exists():
            raise ConfigError(f"{folder} holds a menu; choose another --output-dir, or delete it")
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        stack.enter_context(only_writer(folder, "menu", "--output-dir"))
        L = routed.num_layers
        full = StaticPath(range(L))
        loaded = {name: load_path(routed, file) for name, file in given.items()}
        if loaded.get(FULL, full) != full:
            raise PathError(f"a path is called {FULL!r}, but isn't the full one; rename its file")
        on_menu = {FULL: full} | {name: path for name, path in loaded.items() if path != full}
        rows, reads_at = menu_rows(on_menu, L, config.reads_at)
        steps = {name: steps_to_write(path) for name, path in on_menu.items()}
        made_from = {
            "settings": config.decisive(),
            "model": base.identity,
            "runtime": base.runtime,
            "paths": steps,
            "questions_sha256": digest_of((each.task.name, each.examples) for each in divided),
        }
        chunks = Chunks(folder / CHUNKS_FOLDER, made_from, stage="menu")
        chunks.open()
        worth: list[Tensor] = []  # [K], of [P]
        states: dict[str, list[Tensor]] = {FIT: [], SELECT: []}  # [K], of [Q, D]
        with listener.progress("making a menu", "tasks") as on_progress:

            def tell(_: int, note: str) -> None:
                on_progress(len(states[SELECT]), len(divided), note)

            scorers = [TaskScorer(routed, each, config.tuning(), chunks, tell) for each in divided]
            for task in scorers:
                means = torch.tensor(task.objectives(SELECT, [*on_menu.values()])).mean(dim=1)
                worth.append(means - means[0])
                for part in (FIT, SELECT):
                    prompts = [item.question.context for item in task.judge(part).items]
                    read = recorded(routed, prompts, PromptView.mean, [reads_at], decision=1)
                    states[part].append(read[:, 0])
            tell(0, "")
        names = tuple(task.name for task in scorers)

        def by_path(values: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
            rows = (dict(zip(on_menu, each, strict=True)) for each in values)
            return dict(zip(names, rows, strict=True))

        kinds = _fit(states[FIT])
        costs = torch.tensor([float(sum(row)) for row, _ in rows])
        probabilities = [kinds(each).softmax(dim=1) for each in states[SELECT]]
        price, chosen = _priced(probabilities, torch.stack(worth), costs, L, config)
        counted = [[of.count(at) / len(of) for at in range(len(costs))] for of in chosen]
        tuned = [file.record for file in given.values() if file.record is not None]
        own = [each.task.name for each in divided if each.is_divided]
        record = MenuFile(
            **new_manifest("menu", model=base.identity, config=config.to_dict()),
            tasks=names,
            chosen_on=tuple({task: 0 for each in tuned for task in each.tasks}),
            divided=tuple(dict.fromkeys([*own, *(t for each in tuned for t in each.divided)])),
            objective={task.name: task.objective for task in scorers},
            num_layers=L,
            runtime=base.runtime,
            paths=tuple(
                NamedPath(name=name, steps=steps[name], executions=float(cost))
                for name, cost in zip(on_menu, costs, strict=True)
            ),
            reads_at=reads_at,
            price=price,
            select=by_path([each.tolist() for each in worth]),
            chosen=by_path(counted),
            chooser_sha256=save_kinds(folder, kinds),
        )
        for name in (name for name, path in on_menu.items() if path.adapters):
            for each in (healed.HEALED_FILE, healed.ADAPTER_FILE, healed.ADAPTER_CONFIG_FILE):
                data = given[name].file.with_name(each).read_bytes()
                write_atomically(folder / ADAPTERS_FOLDER / name / each, data)
        card = template(Path(__file__).with_name("menu_card.md.j2")).render(record=record)
        write_atomically(folder / "README.md", card)
        write_json(folder / MENU_FILE, record)
        chunks.remove()
        return read_json(folder / MENU_FILE, MenuFile)


def _fit(states: Sequence[Tensor]) -> torch.nn.Linear:
    """Fit what tells the kinds apart on the states `[Q, D]` of each; all kinds count alike."""
    labels = torch.cat([torch.full((len(each), 1), kind) for kind, each in enumerate(states)])
    weights = torch.cat([torch.full((len(each),), 1 / len(each)) for each in states])
    return fit_logistic(torch.cat([*states]), labels, len(states), weights=weights)


def _priced(
    kinds: Sequence[Tensor], worth: Tensor, costs: Tensor, num_layers: int, config: MenuConfig
) -> tuple[float, list[list[int]]]:
    """Return the lowest price at which few enough layers run, and the paths chosen, `[K][Q]`.

    Given are how probable each kind is for the questions of each task, `[Q, K]`, what paths are
    worth to kinds, `[K, P]`, and their executions, `[P]`.
    """
    wanted, least = config.executions or float("inf"), float(costs.min())
    if wanted < least:
        raise ConfigError(
            f"--executions {wanted:g} is below the {least:g} of the menu's shortest path; give at "
            f"least that, or a shorter path"
        )

    def chosen(price: float) -> list[list[int]]:
        net = worth - price / num_layers * costs
        return [(each @ net).argmax(dim=1).tolist() for each in kinds]

    def is_enough(price: float) -> bool:
        means = [float(costs[places].mean()) for places in chosen(price)]
        return sum(means) / len(means) <= wanted + 1e-6

    price = 0.0
    if not is_enough(price):
        highest = num_layers * float(worth.max() - worth.min()) + 1.0  # the shortest path wins
        _, price = bisect(is_enough, 0.0, highest)
        # Not at the edge of a step, where the last bits of arithmetic would decide.
        price = float(f"{1.001 * price:.6g}")
    return price, chosen(price)
