"""How Hypothesis runs here: the same examples in each run, and no limit on a slow machine."""

import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("drllm", derandomize=True, deadline=None)
settings.load_profile("drllm")
sys.path.insert(0, str(Path(__file__).parent))  # mutations.py, meaning.py
