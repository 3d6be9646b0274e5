"""How Hypothesis runs here: the same examples in each run, and no limit on a slow machine."""

from hypothesis import settings

settings.register_profile("drllm", derandomize=True, deadline=None)
settings.load_profile("drllm")
