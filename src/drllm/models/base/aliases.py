"""The names that drllm itself gives to models."""

from drllm.models.base.gemma3 import Gemma3
from drllm.models.base.packaged import PackagedModel
from drllm.models.base.smollm2 import SmolLM2

SMOLLM2 = SmolLM2()
GEMMA3 = Gemma3()

ALIASES: dict[str, PackagedModel] = {model.alias: model for model in (SMOLLM2, GEMMA3)}
"""The packaged model of every alias."""
