"""Processes that start at once: forked from a server that has torch and the stages loaded.

A process that imports torch by itself takes seconds to start. The server is started when a test
asks for the first process.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "drllm.cli",
        "drllm.search.run",
        "drllm.training.stage",
        "drllm.prune.shrink",
        "drllm.evaluation.stage",
        "drllm.evaluation.run",
        "drllm.model.load",
    ]
)

SECONDS = 300  # for one process


def run_in_process(function: Callable[..., Any], *arguments: Any) -> None:
    """Run a function in a process of its own, which must end by itself and without an error."""
    process: BaseProcess = PROCESSES.Process(target=function, args=arguments)
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0, f"the process ended with {process.exitcode}"
