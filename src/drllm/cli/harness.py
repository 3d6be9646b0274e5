"""The verb `drllm lm-eval`: lm-evaluation-harness' own command line, with our model and our tasks.

"The harness" is lm-evaluation-harness. Its subcommand `run` gets two more flags, `--data_dir` and
`--split`. The harness itself reads all other words.
"""

import io
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from drllm.cli.terminal import LOADING_HARNESS
from drllm.errors import ConfigError, TaskError, nearest_name
from drllm.evaluation.lm_eval.folders import FolderFiles, make_own_task_folder
from drllm.evaluation.lm_eval.leaves import HarnessTask
from drllm.models.routers.places import CONFIG_FILE
from drllm.records.codec import hash_values
from drllm.records.places import check_folder
from drllm.tasks.registry import is_task_name
from drllm.work.launcher import count_processes, is_first_process
from drllm.work.listener import Listener, logger, quiet

FOLDER = "tasks"  # the folder in `--output_path` with the tasks of the runs


def run(words: Sequence[str], listener: Listener) -> None:
    """Run the harness' command line on the words after `drllm lm-eval`.

    The harness may print a message of its own and exit. Of several processes only the first tells
    the listener what takes time.
    """
    if not is_first_process():
        listener = Listener()
    setup_logging()
    with patch.object(sys, "argv", ["drllm lm-eval", *words]):
        harness = HarnessCLI()
        _add_flags(harness)
        args = harness.parse_args()
        command = getattr(args, "command", None)
        if command == "run":
            _evaluate(harness, args, listener)
        elif command is None:  # the harness prints its help
            harness.execute(args)
        else:
            with _show_task_reading(listener):
                harness.execute(args)


def _add_flags(harness: HarnessCLI) -> None:
    """Add `--data_dir` and `--split` to the subcommand `run`."""
    group = harness._subparsers.choices["run"].add_argument_group(
        "drllm", "With one of these, all --tasks are names of 'drllm ls tasks' or .jsonl files."
    )
    group.add_argument(
        "--data_dir",
        "--data-dir",
        metavar="<path>",
        help="Folder with the files of drllm's tasks (default: from the hub)",
    )
    group.add_argument(
        "--split",
        metavar="<split>",
        help="Questions of drllm's tasks: search, fit, select or test (default: test)",
    )


@dataclass(frozen=True)
class OwnTasks:
    """drllm's tasks of a command, and the files that make them tasks of the harness."""

    tasks: Sequence[HarnessTask]
    files: FolderFiles


def _evaluate(harness: HarnessCLI, args: Namespace, listener: Listener) -> None:
    """Run `lm-eval run`, with drllm's tasks if `--data_dir` or `--split` is given.

    Mistakes that the harness would find late are refused before the harness starts.
    """
    data_dir = args.data_dir
    split = args.split
    # The harness would read every argument as a setting of its own.
    del args.data_dir
    del args.split
    settings = _read_harness_settings(args)

    names = _read_task_names(settings)
    _refuse_routers_with_other_model(settings)
    output = _read_output_folder(settings)
    _adjust_arguments(args, settings)
    own_tasks = None
    if data_dir is not None or split is not None:
        _refuse_include_path(settings)
        with listener.busy("reading the questions"):
            own_tasks = _make_own_tasks(names, settings, data_dir, split or "test")

    with ExitStack() as stack:
        if settings.cache_requests:
            stack.enter_context(_separate_cache(args, own_tasks))
        if own_tasks is not None:
            args.include_path = _write_tasks(own_tasks, output, stack)
            args.tasks = [task.harness_name for task in own_tasks.tasks]
        with listener.busy(LOADING_HARNESS):
            _load_model_class()
        stack.enter_context(_show_task_reading(listener))
        _execute(harness, args, names, settings.include_path)


