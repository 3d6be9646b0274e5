"""The names that drllm itself gives to models."""

from drllm.model.gemma3 import Gemma3
from drllm.model.packaged import PackagedModel
from drllm.model.smollm2 import SmolLM2

SMOLLM2 = SmolLM2()
GEMMA3 = Gemma3()

ALIASES: dict[str, PackagedModel] = {model.alias: model for model in (SMOLLM2, GEMMA3)}
"""The packaged model of every alias."""
