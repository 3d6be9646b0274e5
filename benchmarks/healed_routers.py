"""Does routing per question pay once a skipped layer no longer hurts? Routers with an adapter.

One adapter is trained for all routes that trained routers of several seeds take on the questions
that a task leaves to fit on, each route being drawn as often as it is taken. Then the questions to
test are asked of each seed's routers with the adapter and without; of the same routes with the
adapter, each taken on another question (permuted); and of static paths, healed or not, of which two
are mixed so that they run as many layers (each question draws one of the two, unread). Accuracy,
the right option's log-probability, and the next-token loss of questions with their right answers;
each seed by itself, and the mean of the seeds by question.

    python benchmarks/healed_routers.py --routers DIR ... --output-dir DIR [--paths FILE[:NAME],...]
        [--task TASK] [--executions X] [--steps N] [--questions N] [--texts N] [--quick]
        [--json FILE] [--data-dir DIR] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common.asked import (
    CALIBRATED_ON,
    Asked,
    Plans,
    depth_bias_of,
    executions_of,
    mean_executions,
    tokens_of,
)
from common.compare import SEED, compared, in_words, mean_change

from drllm.config import TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.listener import Listener
from drllm.models.healed import load_path
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routers.depth_control import route_prompts
from drllm.models.routing.policies import RouterPolicy
from drllm.models.routing.routed_model import RoutedModel, detach
from drllm.paths import StaticPath, to_path
from drllm.records.static_paths import FIT, SELECT, TEST, read_path, read_path_list
from drllm.tasks.examples import choose
from drllm.tuning.heal import heal
from drllm.tuning.parts import GOLD, parts_of_tasks, prompt_of

QUICK = {"questions": 12, "texts": 4, "steps": 2}
WHOLE = {"questions": 1000, "texts": 100, "steps": 250}


def with_adapter(route: Sequence[int], adapter: str) -> StaticPath:
    """Return what `RouterPolicy(adapter=...)` runs for a route."""
    path = StaticPath(to_path(route))
    return path.with_adapter(adapter, path.departure + 1)


def mixed(paths: Plans, executions: float, num: int) -> list[StaticPath]:
    """Return a path a question, of the two that lie around a mean number of executions."""
    costs = {path: executions_of(path) for path in paths}
    by_cost = sorted(paths, key=costs.__getitem__)
    above = next((path for path in by_cost if costs[path] >= executions), by_cost[-1])
    below = next((path for path in by_cost[::-1] if costs[path] <= executions), by_cost[0])
    width = costs[above] - costs[below]
    num_above = num if not width else round(num * (executions - costs[below]) / width)
    plans = [above] * num_above + [below] * (num - num_above)
    random.Random(SEED).shuffle(plans)
    return plans


def in_one_line(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the changes of all quantities in words."""
    return "; ".join(f"{what} {in_words(what, row)}" for what, row in found.items())


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--routers", nargs="+", required=True, help="folders, one a seed")
    parser.add_argument("--paths", default="", help="static paths to mix, healed or not")
    parser.add_argument("--task", default="builtin_facts", help="with options")
    parser.add_argument("--executions", type=float, help="mean executions; as trained unless given")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the adapter")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    for name in WHOLE:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    options.clock = "none"
    sizes = common.sizes_of(options, QUICK, WHOLE)
    tuned = TuneConfig(data_dir=options.data_dir, num_fit=LARGEST_INT)
    [parts] = parts_of_tasks(tuned, options.task)
    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    stacks = {Path(folder): load_routers(Path(folder)) for folder in options.routers}
    full = StaticPath(range(base.num_layers))

    def prompts(part: str, num: int) -> list[Any]:
        chosen = choose(parts.examples[part], num, SEED)
        return [prompt_of(parts.task, example, GOLD) for example in chosen]

    def tokens(part: str, num: int) -> list[list[int]]:
        return tokens_of(routed, prompts(part, num))

    knobs: dict[Path, float] = {}
    routes: list[StaticPath] = []
    for folder, stack in stacks.items():
        stack.to(base.model.device)
        calibrated_on = tokens(SELECT, CALIBRATED_ON)
        knobs[folder] = depth_bias_of(routed, stack, calibrated_on, options.executions)
        policy = RouterPolicy(stack, depth_bias=knobs[folder])
        taken = route_prompts(routed, policy, tokens(FIT, LARGEST_INT)).tolist()
        routes += [StaticPath(to_path(route)) for route in taken]
    detach(base.model)
    data = {"data_dir": options.data_dir, "steps": sizes["steps"]}
    heal(base, routes, options.task, output_dir=options.output_dir, listener=Listener(), **data)

    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    [adapter] = load_path(routed, read_path(str(options.output_dir))).adapters
    asked = Asked(routed, prompts(TEST, sizes["questions"]), sizes["texts"])
    num = len(asked.prompts)
    fixed = {name: load_path(routed, file) for name, file in read_path_list(options.paths).items()}
    systems: dict[str, Plans] = {"full": [full] * num}
    systems |= {name: [path] * num for name, path in fixed.items()}
    for seed, (folder, stack) in enumerate(stacks.items()):
        ways = {}
        for name in ("", adapter):
            policy = RouterPolicy(stack, depth_bias=knobs[folder], adapter=name)
            ways[name] = route_prompts(routed, policy, asked.prompts)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(SEED))
        systems[f"routers {seed}"] = [with_adapter(r, "") for r in ways[""].tolist()]
        healed = [with_adapter(route, adapter) for route in ways[adapter].tolist()]
        systems[f"healed routers {seed}"] = healed
        systems[f"permuted {seed}"] = [healed[place] for place in order.tolist()]
        if fixed:
            executions = mean_executions(healed)
            systems[f"mixed {seed}"] = mixed([full, *fixed.values()], executions, num)
    values = {name: asked.along(plans) for name, plans in systems.items()}
    costs = {name: mean_executions(plans) for name, plans in systems.items()}
    figures: dict[str, Any] = {"of": common.of(base, options), "questions": num}
    figures["executions"], figures["less"] = costs, {}
    pairs = [(name, "full") for name in systems if name != "full"]
    for seed in range(len(stacks)):
        rivals = [f"routers {seed}", f"permuted {seed}", *[f"mixed {seed}"] * bool(fixed)]
        pairs += [(f"healed routers {seed}", rival) for rival in rivals]
    for name, other in pairs:
        ours, theirs = values[name], values[other]
        found = {what: compared(what, ours[what], theirs[what]) for what in ours}
        figures["less"][f"{name} less {other}"] = found
        print(f"{name} ({costs[name]:.2f}) minus {other}: {in_one_line(found)}", flush=True)
    figures["mean of seeds"] = {}
    for rival in ["full", "routers", "permuted", *["mixed"] * bool(fixed), *fixed]:
        theirs = [rival if rival in values else f"{rival} {seed}" for seed in range(len(stacks))]
        found = {
            what: mean_change(
                [values[f"healed routers {seed}"][what] for seed in range(len(stacks))],
                [values[name][what] for name in theirs],
            )
            for what in values["full"]
        }
        figures["mean of seeds"][rival] = found
        print(f"healed routers minus {rival}, mean of seeds: {in_one_line(found)}", flush=True)
    common.write(options, figures)


if __name__ == "__main__":
    main()