def _read_harness_settings(args: Namespace) -> EvaluatorConfig:
    """Read the harness' settings; raise ConfigError if the harness refuses them."""
    try:
        # The harness prints the same messages again when it runs.
        with quiet("lm_eval"), redirect_stdout(io.StringIO()):
            return EvaluatorConfig.from_cli(args)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error


def _read_task_names(settings: EvaluatorConfig) -> list[str]:
    """Return the names in `--tasks`; raise ConfigError if there are none."""
    value = settings.tasks or ()  # a text, or a list of texts from a file of settings
    words = [value] if isinstance(value, str) else [str(word) for word in value]
    names = [name.strip() for name in ",".join(words).split(",")]
    names = [name for name in names if name]
    if not names:
        raise ConfigError(
            "no task is named; give --tasks NAME,NAME: 'drllm lm-eval ls tasks' lists the harness' "
            "tasks; 'drllm ls tasks' lists drllm's tasks, which need --split or --data_dir"
        )
    return names


def _refuse_routers_with_other_model(settings: EvaluatorConfig) -> None:
    """Refuse a folder of routers if `--model` isn't drllm."""
    pretrained = str(settings.model_args.get("pretrained", ""))
    if settings.model != "drllm" and (Path(pretrained) / CONFIG_FILE).is_file():
        raise ConfigError(
            f"pretrained={pretrained} is a folder of routers, which --model {settings.model} can't "
            f"load; give --model drllm"
        )


def _refuse_include_path(settings: EvaluatorConfig) -> None:
    """Refuse `--include_path`, a folder of the harness' tasks, if drllm's tasks are evaluated."""
    if settings.include_path is not None:
        raise ConfigError(
            f"--data_dir and --split are for drllm's tasks only, and --include_path "
            f"{settings.include_path} has no effect on them; leave out --include_path"
        )


def _read_output_folder(settings: EvaluatorConfig) -> Path | None:
    """Return the folder of `--output_path`, or None without the flag.

    Raises ConfigError if the folder can't be written.
    """
    if settings.output_path is None:
        return None
    output = Path(settings.output_path)
    if output.suffix == ".json":
        output = output.parent
    if is_first_process():  # only the first process writes
        check_folder(output, "--output_path")  # the harness would fail only at the end
    return output


def _adjust_arguments(args: Namespace, settings: EvaluatorConfig) -> None:
    """Change `--device` and `--gen_kwargs` where the harness wouldn't do what the user means."""
    if settings.model == "drllm" and settings.device == EvaluatorConfig().device:
        # The device is the harness' default, a GPU. On a machine without a GPU our model would
        # refuse it.
        args.device = "auto"
    options = dict(settings.gen_kwargs)
    if "max_new_tokens" in options and "max_gen_toks" not in options:
        # A task with its own max_gen_toks would ignore max_new_tokens.
        options["max_gen_toks"] = options.pop("max_new_tokens")
        args.gen_kwargs = options


def _make_own_tasks(
    names: Sequence[str], settings: EvaluatorConfig, data_dir: str | None, split: str
) -> OwnTasks:
    """Draw the questions of drllm's tasks, and make tasks of the harness with them."""
    tasks, files = make_own_task_folder(
        names,
        split=split,
        limit=settings.limit,
        data_dir=data_dir,
        num_fewshot=settings.num_fewshot,
        num_processes=count_processes(),
    )
    return OwnTasks(tasks, files)


@contextmanager
def _separate_cache(args: Namespace, own_tasks: OwnTasks | None) -> Iterator[None]:
    """Give the harness' cache of requests a folder for each of our keys, in the block.

    The harness' own key of a cached request is too coarse.
    """
    from lm_eval.caching import cache

    folder = Path(cache.PATH) / f"drllm-{_make_cache_key(args, own_tasks)}"
    with patch.object(cache, "PATH", str(folder)):
        yield


