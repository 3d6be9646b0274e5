"""`drllm ls`: everything that is chosen by name, and what a model's architecture allows."""

import pkgutil
from collections import Counter
from typing import Any

from drllm.cli.parser import CommandLine
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig
from drllm.errors import ConfigError, unknown_name
from drllm.registry import Registry

_REGISTRIES = {
    "rewards": "drllm.tasks.rewards:REWARDS",
    "strategies": "drllm.search.strategies:STRATEGIES",
    "targets": "drllm.supervision.rules:TARGETS",
    "policies": "drllm.models.routing.policies:POLICIES",
}


def _list_tasks(terminal: Terminal) -> None:
    from drllm.tasks.registry import describe_tasks

    rows = ((name, rewards or "only evaluated", what) for name, rewards, what in describe_tasks())
    terminal.table("task|rewards (default first)|what it asks", rows)
    terminal.say("Or name a .jsonl file, or OWNER/NAME of the hub (docs/formats.md).")


def _list_models(terminal: Terminal) -> None:
    from drllm.models.base import smollm2

    terminal.say(f"{smollm2.ALIAS}  {smollm2.describe()}")
    terminal.say("Or any hub id (OWNER/NAME) or local folder of a decoder-only model.")


def _list_baselines(terminal: Terminal) -> None:
    from drllm.evaluation.baselines.base import dashed, ordered

    rows = ((dashed(b.name), b.description, b.fitted_on, b.source) for b in ordered())
    terminal.table("baseline|what it does|fitted on|source", rows)


def _list_architectures(terminal: Terminal) -> None:
    from drllm.models.families import FAMILIES, REFUSED

    refused = {family for families in REFUSED.values() for family in families}
    exact = [family for family in FAMILIES if family not in refused]
    terminal.fact("exact", f"{', '.join(exact)} ({len(exact)} in all)")
    for reason, families in REFUSED.items():
        terminal.fact("refused", f"{', '.join(families)}: {reason}")
    terminal.say("Named as in transformers' model_type; docs/architectures.md has the differences.")
    terminal.say("Try yours: drllm ls architectures --model NAME; all on tiny models: --try")


def _try_architectures(terminal: Terminal, model: str | None) -> None:
    """Print whether a model, or a tiny one of every family, is routed exactly."""
    from drllm.models.check import check, check_model
    from drllm.models.families import FAMILIES

    findings = []
    if model is None:
        with terminal.progress("check", "families") as progress:
            for family in FAMILIES:
                findings.append(check(family))
                progress(len(findings), len(FAMILIES), family)
    else:
        from drllm.models.base.load import load

        with terminal.busy(f"loading {model}"):
            base = load(ModelConfig(model=model, dtype="float32"))
        with terminal.busy(f"checking {model}"):
            findings.append(check_model(base.model))
    rows = []
    for found in findings:
        off = ("–" if off is None else f"{off:.0e}" for off in (found.prefill, found.decode))
        rows.append([found.family, found.class_name, found.status, *off, found.reason])
    terminal.table("family|class|status|prefill|decode|why", rows)
    counts = Counter(found.status for found in findings)
    terminal.say(", ".join(f"{count} {status}" for status, count in counts.items()))
    terminal.say(
        "Differences: the largest between routed and plain logits, in standard deviations."
    )


_LISTS = {
    "tasks": _list_tasks,
    "models": _list_models,
    "architectures": _list_architectures,
    "baselines": _list_baselines,
}


@verb(
    "ls",
    example="drllm ls tasks",
    flags=(
        Flag("what", ", ".join([*_LISTS, *_REGISTRIES]), required=True, positional=True),
        Flag("model", "try whether this model is routed exactly (ls architectures)", value="NAME"),
        Flag("try", "try it on a tiny model of each family (ls architectures)", switch=True),
    ),
)
def list_names(command: CommandLine, terminal: Terminal) -> None:
    """List what is chosen by name: tasks, models, baselines and more."""
    what, model = command.values["what"], command.values["model"]
    known = [*_LISTS, *_REGISTRIES]
    if what not in known:
        raise ConfigError(unknown_name("list", what, known) + "; for example: drllm ls tasks")
    tried = [f"--model {model}"] * (model is not None) + ["--try"] * command.values["try"]
    if len(tried) > 1:
        raise ConfigError(f"{' and '.join(tried)} are both given; leave one of them out")
    if tried and what != "architectures":
        raise ConfigError(
            f"{tried[0]} has no effect on the list of {what}; leave it out, "
            f"or try: drllm ls architectures {tried[0]}"
        )
    if tried:
        _try_architectures(terminal, model)
    elif what in _LISTS:
        _LISTS[what](terminal)
    else:
        registry: Registry[Any] = pkgutil.resolve_name(_REGISTRIES[what])
        terminal.table(f"{registry.kind}|what it is", registry.summaries().items())
        if what == "policies":
            terminal.say("Or a class of your own: docs/python.md, examples/own_policy.py.")
