"""`drllm lm-eval …`: lm-evaluation-harness' own command line, with our model and our tasks.

`run` also takes `--data_dir` and `--split`; all other words are the harness' to read.
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
from drllm.evaluation.lm_eval.folders import FolderFiles, HarnessTask, own_tasks
from drllm.listener import logger, quiet
from drllm.records.codec import digest_of
from drllm.records.places import check_folder
from drllm.tasks.registry import is_task_name

FOLDER = "tasks"  # below `--output_path`: the task folders of the runs whose results are there


def run(words: Sequence[str]) -> None:
    """Carry out what follows `drllm lm-eval`; after messages of its own the harness exits."""
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
    data_dir, split = args.data_dir, args.split
    del args.data_dir, args.split  # the harness takes what it doesn't know for settings of its own
    try:
        with quiet("lm_eval"), redirect_stdout(io.StringIO()):  # which says it again when it runs
            settings = EvaluatorConfig.from_cli(args)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error
    given = settings.tasks or ()
    words = given.split(",") if isinstance(given, str) else map(str, given)
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    if not names:
        raise ConfigError(
            "no task is named; give --tasks NAME,NAME: 'drllm lm-eval ls tasks' lists the harness' "
            "tasks and 'drllm ls tasks' drllm's, which need --split or --data_dir"
        )
    pretrained = str(settings.model_args.get("pretrained", ""))
    if settings.model != "drllm" and (Path(pretrained) / "router_config.json").is_file():
        raise ConfigError(
            f"pretrained={pretrained} is a folder of routers, which --model {settings.model} can't "
            f"load; give --model drllm"
        )
    output = None
    if settings.output_path is not None:  # the harness would fail at the end only
        output = Path(settings.output_path)
        output = output.parent if output.suffix == ".json" else output
        check_folder(output, "--output_path")
    if settings.model == "drllm" and settings.device == EvaluatorConfig().device:
        # The user named none; unlike the harness, we refuse a device that isn't there.
        args.device = "auto"
    if "max_new_tokens" in settings.gen_kwargs and "max_gen_toks" not in settings.gen_kwargs:
        # Without effect on tasks that set the other one, which the harness prefers.
        args.gen_kwargs = dict(settings.gen_kwargs)
        args.gen_kwargs["max_gen_toks"] = args.gen_kwargs.pop("max_new_tokens")
    tasks: list[HarnessTask] = []
    files: FolderFiles | None = None
    if data_dir is not None or split is not None:
        if settings.include_path is not None:
            raise ConfigError(
                f"--include_path {settings.include_path} has no effect on drllm's tasks, which "
                f"--data_dir and --split are for; leave it out"
            )
        tasks, files = own_tasks(
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

            place = str(Path(cache.PATH) / f"drllm-{_key(args, files)}")
            stack.enter_context(patch.object(cache, "PATH", place))
        if files is not None:
            for task in tasks if processes.is_first() else ():
                for note in task.notes:
                    logger.warning("%s: %s", task.name, note)
            if output is not None and processes.is_first():
                folder = str(output / FOLDER / files.key)
            else:
                folder = stack.enter_context(TemporaryDirectory(prefix="drllm-tasks-"))
            files.write(Path(folder))
            args.tasks, args.include_path = [task.harness_name for task in tasks], folder
        _execute(harness, args, names, settings.include_path)


def _execute(
    harness: HarnessCLI, args: Namespace, names: Sequence[str], include_path: str | None
) -> None:
    """Run the harness; what users get wrong becomes one line."""
    import datasets
    import lm_eval.tasks

    import drllm.evaluation.lm_eval.model  # noqa: F401 (registers our model)

    # How fetching a data set fails: no network, or no such set for this user.
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
        known = lm_eval.tasks.TaskManager(include_path=include_path).all_tasks
        raise TaskError(
            f"{nearest_name('task', name, known)}; 'drllm lm-eval ls tasks' lists all, "
            f"--include_path FOLDER adds your own"
        ) from error
    except unreached as error:
        cause = " ".join(str(error).split())
        ours = ", --data_dir FOLDER has drllm's tasks read from files" * any(
            map(is_task_name, names)
        )
        raise TaskError(
            f"the questions of a task can't be fetched from the hub ({cause.rstrip('.')}); connect "
            f"or log in (hf auth login){ours}"
        ) from error


def _key(args: Namespace, files: FolderFiles | None) -> str:
    """Return what tells requests from others that the harness would take for the same.

    It knows them by task, number of shots and tokenizer. We add the rows, and every word of the
    command line but where results go: some change requests (`--gen_kwargs`, `--samples`, `--seed`).
    """
    others = ("func", "command", "cache_requests", "output_path")
    words = sorted((name, value) for name, value in vars(args).items() if name not in others)
    content = (files.key if files else "", words, version("lm_eval"), version("drllm"))
    return digest_of([content])[:16]