def _write_tasks(own_tasks: OwnTasks, output: Path | None, stack: ExitStack) -> str:
    """Write drllm's tasks into a folder, and return the folder.

    In the first process the folder is in `--output_path`. In the other processes, and without
    `--output_path`, it is temporary.
    """
    if is_first_process():
        for task in own_tasks.tasks:
            for note in task.notes:
                logger.warning("%s: %s", task.name, note)
    if output is not None and is_first_process():
        folder = str(output / FOLDER / own_tasks.files.key)
    else:
        folder = stack.enter_context(TemporaryDirectory(prefix="drllm-tasks-"))
    own_tasks.files.write(Path(folder))
    return folder


def _load_model_class() -> None:
    """Import our model, which registers it, and what the harness needs: torch among others."""
    import datasets  # noqa: F401

    import drllm.evaluation.lm_eval.model  # noqa: F401


@contextmanager
def _show_task_reading(listener: Listener) -> Iterator[None]:
    """Tell the listener whenever the harness reads all its task files, in the block.

    That takes the harness seconds, in which it prints nothing.
    """
    with listener.busy(LOADING_HARNESS):
        from lm_eval.tasks.manager import TaskManager
    read_tasks = TaskManager.__init__

    def show_and_read_tasks(manager: TaskManager, *args: Any, **options: Any) -> None:
        with listener.busy("reading the tasks of lm-evaluation-harness"):
            read_tasks(manager, *args, **options)

    with patch.object(TaskManager, "__init__", show_and_read_tasks):
        yield


def _execute(
    harness: HarnessCLI, args: Namespace, names: Sequence[str], include_path: str | None
) -> None:
    """Run the harness, and raise a TaskError for a mistake of the user.

    Args:
        harness: The harness' command line.
        args: Its arguments.
        names: The names of the tasks, as the user wrote them.
        include_path: The user's own folder of the harness' tasks.
    """
    import datasets

    # There is no network, or no data set of this name that the user may read.
    download_errors = (ConnectionError, datasets.exceptions.DatasetNotFoundError)
    try:
        harness.execute(args)
    except ValueError as error:
        match = re.fullmatch(r"Tasks not found: (.*)", str(error))
        if match is None:
            raise
        first_name = match[1].split(", ")[0]
        raise TaskError(_describe_unknown_task(first_name, include_path)) from error
    except download_errors as error:
        raise TaskError(_describe_failed_download(error, names)) from error


def _describe_unknown_task(name: str, include_path: str | None) -> str:
    """Say what to do about a task that the harness doesn't have."""
    if is_task_name(name):
        return (
            f"task {name!r} is a task of drllm and not of the harness; give --split test, or "
            f"--data_dir FOLDER to read its questions from files"
        )
    import lm_eval.tasks

    known_names = lm_eval.tasks.TaskManager(include_path=include_path).all_tasks
    return (
        f"{nearest_name('task', name, known_names)}; 'drllm lm-eval ls tasks' lists all, "
        f"--include_path FOLDER adds your own"
    )


def _describe_failed_download(error: Exception, names: Sequence[str]) -> str:
    """Say what to do about questions that couldn't be fetched; `names` are those of the tasks."""
    cause = " ".join(str(error).split()).rstrip(".")
    remedy = "connect or log in (hf auth login)"
    if any(is_task_name(name) for name in names):
        remedy += ", or give --data_dir FOLDER to read the questions of drllm's tasks from files"
    return f"the questions of a task can't be fetched from the hub ({cause}); {remedy}"


def _make_cache_key(args: Namespace, own_tasks: OwnTasks | None) -> str:
    """Return a key for the requests in the harness' cache.

    The harness tells requests apart by task, number of shots and tokenizer. Our key adds the rows
    and the arguments, since some arguments change requests (`--gen_kwargs`, `--samples`, `--seed`).
    """
    without_effect = ("func", "command", "cache_requests", "output_path")
    arguments = []
    for name, value in sorted(vars(args).items()):
        if name not in without_effect:
            arguments.append((name, value))
    rows = "" if own_tasks is None else own_tasks.files.key
    content = (rows, arguments, version("lm_eval"), version("drllm"))
    return hash_values([content])[:16]
