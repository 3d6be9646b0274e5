"""What `--help` prints: the verbs, or the flags of one; on a terminal its lines break at words."""

from drllm.cli.parser import CONFIG, FOREIGN, VERBS, Flag, Verb, flags_of
from drllm.cli.terminal import Terminal

IN_ORDER = {
    "all stages in a row": "run sweep",
    "the stages, each of which reads what one before it wrote": "search supervise train tune "
    "heal menu generate evaluate lm-eval report export",
    "what there is": "show ls",
}
"""Titles and verbs as `drllm --help` has them: in the order in which data goes through them."""
WIDEST = 26  # columns for a flag; the text of a longer one begins on the next line


def say_overview(terminal: Terminal) -> None:
    """Print the text of `drllm --help`."""
    texts = {name: verb.help for name, verb in VERBS.items()} | FOREIGN
    terminal.say("usage: drllm VERB [flags]\n")
    terminal.say(
        "Layer routing for frozen Hugging Face language models: skip, execute or repeat each "
        "layer, once per prompt.\n"
    )
    for title, names in IN_ORDER.items():
        terminal.say(f"{title}:")
        for name in names.split():
            terminal.beside(f"  {name}", texts[name], max(map(len, texts)) + 3)
        terminal.say()
    terminal.beside("drllm VERB --help", "says more of one; drllm --version says the version", 17)
    terminal.beside("first try:", VERBS["run"].example, 17)


def say_help(verb: Verb, terminal: Terminal, *, everything: bool = False) -> None:
    """Print what a verb does and its basic flags; all of them with `everything`."""
    flags = list(flags_of(verb))
    positional = [f"[{flag.names[0]}]" for flag in flags if flag.positional]
    terminal.say(f"usage: {' '.join(['drllm', verb.name, '[flags]', *positional])}\n")
    terminal.say(f"{verb.help[0].upper()}{verb.help[1:]}.\nfor example: {verb.example}\n")
    chosen = [flag for flag in flags if everything or flag.basic]
    group = None
    for flag in chosen:
        if everything and flag.group is not group and (group := flag.group):
            text = (group.__doc__ or "").partition("\n")[0].rstrip(".")
            terminal.say(f"\n{text[0].lower()}{text[1:]}:")
        terminal.beside(f"  {_name(flag, everything)}", _text(flag, verb), WIDEST)
    terminal.say()
    if verb.settings:
        terminal.beside(f"  {_name(CONFIG, everything)}", CONFIG.help, WIDEST)
    if more := len(flags) - len(chosen):
        terminal.beside("  --help-all", f"{more} more flags and settings too", WIDEST)


def _name(flag: Flag, everything: bool) -> str:
    if flag.in_files:
        return f"{flag.name}: {flag.value}"
    names = flag.names if everything else flag.names[:1]
    many = " ..." * flag.many
    if flag.kind is bool and flag.default is not False:
        names = [name.replace("--", "--[no-]", 1) for name in names]
    has_value = not (flag.positional or flag.switch or flag.kind is bool)
    return ", ".join(names) + f" {flag.value}" * has_value + many


def _text(flag: Flag, verb: Verb) -> str:
    if flag.in_files:
        return f"{flag.help} (in the file of --config)"
    if flag.name == "model" and verb.model_from:
        return f"{flag.help}; without it the one that {verb.model_from}"
    if flag.default is None or flag.default is False:
        return flag.help
    shown = f"{flag.default:g}" if isinstance(flag.default, float) else str(flag.default)
    said = f"{flag.help} (" if not flag.help.endswith(")") else f"{flag.help[:-1]}; "
    return f"{said}default: {'on' if flag.default is True else shown})"
