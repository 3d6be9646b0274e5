"""A command in a process of its own that is killed, or whose operations on files fail.

This module is imported by the processes, so it doesn't import pytest.
"""

import errno
import io
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import drllm.prune.repairs.lora
from drllm.cli import main
from process_server import PROCESSES

MOST_SECONDS = 300.0  # for one process

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""Python's audit events for the operations that change files."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# The random parts of the names of temporary files, as `codec.write_atomically` and `save_routers`
# make them.
_RANDOM = re.compile(r"\.[0-9a-f]{8}-\d+-[0-9a-f]{8}$|\.[0-9a-f]{32}(?=\.)")


class Operation(NamedTuple):
    """An operation of a run on a file of its folder.

    Attributes:
        event: The audit event.
        path: The file, relative to the folder, without the random part of a temporary name.
        number: How often the run has done this with the file, from 1.
    """

    event: str
    path: str
    number: int


@dataclass(frozen=True)
class Fault:
    """Operations on files that fail from one of them on, or files that can't become large.

    Attributes:
        error: The number of the error that they fail with.
        start: The first operation that fails; None if none does.
        events: The audit events that fail.
        max_bytes: How many bytes a file may have; None without a limit.
    """

    error: int = errno.ENOSPC
    start: Operation | None = None
    events: tuple[str, ...] = EVENTS
    max_bytes: int | None = None

    @property
    def message(self) -> str:
        """What the system says of the error."""
        return os.strerror(self.error)


@dataclass
class OperationWatch:
    """An audit hook that lists the operations on the files of a folder, and disturbs them.

    Attributes:
        folder: The folder.
        kill_at: The operation before which the process is killed; None kills it never.
        fault: The operations that fail; None if none does.
        operations: The operations so far.
    """

    folder: Path
    kill_at: Operation | None = None
    fault: Fault | None = None
    operations: list[Operation] = field(default_factory=list)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _is_failing: bool = False

    def __call__(self, event: str, arguments: Any) -> None:
        """Receive an audit event."""
        if event not in EVENTS:
            return
        if event == "open" and not arguments[2] & _WRITING:
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        inside = self._find_inside(path)
        if inside is None or _changes_nothing(event, path):
            return
        self._counts[event, inside] += 1
        operation = Operation(event, inside, self._counts[event, inside])
        if operation == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.operations.append(operation)
        if self.fault is not None:
            self._is_failing |= operation == self.fault.start
            if self._is_failing and event in self.fault.events:
                raise OSError(self.fault.error, self.fault.message, os.fsdecode(path))

    def _find_inside(self, path: Any) -> str | None:
        """Return a path relative to the folder; None if it is elsewhere."""
        if isinstance(path, int):  # a file descriptor
            return None
        name = os.path.relpath(os.fsdecode(path), self.folder)
        if name.startswith(".."):
            return None
        return _RANDOM.sub("", name)


def _changes_nothing(event: str, path: Any) -> bool:
    """Tell whether an operation makes a folder that exists, or deletes a file that doesn't."""
    if event == "os.mkdir":
        return os.path.lexists(path)
    return event == "os.remove" and not os.path.lexists(path)


def _run_command(
    words: list[str], log: Path, watch: OperationWatch, list_file: Path | None
) -> None:
    """Run a command in this process, and end with its status."""
    drllm.prune.repairs.lora.SAVE_SECONDS = 0.0  # so that learning saves its state at every step
    sys.addaudithook(watch)
    if watch.fault is None:
        with log.open("a") as sys.stderr, log.open("a") as sys.stdout:
            status = main(words)
    else:
        status = _run_with_fault(words, log, watch.fault)
    if list_file is not None:
        list_file.write_text(json.dumps(watch.operations))
    sys.exit(status)


def _run_with_fault(words: list[str], log: Path, fault: Fault) -> int:
    """Run a command whose operations on files fail; the log gets a traceback too."""
    output = io.StringIO()
    sys.stderr = sys.stdout = output
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault.max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.max_bytes, hard_limit))
    try:
        return main(words)
    except BaseException:
        traceback.print_exc(file=output)
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard_limit))
        log.write_text(output.getvalue())


@dataclass(frozen=True)
class Command:
    """A command that writes to a folder; each run of it is a process.

    Attributes:
        words: The words of the command line.
        folder: The folder that the command writes to.
        log: The file for what the command prints.
        status_when_done: Its exit status if an earlier run has done all the work.
    """

    words: list[str]
    folder: Path
    log: Path
    status_when_done: int = 0

    def run(self, list_file: Path | None = None) -> None:
        """Run the command to its end.

        Args:
            list_file: Where to list the operations on files; see `read_operations`.
        """
        process = self._start(list_file=list_file)
        _wait(process)
        assert process.exitcode in (0, self.status_when_done), self.log.read_text()

    def run_and_kill(self, moment: float | Operation) -> bool:
        """Run the command, and kill it; return whether it came so far that it was killed.

        Args:
            moment: When to kill: after so many seconds, or before an operation.
        """
        if isinstance(moment, Operation):
            process = self._start(kill_at=moment)
        else:
            process = self._start()
            process.join(moment)
            process.kill()
        _wait(process)
        is_killed: bool = process.exitcode == -signal.SIGKILL
        assert is_killed or process.exitcode in (0, self.status_when_done), self.log.read_text()
        return is_killed

    def run_with_fault(self, fault: Fault) -> int:
        """Run the command while operations on files fail; return its exit status."""
        process = self._start(fault=fault)
        _wait(process)
        status: int = process.exitcode
        return status

    def _start(
        self,
        *,
        kill_at: Operation | None = None,
        fault: Fault | None = None,
        list_file: Path | None = None,
    ) -> Any:
        watch = OperationWatch(self.folder, kill_at, fault)
        arguments = (self.words, self.log, watch, list_file)
        process = PROCESSES.Process(target=_run_command, args=arguments)
        process.start()
        return process


def _wait(process: Any) -> None:
    """Wait until a process ends; kill it if it takes too long."""
    process.join(MOST_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"a command didn't end within {MOST_SECONDS:.0f} s")


def read_operations(list_file: Path) -> list[Operation]:
    """Read the operations that a run has listed."""
    return [Operation(*values) for values in json.loads(list_file.read_text())]


def start_server() -> None:
    """Start the server of processes, so that no command's time includes it."""
    process = PROCESSES.Process(target=_do_nothing)
    process.start()
    process.join(MOST_SECONDS)
    assert process.exitcode == 0


def _do_nothing() -> None: ...
