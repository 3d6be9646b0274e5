"""The report's sections in their order, the verdict first; those on training and provenance.

Axes: L layers.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from drllm import agreement
from drllm.agreement import ROUTERS, TRAIN, VALIDATION, compute_metrics
from drllm.config import EvaluateConfig
from drllm.config.fields import flag_of
from drllm.paths import Decision, num_executions
from drllm.records.results import EVALUATION_SCHEMA
from drllm.reporting import blocks, evaluated, figures, tuned
from drllm.reporting.next_steps import next_steps
from drllm.reporting.numbers import count, plain
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts, edit_effects, summarise

MIN_QUESTIONS = 5  # single edits that were tried on fewer questions aren't named as best or worst
ROUTING = "Routers choose, once per question, which layers of the model to skip, execute or repeat."
PATHS = "A static path runs the same layers for every question."
HEALED = "A healed one has an adapter, trained to make up for the layers that it leaves out."
BASE_IS = "Base is the same model with every layer executed once."
RUNTIME = ("dtype", "device", "attn_implementation")
"""How a base model ran, by the names of settings of `ModelConfig`."""


def document(runs: Sequence[Run]) -> blocks.Document:
    """Lay out the report of one run, or of several with a comparison in front."""
    if len(runs) == 1:
        [run] = runs
        return blocks.Document(_title(run), _about(run), _first(run), _sections(run))
    named = [(f"{number}: {run.name}", run) for number, run in enumerate(runs, start=1)]
    compared = evaluated.side_by_side(
        "run",
        [(name, each) for name, run in named for each in run.evaluations],
        "Base, routed model and paths of every run, at all depths. Intervals of different runs say "
        "nothing about a difference between them where the questions differ.",
    )
    sections = [compared]
    for name, run in named:
        said = [f"{_title(run)}. {_about(run)}", *_first(run)]
        sections += [blocks.Section(f"Run {name}", said), *blocks.lowered(_sections(run))]
    return blocks.Document(f"Layer routing: {len(runs)} runs", "", [], sections)


def _title(run: Run) -> str:
    name = str(run.model.get("id") or "a base model that no file names")
    tasks = [each.task for each in run.evaluations]
    tasks = tasks or list(dict.fromkeys(record.task for record in run.search))
    tasks = tasks or list(run.paths.tasks if run.paths else ())
    tasks = tasks or list(run.healed.held_out if run.healed else ())
    paths = "Static paths" if run.paths or run.evaluations else "Healed path"
    what = "Layer routing" if _is_routed(run) else paths
    return f"{what} of {name}" + (f" on {', '.join(tasks)}" if tasks else "")


def _is_routed(run: Run) -> bool:
    routed = any(each.routed for each in run.evaluations)
    return routed if run.evaluations else run.has_training or not (run.paths or run.healed)


def _about(run: Run) -> str:
    dates = [str(each.manifest["created"]) for each in run.sources if "created" in each.manifest]
    said = [max(dates)[:10]] if dates else []
    said += [f"{run.num_layers} layers"] if run.num_layers else []
    for each in run.evaluations:
        shots = f", {count(each.num_fewshot)} worked examples" if each.num_fewshot else ""
        kind = "options scored" if each.kind == "choices" else "answers generated"
        asked = f"{count(each.num_questions)} questions of the {each.split} split, {kind}{shots}"
        said.append(f"{each.task}: {asked}" if len(run.evaluations) > 1 else asked)
    return " · ".join([*said, f"folder {run.name}"])


def _first(run: Run) -> list[blocks.Block]:
    """Return the verdict, one line a task, what a reader must know, and the tiles."""
    several = len(run.evaluations) > 1
    lines = [(e.task if several else "", line) for e in run.evaluations for line in e.verdict]
    is_routed = _is_routed(run)
    has_paths = not is_routed or any(each.paths for each in run.evaluations)
    otherwise = [run.paths.choice.verdict()] if run.paths and run.paths.choice else []
    otherwise += [tuned.healing(run.healed)] if run.healed else []
    otherwise = otherwise or ["Nothing was evaluated yet."]
    first: list[blocks.Block] = [
        " ".join(
            [ROUTING] * is_routed + [PATHS] * has_paths + [HEALED] * bool(run.healed) + [BASE_IS]
        ),
        blocks.Verdicts(lines or [("", line) for line in otherwise]),
    ]
    first += run.notes
    if several:
        return [*first, blocks.Tiles([evaluated.time_tile(run.latency)])]
    return [*first, *(evaluated.tiles(e, run.latency) for e in run.evaluations)]


def _sections(run: Run) -> list[blocks.Section]:
    sections: list[blocks.Section] = []
    if len(run.evaluations) > 1:
        named = [(each.task, each) for each in run.evaluations]
        caption = "Verdicts on accuracy are corrected for several tasks (Holm)."
        sections.append(evaluated.side_by_side("task", named, caption))
    folded: list[blocks.Section] = []
    for evaluation in run.evaluations:
        shown = evaluated.sections(run, evaluation)
        if len(run.evaluations) == 1:
            sections, folded = shown, evaluated.details(evaluation)
        else:
            own = blocks.lowered([*shown, *evaluated.details(evaluation)])
            sections += [blocks.Section(evaluation.task, []), *own]
    steps = next_steps(run)
    following: list[blocks.Block] = [
        blocks.Listing([text for text, _ in steps], [code for _, code in steps])
    ]
    if run.absent:
        following.append(f"Not in this folder: {'; '.join(run.absent)}.")
    sections.append(blocks.Section("What to do next", following))
    if run.evaluations:
        folded.append(evaluated.costs(run.evaluations, run.latency))
    return [*sections, *folded, *learned(run), _provenance(run)]


def learned(run: Run) -> list[blocks.Section]:
    """Return the sections on paths, search and routers, as far as there are files for them."""
    found = [tuned.section(run.paths, folded=bool(run.evaluations))] if run.paths else []
    if run.healed:
        found.append(tuned.healed_section(run.healed, folded=bool(run.evaluations)))
    if run.search or run.supervision or run.summary:
        found.append(blocks.Section("Search and targets", (), 2, True, "search.j2", _searched(run)))
    if run.epochs:
        found.append(_routers(run))
    return found


def _searched(run: Run) -> dict[str, Any]:
    counts = summarise(run.search, (), {})
    targets = [record.optimal_layer_config for record in run.supervision]
    return {
        "run": run,
        "counts": counts,
        # A supervision file of somebody else's has no summary; the search says all but the rejects.
        "summary": run.summary or counts | {"rejected": {}},
        "edits": {
            "Skipping": edit_effects(run.search, Decision.SKIP, MIN_QUESTIONS),
            "Repeating": edit_effects(run.search, Decision.REPEAT, MIN_QUESTIONS),
        },
        "lengths": sorted(map(num_executions, targets)),
        "labels": [sum(of_one) for of_one in zip(*class_counts(targets), strict=True)],
    }


def _routers(run: Run) -> blocks.Section:
    layers = run.layers
    known = layers.parts[layers.judged] if layers else {}
    scores = {name: compute_metrics(counts) for name, counts in known.items()}
    last = {epoch.split: epoch for epoch in run.epochs}
    told = [
        f"{split}, last epoch: macro-F1 {plain(last[split].macro_f1, 3)}"
        for split in (TRAIN, VALIDATION)
        if split in last
    ]
    baselines = {name: each for name, each in scores.items() if name != ROUTERS}
    curves = blocks.Figure(
        draw=partial(figures.router_metrics, run.epochs, baselines),
        name="router metrics",
        alt=f"Macro-F1, labels hit and loss by epoch. {'; '.join(told)}.",
        caption="By epoch. Where targets are held out, full lines are validation and dotted lines "
        "training; the dashed line is the best of the decisions that ignore the question.",
    )
    values = {
        "run": run,
        "verdict": f"{agreement.judge_routers(layers.parts)} {agreement.compare_by_layer(known)}"
        if layers
        else "",
        "scores": scores,
        "held_out": VALIDATION in last,
    }
    return blocks.Section("Router metrics", [curves], 2, True, "routers.j2", values)


def _provenance(run: Run) -> blocks.Section:
    made = (each.manifest for each in run.sources)
    wanted = (m for m in made if m.get("schema") == EVALUATION_SCHEMA)
    commands = list(dict.fromkeys(map(command, wanted)))
    values = {"run": run, "runtime": _runtime, "commands": commands}
    return blocks.Section("Provenance", folded=True, template="provenance.j2", values=values)


def _runtime(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a file says of how the model ran; a search has it in its plan."""
    runtime = manifest.get("runtime") or (manifest.get("plan") or {}).get("runtime")
    return runtime if isinstance(runtime, dict) else {}


def command(manifest: Mapping[str, Any]) -> str:
    """Write the command that evaluates with a result's settings; those by default are left out."""
    runtime, config = _runtime(manifest), manifest.get("config") or {}
    values: dict[str, Any] = {"model": (manifest.get("model") or {}).get("id") or None}
    values |= {name: runtime.get(name) for name in RUNTIME} | {"routers": manifest.get("routers")}
    for declared in fields(EvaluateConfig):
        value = config.get(declared.name, declared.default)
        if value != declared.default or declared.name == "tasks":
            values[declared.name] = value
    words, in_file = ["drllm", "evaluate"], dict[str, Any]()
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(flag_of(name if value else f"no_{name}"))
        elif isinstance(value, Mapping):  # by task, which YAML files alone can say
            in_file[name] = value
        elif value is not None:
            words += [flag_of(name), str(value)]
    return shlex.join(words) + (f" --config FILE  # with {json.dumps(in_file)}" if in_file else "")
