"""`drllm ls`: lists tasks, models, baselines and other names, and checks architectures."""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drllm.cli.command_line import CommandLine
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig
from drllm.errors import ConfigError, unknown_name
from drllm.registry import Registry
from drllm.reporting.numbers import NONE

if TYPE_CHECKING:
    from drllm.models.check import CheckResult

_REGISTRIES = {
    "rewards": "drllm.tasks.rewards:REWARDS",
    "strategies": "drllm.search.strategies:STRATEGIES",
    "targets": "drllm.supervision.rules:TARGETS",
    "policies": "drllm.models.routing.policies:POLICIES",
}
"""The registries that `drllm ls` prints in the same way, as `module:attribute`."""


_REFIT_WORDS = {True: "yes", False: "no", None: NONE}
"""What the table of checks says about a refit."""


def _list_tasks(terminal: Terminal) -> None:
    from drllm.tasks.registry import describe_tasks

    rows = []
    for name, rewards, description in describe_tasks():
        rows.append((name, rewards or "only evaluated", description))
    terminal.table("task|rewards (default first)|what it asks", rows)
    terminal.say(
        "Or name a file (.jsonl, .json, .csv, .tsv, .parquet), or OWNER/NAME of the hub "
        "(docs/questions.md)."
    )


def _list_models(terminal: Terminal) -> None:
    from drllm.model.aliases import ALIASES

    for alias, packaged in ALIASES.items():
        terminal.say(f"{alias}  {packaged.describe()}")
    terminal.say("Or any hub id (OWNER/NAME) or local folder of a decoder-only model.")


def _list_baselines(terminal: Terminal) -> None:
    from drllm.evaluation.baselines.base import format_name, list_baselines

    rows = []
    for baseline in list_baselines():
        name = format_name(baseline.name)
        rows.append((name, baseline.description, baseline.fitted_on, baseline.source))
    terminal.table("baseline|what it does|fitted on|source", rows)


def _list_architectures(terminal: Terminal) -> None:
    from drllm.models.families import FAMILIES, REFUSED

    refused_families: set[str] = set()
    for families in REFUSED.values():
        refused_families.update(families)
    exact_families = [family for family in FAMILIES if family not in refused_families]
    terminal.fact("exact", f"{', '.join(exact_families)} ({len(exact_families)} in all)")
    for reason, families in REFUSED.items():
        terminal.fact("refused", f"{', '.join(families)}: {reason}")
    terminal.say("Named as in transformers' model_type; docs/architectures.md has the differences.")
    terminal.say("To check a model: drllm ls architectures --model NAME")
    terminal.say("To check a tiny model of each family: drllm ls architectures --try")


def _try_architectures(terminal: Terminal) -> None:
    """Check a tiny model of every family, and print which ones are routed exactly."""
    from drllm.models.check import check_family
    from drllm.models.families import FAMILIES

    findings = []
    with terminal.progress("check", "families") as progress:
        for family in FAMILIES:
            findings.append(check_family(family))
            progress(len(findings), len(FAMILIES), family)
    _print_check_results(findings, terminal)


def _try_model(terminal: Terminal, model: str) -> None:
    """Check one model, and print whether it is routed exactly."""
    from drllm.model.load import load
    from drllm.models.check import check_model

    with terminal.busy(f"loading {model}"):
        base = load(ModelConfig(model=model, dtype="float32"))
    with terminal.busy(f"checking {model}"):
        finding = check_model(base.model)
    _print_check_results([finding], terminal)


def _print_check_results(findings: Sequence[CheckResult], terminal: Terminal) -> None:
    """Print a table of checks, and the number of checks by status."""
    rows = []
    for finding in findings:
        prefill = _format_difference(finding.prefill)
        decode = _format_difference(finding.decode)
        refit = _REFIT_WORDS[finding.can_be_refitted]
        why = finding.reason or finding.refit_obstacle
        cells = [finding.family, finding.class_name, finding.status, prefill, decode, refit]
        rows.append([*cells, why])
    terminal.table("family|class|status|prefill|decode|refit|why", rows)
    counts = Counter(finding.status for finding in findings)
    terminal.say(", ".join(f"{count} {status}" for status, count in counts.items()))
    terminal.say(
        "prefill, decode: the largest difference between routed and plain logits, in standard "
        "deviations; refit: whether skipped layers can be repaired in closed form."
    )


def _format_difference(difference: float | None) -> str:
    """Write a difference of logits; None means that it wasn't measured."""
    return NONE if difference is None else f"{difference:.0e}"


_LISTS = {
    "tasks": _list_tasks,
    "models": _list_models,
    "architectures": _list_architectures,
    "baselines": _list_baselines,
}
"""The lists with a function of their own."""


@verb(
    "ls",
    example="drllm ls tasks",
    flags=(
        Flag("what", ", ".join([*_LISTS, *_REGISTRIES]), required=True, positional=True),
        Flag(
            "model",
            "check whether this model is routed exactly (ls architectures)",
            placeholder="NAME",
        ),
        Flag("try", "check a tiny model of each family (ls architectures)", switch=True),
    ),
)
def list_names(command: CommandLine, terminal: Terminal) -> None:
    """List names: tasks, models, baselines and more."""
    what = command.values["what"]
    model = command.values["model"]
    tries_families = command.values["try"]
    _check_flags(what, model, tries_families)
    if model is not None:
        _try_model(terminal, model)
    elif tries_families:
        _try_architectures(terminal)
    elif what in _LISTS:
        _LISTS[what](terminal)
    else:
        _list_registry(what, terminal)


def _check_flags(what: str, model: str | None, tries_families: bool) -> None:
    """Refuse an unknown list, and flags that exclude each other or have no effect on the list."""
    names = [*_LISTS, *_REGISTRIES]
    if what not in names:
        raise ConfigError(unknown_name("list", what, names) + "; for example: drllm ls tasks")
    flags = []
    if model is not None:
        flags.append(f"--model {model}")
    if tries_families:
        flags.append("--try")
    if len(flags) > 1:
        raise ConfigError(f"{' and '.join(flags)} are both given; leave one of them out")
    if flags and what != "architectures":
        raise ConfigError(
            f"{flags[0]} has no effect on the list of {what}; leave it out, "
            f"or try: drllm ls architectures {flags[0]}"
        )


def _list_registry(name: str, terminal: Terminal) -> None:
    """Print the names in a registry and their descriptions."""
    registry: Registry[Any] = pkgutil.resolve_name(_REGISTRIES[name])
    terminal.table(f"{registry.kind}|what it is", registry.summaries().items())
    if name == "policies":
        terminal.say("Or a class of your own: docs/python.md, examples/own_policy.py.")
