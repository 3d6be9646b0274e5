"""`drllm ls`: everything that is chosen by name, and what a model's architecture allows."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from drllm.cli.terminal import Terminal, new_table
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import ModelConfig
from drllm.errors import ConfigError, unknown_name
from drllm.registry import Registry

if TYPE_CHECKING:
    from drllm.models.check import Finding

_REGISTRIES = {
    "rewards": "drllm.tasks.grading:REWARDS",
    "strategies": "drllm.search.strategies:STRATEGIES",
    "targets": "drllm.supervision.rules:TARGETS",
    "policies": "drllm.models.routing.policies:POLICIES",
}
_WHAT = "tasks, models, architectures, baselines, " + ", ".join(_REGISTRIES)


@verb(
    "ls",
    help="list what is chosen by name: tasks, models, baselines and more",
    example="drllm ls tasks",
    flags=(
        Flag("what", _WHAT, required=True, positional=True),
        Flag("model", "a model whose architecture to check, in place of all known"),
    ),
)
def list_names(request: Request, terminal: Terminal) -> None:
    """Print what there is of one kind."""
    what, model = request.text("what"), request.values["model"]
    lists: dict[str, Callable[[Terminal], None]] = {
        "tasks": _list_tasks,
        "models": _list_models,
        "architectures": _list_architectures,
        "baselines": _list_baselines,
    }
    if what not in lists and what not in _REGISTRIES:
        known = [*lists, *_REGISTRIES]
        raise ConfigError(unknown_name("list", what, known) + "; for example: drllm ls tasks")
    if what == "architectures" and model is not None:
        _check_architecture(terminal, model)
    elif model is not None:
        raise ConfigError(
            f"--model has no effect on the list of {what}; leave it out, "
            f"or try: drllm ls architectures --model {model}"
        )
    elif what in lists:
        lists[what](terminal)
    else:
        module, name = _REGISTRIES[what].split(":")
        registry: Registry[object] = getattr(importlib.import_module(module), name)
        table = new_table(registry.kind, "what it is")
        for name, summary in registry.summaries().items():
            table.add_row(name, summary)
        terminal.show(table)
        if what == "policies":
            terminal.say("Or a class of your own: docs/python.md, examples/own_policy.py.")


def _list_tasks(terminal: Terminal) -> None:
    from drllm.tasks.registry import describe_tasks

    table = new_table("task", "rewards (default first)", "what it asks")
    for name, rewards, what in describe_tasks():
        table.add_row(name, rewards or "only evaluated", what)
    terminal.show(table)
    terminal.say("Or name a .jsonl file of your own; docs/formats.md says what it holds.")


def _list_models(terminal: Terminal) -> None:
    from drllm.models.base import smollm2

    terminal.say(f"{smollm2.ALIAS}  {smollm2.describe()}")
    terminal.say("Or any hub id (OWNER/NAME) or local folder of a decoder-only model.")


def _list_baselines(terminal: Terminal) -> None:
    from drllm.evaluation.baselines.registry import NOT_COMPARED, dashed, ordered

    table = new_table("baseline", "what it does", "fitted on", "source")
    for baseline in ordered():
        table.add_row(
            dashed(baseline.name), baseline.description, baseline.fitted_on, baseline.source
        )
    terminal.show(table)
    for name, reason in NOT_COMPARED.items():
        terminal.say(f"Not compared: {name}, {reason}.")


def _list_architectures(terminal: Terminal) -> None:
    from drllm.models.check import FAMILIES, check

    findings = []
    with terminal.progress("check", "families") as progress:
        for family in FAMILIES:
            findings.append(check(family))
            progress(len(findings), len(FAMILIES), family)
    _show_findings(findings, terminal)
    terminal.say("Each was tried on a tiny model. Yours: drllm ls architectures --model NAME")


def _check_architecture(terminal: Terminal, model: str) -> None:
    from drllm.models.base.load import load
    from drllm.models.check import check_model

    with terminal.busy(f"loading {model}"):
        base = load(ModelConfig(model=model, dtype="float32"))
    with terminal.busy(f"checking {model}"):
        finding = check_model(base.model)
    _show_findings([finding], terminal)


def _show_findings(findings: Sequence[Finding], terminal: Terminal) -> None:
    table = new_table("family", "class", "status", "prefill", "decode", "why")
    for found in findings:
        differences = ["–" if d is None else f"{d:.0e}" for d in (found.prefill, found.decode)]
        table.add_row(found.family, found.class_name, found.status, *differences, found.reason)
    terminal.show(table)
    counts = Counter(found.status for found in findings)
    terminal.say(", ".join(f"{count} {status}" for status, count in counts.items()))
    terminal.say(
        "Differences: greatest between logits, routed and plain, in their standard deviations."
    )
