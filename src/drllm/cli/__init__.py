"""The command line. `main` runs one command, `drllm VERB [flags]`, and turns errors into messages.

After a mistake of the user, the command prints one line and ends with exit status 2. So it does if
the system refuses a file, for example in a folder that the user may not read. After an
interruption, it prints one sentence and ends with status 130. If the reader of its output closes
the pipe (`drllm show … | head`), it ends silently with status 141. Any other exception is a defect
of drllm and keeps its traceback.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import takewhile

from drllm import __version__
from drllm.cli.help import print_help, print_overview
from drllm.cli.parser import parse
from drllm.cli.terminal import LOADING_HARNESS, Terminal
from drllm.cli.verbs import FOREIGN, HELP, VERBS, Verb, find_verb
from drllm.config import ExecutorConfig
from drllm.errors import ConfigError, DrllmError
from drllm.extras import need
from drllm.work.launcher import count_processes, is_first_process

SPINNING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
"""The variables by which a user may say how long threads wait awake."""
OUTPUT_CLOSED = 141  # the status by which shells report a program that a closed pipe has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    Args:
        arguments: The words after `drllm`; None for those in `sys.argv`.

    Returns:
        0 or what the verb returns, 2 after a mistake of the user or if the system refuses a file,
        130 after an interruption, 141 if the reader of the output closed the pipe and the verb
        didn't return a status before.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    words = list(arguments)
    # Set before torch is imported. By default libgomp's threads spin at every barrier, and beside
    # another busy process that takes several times as long as the work.
    if not SPINNING & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
    terminal = Terminal()
    status = 0
    try:
        with terminal.warnings():
            status = _run(words, terminal)
        print(end="", flush=True)  # a closed pipe may show itself only now
        return status
    except DrllmError as error:
        _print_mistake(str(error), terminal)
        return 2
    except KeyboardInterrupt:
        advice = "no file is half-written. Run the same command again."
        if words and words[0] in VERBS and VERBS[words[0]].resumes:
            advice = f"finished work is kept. To resume: drllm {shlex.join(words)}"
        terminal.fail(f"interrupted; {advice}")
        return 130
    except BrokenPipeError:
        if not _is_output_closed():
            raise  # another pipe broke, such as that to a process of ours
        # Python would complain at its end, when it flushes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or OUTPUT_CLOSED
    except OSError as error:
        # Any look at a place can fail, even at whether a file exists: nobody may enter its folder,
        # or the name is too long. An error without a file isn't about a place, and is a defect.
        if error.filename is None:
            raise
        _print_mistake(
            f"can't use {error.filename}: {error.strerror}; check the name, and whether you may "
            f"read and write there",
            terminal,
        )
        return 2


def _print_mistake(message: str, terminal: Terminal) -> None:
    """Print the line that ends a command, in one process only."""
    if not is_first_process():
        # If the first process failed too, it prints the error, and the launcher ends this process
        # during the sleep.
        time.sleep(3)
    terminal.fail(message)


def _is_output_closed() -> bool:
    """Tell whether nobody reads standard output any more.

    A line end is written to find out, since the failed write may have left nothing to flush.
    """
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _run(words: list[str], terminal: Terminal) -> int:
    """Print help or the version, or run the verb; return the exit status."""
    if not words:
        print_overview(terminal)
        return 2
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    if words[0] in ("-h", "--help"):
        print_overview(terminal)
    elif words[0] == "--version":
        terminal.say(f"drllm {__version__}")
    elif words[0] in FOREIGN:
        need("eval", "the verb lm-eval")
        with terminal.busy(LOADING_HARNESS):
            from drllm.cli import harness
        harness.run(words[1:], terminal)
    elif _find_help_flags(words):
        everything = "--help-all" in _find_help_flags(words)
        print_help(find_verb(words[0]), terminal, everything=everything)
    else:
        return _run_verb(words, terminal)
    return 0


def _find_help_flags(words: list[str]) -> set[str]:
    """Return the help flags among the words; a word after `--` is no flag."""
    words_before = takewhile(lambda word: word != "--", words)
    return {word.replace("_", "-") for word in words_before} & set(HELP)


def _run_verb(words: list[str], terminal: Terminal) -> int:
    """Parse a command line, run its verb, and return the exit status."""
    command = parse(words)
    verb = VERBS[command.verb]
    _refuse_launcher(verb)
    return verb.run(command, terminal) or 0


def _refuse_launcher(verb: Verb) -> None:
    """Refuse to run the same command in each of the processes that a launcher has started."""
    num_processes = count_processes()
    if num_processes == 1:
        return
    single_command = f"drllm {verb.name}"
    if any(issubclass(group, ExecutorConfig) for group in verb.settings):
        single_command += " --executor ray"
    raise ConfigError(
        f"drllm {verb.name} runs in one process, and WORLD_SIZE is {num_processes}; start it "
        f"without a launcher: {single_command} …"
    )
