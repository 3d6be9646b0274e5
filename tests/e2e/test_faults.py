"""A full disk or a folder that can't be written ends a stage in one line, and loses nothing."""

import errno
from random import Random

import pytest

from interrupted_stages import STAGES, assert_done, run_undisturbed
from killable_command import EVENTS, Command, Fault, Operation, start_server

MAX_BYTES = (0, 200, 3000)
"""Bytes that a file may have; the stages' files are smaller and larger."""
FULL_DISK = tuple(event for event in EVENTS if event not in ("os.remove", "os.rmdir"))
"""A full disk lets files be deleted."""
NUM_MOMENTS = 4


def assert_refused_in_one_line(command: Command, fault: Fault) -> None:
    """Run a command that must fail, or do without what failed; check what it says."""
    command.log.write_text("")
    status = command.run_with_fault(fault)
    output = command.log.read_text()
    assert "Traceback" not in output, output
    if status == 0:
        return
    assert status == 2, output
    last_line = output.strip().splitlines()[-1]
    assert last_line.startswith("drllm: "), output
    assert fault.message in last_line


def draw_faults(random: Random, operations: list[Operation]) -> list[Fault]:
    """Return the faults that a stage has to bear, one after the other."""
    faults = [Fault(errno.EFBIG, max_bytes=size) for size in MAX_BYTES]
    for _ in range(NUM_MOMENTS):
        start = random.choice(operations)
        faults.append(Fault(errno.ENOSPC, start, FULL_DISK))
        faults.append(Fault(errno.EACCES, start))
    return faults


@pytest.mark.thorough
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_cannot_write_ends_in_one_line_and_the_next_run_ends_its_work(
    name, make_command, drllm
):
    stage = STAGES[name]
    start_server()
    undisturbed = run_undisturbed(stage, make_command("undisturbed"))
    for number, fault in enumerate(draw_faults(Random(name), list(undisturbed.operations))):
        command = make_command(f"disturbed-{number}")
        assert_refused_in_one_line(command, fault)
        command.run()
        assert_done(stage, command, undisturbed.contents, drllm)
