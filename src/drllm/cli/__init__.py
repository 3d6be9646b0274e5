"""The command line: `drllm VERB …`.

`verbs` lists the verbs, `parser` turns words into checked settings (`settings_files` YAML,
`published` finds what the published commands don't name), `checks` refuses what can't work,
`stages` does a verb's work (`searching` that of `search`, `generation` that of `generate`,
`exporting` that of `export`, `harness` that of `lm-eval`), `run_folder` carries out all stages of a
`recipe` in a row, `sweeping` does so for many settings of a training, `show` prints records,
`listing` names, `terminal` owns what the user sees. Here the process begins and ends: errors of the
user's become one line and exit status 2, an interruption one sentence and 130, anything else is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from drllm.cli.parser import Request, parse
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import FOREIGN, overview
from drllm.errors import ConfigError, DrllmError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

ACTIONS: dict[str, str] = {
    "search": "drllm.cli.searching:search",
    "supervise": "drllm.cli.stages:supervise",
    "train": "drllm.cli.stages:train",
    "generate": "drllm.cli.generation:generate",
    "evaluate": "drllm.cli.stages:evaluate",
    "export": "drllm.cli.exporting:export",
    "report": "drllm.cli.stages:report",
    "run": "drllm.cli.run_folder:run",
    "sweep": "drllm.cli.sweeping:sweep",
    "ls": "drllm.cli.stages:list_names",
    "show": "drllm.cli.stages:show_place",
    "lm-eval": "drllm.cli.harness:run",
}
"""Verb → `module:function`, resolved on use."""

GO_ON: dict[str, str] = {
    "search": "finished blocks of questions are kept; the same command goes on behind them",
    "train": "what was pooled and finished epochs are kept; the same command goes on behind them",
    "evaluate": "finished blocks of questions are kept; the same command goes on behind them",
    "run": "finished stages, blocks and epochs are kept; the same command goes on behind them",
    "sweep": "what is finished of each setting is kept; the same command goes on behind it",
}
"""What is safe after an interruption, and how to go on."""
NOTHING_TO_KEEP = "no file is half-written; run the same command again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; None takes those of the process.

    Returns:
        The exit status: 0, 2 for what the user can mend, 130 after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal = Terminal()
    try:
        with terminal.warnings():
            return _run(words, terminal)
    except DrllmError as error:
        terminal.fail(str(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        verb = words[0] if words else ""
        terminal.fail(f"interrupted; {GO_ON.get(verb, NOTHING_TO_KEEP)}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has stopped (`drllm show … | head`): no error of anybody's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str], terminal: Terminal) -> int:
    if not words:
        raise ConfigError("no verb is given; 'drllm --help' lists them, first try: drllm ls tasks")
    if words[0] in ("-h", "--help"):
        terminal.say(overview().rstrip("\n"))
        return 0
    if words[0] == "--version":
        terminal.say(f"drllm {importlib.metadata.version('drllm')}")
        return 0
    if words[0] in FOREIGN:
        function = _resolved(ACTIONS[words[0]])
        function(words[1:])
        return 0
    try:
        request = parse(words)
    except SystemExit as left:  # after --help
        return int(left.code or 0)
    _perform(request, terminal)
    return 0


def _perform(request: Request, terminal: Terminal) -> None:
    _resolved(ACTIONS[request.verb])(request, terminal)


def _resolved(action: str) -> Callable[..., None]:
    module, function = action.split(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found
