"""The stages in a row, as Python: `run` carries out a recipe, `sweep` many settings of one."""

from drllm.pipeline.folder import STAGES, StageTime, run
from drllm.pipeline.recipes import Recipe, SweepPlan, read_recipe, read_sweep
from drllm.pipeline.sweeps import sweep

__all__ = [
    "STAGES",
    "Recipe",
    "StageTime",
    "SweepPlan",
    "read_recipe",
    "read_sweep",
    "run",
    "sweep",
]
