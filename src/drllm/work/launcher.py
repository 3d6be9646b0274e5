"""Which process this is, if torchrun or `accelerate launch` has started several.

Such processes share the questions of `drllm lm-eval`, as lm-evaluation-harness divides them. No
other verb runs in several processes.
"""

import os


def count_processes() -> int:
    """Return the number of processes that a launcher has started; 1 without a launcher.

    A launcher sets RANK too. On some clusters WORLD_SIZE alone is set for every job.
    """
    if "RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first_process() -> bool:
    """Tell whether this is the first process, which writes the results."""
    return count_processes() == 1 or os.environ.get("RANK") == "0"
