"""Prints `drllm --help`, and a verb's `--help` and `--help-all`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drllm.cli.verbs import CONFIG, FOREIGN, SECTIONS, VERBS, Flag, Verb, list_flags

if TYPE_CHECKING:
    from drllm.cli.terminal import Terminal

FLAG_WIDTH = 26  # columns for a flag; the text of a longer flag begins on the next line
FIRST_FLAGS = ("model", "routers", "path", "paths", "tasks", "dataset", "columns", "output_dir")
"""The flags that `--help` shows first, since most commands need them."""
LAST_FLAGS = ("device", "dtype", "executor")
"""The flags that `--help` shows last: on what the work is done."""
OVERVIEW_WIDTH = 17  # columns for the names in the last lines of the overview


def print_overview(terminal: Terminal) -> None:
    """Print the help of the whole program."""
    texts = {name: verb.help for name, verb in VERBS.items()}
    texts.update(FOREIGN)
    width = max(map(len, texts)) + 3
    terminal.say("usage: drllm VERB [flags]\n")
    terminal.say(
        "Run a pretrained language model with fewer layers: a smaller checkpoint for a task, or "
        "routers that choose layers for each prompt.\n"
    )
    for title, names in SECTIONS.items():
        terminal.say(f"{title}:")
        for name in names:
            terminal.beside(f"  {name}", texts[name], width)
        terminal.say()
    more_help = "explains a verb; drllm --version prints the version"
    terminal.beside("drllm VERB --help", more_help, OVERVIEW_WIDTH)
    terminal.beside("first try:", VERBS["run"].example, OVERVIEW_WIDTH)


def print_help(verb: Verb, terminal: Terminal, *, everything: bool = False) -> None:
    """Print what a verb does and its basic flags; with `everything`, print all of its flags."""
    flags = list(list_flags(verb))
    if not everything:
        flags.sort(key=_rank)
    usage = ["drllm", verb.name, "[flags]"]
    usage += [_format_positional(flag) for flag in flags if flag.positional]
    terminal.say(f"usage: {' '.join(usage)}\n")
    terminal.say(f"{verb.help[0].upper()}{verb.help[1:]}.\nfor example: {verb.example}\n")
    flags_to_print = [flag for flag in flags if everything or _is_basic(flag, verb)]
    last_group = None
    for flag in flags_to_print:
        is_new_group = flag.group is not None and flag.group is not last_group
        if everything and is_new_group:
            last_group = flag.group
            terminal.say(f"\n{format_title(flag.group)}:")
        usage_text = f"  {format_flag(flag, everything)}"
        terminal.beside(usage_text, describe_flag(flag, verb), FLAG_WIDTH)
    terminal.say()
    if verb.settings:
        terminal.beside(f"  {format_flag(CONFIG, everything)}", CONFIG.help, FLAG_WIDTH)
    num_hidden = len(flags) - len(flags_to_print)
    if num_hidden:
        terminal.beside("  --help-all", f"{num_hidden} more flags and settings", FLAG_WIDTH)


def _rank(flag: Flag) -> int:
    """Return the place of a flag in `--help`; positional arguments come first."""
    if flag.positional:
        return 0
    if flag.name in FIRST_FLAGS:
        return 1 + FIRST_FLAGS.index(flag.name)
    if flag.name in LAST_FLAGS:
        return 100 + LAST_FLAGS.index(flag.name)
    return 99


def _is_basic(flag: Flag, verb: Verb) -> bool:
    """Tell whether `--help` shows a flag of a verb."""
    return flag.basic and flag.group not in verb.further_settings


def _format_positional(flag: Flag) -> str:
    """Return a positional argument for the usage line, in brackets if it may be left out."""
    return flag.names[0] if flag.required else f"[{flag.names[0]}]"


def format_title(group: object) -> str:
    """Return the first line of the docstring of a group of settings, as a title."""
    summary = (group.__doc__ or "").partition("\n")[0].rstrip(".")
    return summary[0].lower() + summary[1:]


def format_flag(flag: Flag, everything: bool) -> str:
    """Return a flag and its placeholder as a user writes them; with `everything`, the alias too."""
    names = flag.names if everything else flag.names[:1]
    if flag.kind is bool and flag.default is not False:  # `--no-x` has an effect
        names = [name.replace("--", "--[no-]", 1) for name in names]
    text = ", ".join(names)
    if not flag.positional and not flag.is_on_or_off:
        text += f" {flag.placeholder}"
    if flag.many:
        text += " ..."
    return text


def describe_flag(flag: Flag, verb: Verb) -> str:
    """Return the help of a flag and its default."""
    if flag.name == "model" and verb.model_from:
        return f"{flag.help}; default: {verb.model_from}"
    if flag.default is None or flag.default is False:
        return flag.help
    default = str(flag.default)
    if flag.default is True:
        default = "on"
    elif isinstance(flag.default, float):
        default = f"{flag.default:g}"
    if flag.help.endswith(")"):  # extend the last parenthesis, such as "(paper: 25)"
        return f"{flag.help[:-1]}; default: {default})"
    return f"{flag.help} (default: {default})"
