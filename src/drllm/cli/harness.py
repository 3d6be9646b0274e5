"""`drllm lm-eval …`: lm-evaluation-harness' own command line, with our model and our tasks.

The subcommand `run` has two more flags, `--data_dir` and `--split`. The harness itself reads all
other words.
"""

import io
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from drllm import processes
from drllm.errors import ConfigError, TaskError, nearest_name
from drllm.evaluation.lm_eval.folders import FolderFiles, HarnessTask, make_own_task_folder
from drllm.listener import logger, quiet
from drllm.records.codec import hash_values
from drllm.records.places import check_folder
from drllm.tasks.registry import is_task_name

FOLDER = "tasks"  # the folder in `--output_path` with the tasks of the runs


def run(words: Sequence[str]) -> None:
    """Run the command line that follows `drllm lm-eval`.

    The harness may print a message of its own and exit.
    """
    setup_logging()
    with patch.object(sys, "argv", ["drllm lm-eval", *words]):
        harness = HarnessCLI()
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
        args = harness.parse_args()
        if getattr(args, "command", None) == "run":
            _evaluate(harness, args)
        else:
            harness.execute(args)


def _evaluate(harness: HarnessCLI, args: Namespace) -> None:
    """Run `lm-eval run`, with drllm's tasks if `--data_dir` or `--split` is given.

    Mistakes that the harness would find late are refused before the harness starts.
    """
    data_dir = args.data_dir
    split = args.split
    # The harness would read every argument as a setting of its own.
    del args.data_dir
    del args.split
    settings = _read_harness_settings(args)
    names = _task_names(settings)
    _refuse_routers_with_other_model(settings)
    output = _output_folder(settings)
    _adjust_arguments(args, settings)
    tasks: list[HarnessTask] = []
    files: FolderFiles | None = None
    if data_dir is not None or split is not None:
        if settings.include_path is not None:
            raise ConfigError(
                f"--data_dir and --split are for drllm's tasks only, and --include_path "
                f"{settings.include_path} has no effect on them; leave out --include_path"
            )
        tasks, files = make_own_task_folder(
            names,
            split=split or "test",
            limit=settings.limit,
            data_dir=data_dir,
            num_fewshot=settings.num_fewshot,
            num_processes=processes.count(),
        )
    with ExitStack() as stack:
        if settings.cache_requests:
            from lm_eval.caching import cache

            # The harness' own key ignores some arguments and the rows, so each of our keys has a
            # folder.
            place = str(Path(cache.PATH) / f"drllm-{_cache_key(args, files)}")
            stack.enter_context(patch.object(cache, "PATH", place))
        if files is not None:
            folder = _write_tasks(tasks, files, output, stack)
            args.tasks = [task.harness_name for task in tasks]
            args.include_path = folder
        _execute(harness, args, names, settings.include_path)


def _read_harness_settings(args: Namespace) -> EvaluatorConfig:
    """Read the harness' settings; raise ConfigError if the harness refuses them."""
    try:
        # The harness prints the same messages again when it runs.
        with quiet("lm_eval"), redirect_stdout(io.StringIO()):
            return EvaluatorConfig.from_cli(args)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error


def _task_names(settings: EvaluatorConfig) -> list[str]:
    """Return the names in `--tasks`; raise ConfigError if there are none."""
    value = settings.tasks or ()
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
    if settings.model != "drllm" and (Path(pretrained) / "router_config.json").is_file():
        raise ConfigError(
            f"pretrained={pretrained} is a folder of routers, which --model {settings.model} can't "
            f"load; give --model drllm"
        )


def _output_folder(settings: EvaluatorConfig) -> Path | None:
    """Return the folder of `--output_path`; raise ConfigError if it can't be written."""
    if settings.output_path is None:
        return None
    output = Path(settings.output_path)
    if output.suffix == ".json":
        output = output.parent
    check_folder(output, "--output_path")  # the harness would fail only at the end
    return output


def _adjust_arguments(args: Namespace, settings: EvaluatorConfig) -> None:
    """Change two arguments that the harness would understand differently from the user."""
    if settings.model == "drllm" and settings.device == EvaluatorConfig().device:
        # No device was named. The harness' default is a GPU. Our model would refuse it on a machine
        # without one.
        args.device = "auto"
    options = dict(settings.gen_kwargs)
    if "max_new_tokens" in options and "max_gen_toks" not in options:
        # Tasks that set max_gen_toks would ignore max_new_tokens.
        options["max_gen_toks"] = options.pop("max_new_tokens")
        args.gen_kwargs = options


def _write_tasks(
    tasks: Sequence[HarnessTask], files: FolderFiles, output: Path | None, stack: ExitStack
) -> str:
    """Write drllm's tasks into a folder, and return the folder.

    The folder is temporary without `--output_path`, and in all processes but the first.
    """
    if processes.is_first():
        for task in tasks:
            for note in task.notes:
                logger.warning("%s: %s", task.name, note)
    if output is not None and processes.is_first():
        folder = str(output / FOLDER / files.key)
    else:
        folder = stack.enter_context(TemporaryDirectory(prefix="drllm-tasks-"))
    files.write(Path(folder))
    return folder


def _execute(
    harness: HarnessCLI, args: Namespace, names: Sequence[str], include_path: str | None
) -> None:
    """Run the harness, and turn mistakes of the user into errors of one line."""
    import datasets
    import lm_eval.tasks

    import drllm.evaluation.lm_eval.model  # noqa: F401 (registers our model)

    # The errors of a failed download: no network, or no data set that the user may read.
    unreached = (ConnectionError, datasets.exceptions.DatasetNotFoundError)
    try:
        harness.execute(args)
    except ValueError as error:
        missing = re.fullmatch(r"Tasks not found: (.*)", str(error))
        if missing is None:
            raise
        name = missing[1].split(", ")[0]
        if is_task_name(name):
            raise TaskError(
                f"task {name!r} is drllm's and not the harness' own; give --split test, or "
                f"--data_dir FOLDER to have its questions read from files"
            ) from error
        known_names = lm_eval.tasks.TaskManager(include_path=include_path).all_tasks
        raise TaskError(
            f"{nearest_name('task', name, known_names)}; 'drllm lm-eval ls tasks' lists all, "
            f"--include_path FOLDER adds your own"
        ) from error
    except unreached as error:
        cause = " ".join(str(error).split()).rstrip(".")
        remedy = "connect or log in (hf auth login)"
        if any(is_task_name(name) for name in names):
            remedy += ", --data_dir FOLDER has drllm's tasks read from files"
        raise TaskError(
            f"the questions of a task can't be fetched from the hub ({cause}); {remedy}"
        ) from error


def _cache_key(args: Namespace, files: FolderFiles | None) -> str:
    """Return a key for the requests in the harness' cache.

    The harness tells requests apart by task, number of shots and tokenizer. Our key adds the rows
    and the arguments, since some arguments change requests (`--gen_kwargs`, `--samples`, `--seed`).
    Arguments that only say where results go are left out.
    """
    others = ("func", "command", "cache_requests", "output_path")
    arguments = sorted((name, value) for name, value in vars(args).items() if name not in others)
    rows = "" if files is None else files.key
    content = (rows, arguments, version("lm_eval"), version("drllm"))
    return hash_values([content])[:16]
