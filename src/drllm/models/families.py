"""The table of model families that drllm knows, from `families.yaml`. Imports no torch."""

from pathlib import Path
from typing import Any

import yaml

_TABLE = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text(encoding="utf-8"))
COMMON: dict[str, Any] = _TABLE["common"]  # settings that the tiny models of all families share
FAMILIES: dict[str, dict[str, Any]] = _TABLE["families"]
"""`model_type` of transformers → further settings of the family's tiny model."""
IN_SUITE: list[str] = _TABLE["in_suite"]
"""Families on which the tests try the export and every way of generating."""
REFUSED: dict[str, list[str]] = _TABLE["refused"]
"""Reason → families that can't be routed, or whose rows must all have the same decisions."""
NO_SUBLAYERS: dict[str, list[str]] = _TABLE["no_sublayers"]
"""Reason → families whose layers don't have a separate attention and MLP."""
