"""The command line: `drllm VERB …` parses flags, calls a stage, and prints its results.

A mistake of the user ends in one line and exit status 2. An interruption ends in one sentence and
exit status 130. Any other exception is a defect of drllm and keeps its traceback.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import takewhile

from drllm import __version__, processes
from drllm.cli.help import print_help, print_overview
from drllm.cli.parser import parse
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import FOREIGN, HELP, VERBS, find_verb
from drllm.errors import ConfigError, DrllmError
from drllm.extras import need


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    Without arguments, the command is the one in `sys.argv`. The status is 0 or what the verb
    returns, 2 after a mistake of the user, and 130 after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal = Terminal()
    try:
        with terminal.warnings():
            return _run(words, terminal)
    except DrllmError as error:
        if not processes.is_first():
            time.sleep(3)  # if the first process failed too, its launcher ends this process now
            terminal.err.quiet = False
        terminal.fail(str(error))
        return 2
    except KeyboardInterrupt:
        advice = "no file is half-written. Run the same command again."
        if words and words[0] in VERBS and VERBS[words[0]].resumes:
            advice = f"finished work is kept. To resume: drllm {shlex.join(words)}"
        terminal.fail(f"interrupted; {advice}")
        return 130
    except BrokenPipeError:
        # The reader of our output has closed the pipe (`drllm show … | head`). That is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str], terminal: Terminal) -> int:
    """Print help or the version, or run the verb; return the exit status."""
    if not words:
        raise ConfigError(
            "no verb is given; 'drllm --help' lists them, and 'drllm run demo' tries all stages"
        )
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    if words[0] in ("-h", "--help"):
        print_overview(terminal)
    elif words[0] == "--version":
        terminal.say(f"drllm {__version__}")
    elif words[0] in FOREIGN:
        need("eval", "the verb lm-eval")
        from drllm.cli import harness

        processes.divides = True
        harness.run(words[1:])
    elif _help_flags(words):
        everything = "--help-all" in _help_flags(words)
        print_help(find_verb(words[0]), terminal, everything=everything)
    else:
        return _run_verb(words, terminal)
    return 0


def _help_flags(words: list[str]) -> set[str]:
    """Return the help flags that stand before `--`."""
    before = takewhile(lambda word: word != "--", words)
    return {word.replace("_", "-") for word in before} & set(HELP)


def _run_verb(words: list[str], terminal: Terminal) -> int:
    """Parse a command line, run its verb, and return the exit status.

    A launcher may run the same verb in several processes. Only the first process prints.
    """
    command = parse(words)
    verb = VERBS[command.verb]
    processes.divides = verb.shares
    if processes.count_launched() > 1 and verb.resumes and not verb.shares:
        ray = " --executor ray" if verb.name == "search" else ""
        raise ConfigError(
            f"drllm {verb.name} runs in one process, and WORLD_SIZE is "
            f"{processes.count_launched()}; start it alone: drllm {verb.name}{ray} …"
        )
    is_quiet = not processes.is_first()
    terminal.err.quiet = is_quiet
    terminal.out.quiet = is_quiet
    return verb.run(command, terminal) or 0
