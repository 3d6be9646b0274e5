"""Runs the work of a stage: blocks, what is kept of them, and who runs them.

A stage makes a list of independent blocks and a function of one block, and calls `run`:

    run.py           `run`, `Block` and `BlockFunction`: start here
    store.py         `ResultStore`: the results on disk, so that a killed run is resumed
    local.py         `LocalExecutor`: runs the blocks in this process
    ray.py           `RayExecutor`: runs them in worker processes of Ray
    listener.py      `Listener`: receives progress and notes
    first_block.py   `FirstBlock`: estimates time and memory from the first block
    launcher.py      which process this is, if torchrun or `accelerate launch` started several
"""
