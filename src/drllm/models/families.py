"""The families of models that are known here, and which of them are refused. Loads no torch."""

from pathlib import Path
from typing import Any

import yaml

_TABLE = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text(encoding="utf-8"))
COMMON: dict[str, Any] = _TABLE["common"]  # what the configurations of all tiny models say
FAMILIES: dict[str, dict[str, Any]] = _TABLE["families"]
"""Family, by the `model_type` of transformers → what its configuration says besides `COMMON`."""
IN_SUITE: list[str] = _TABLE["in_suite"]
"""Families on which the tests try every way of generating, and export."""
REFUSED: dict[str, list[str]] = _TABLE["refused"]
"""Why → the families that aren't routed, or not with different decisions in one batch."""
NO_SUBLAYERS: dict[str, list[str]] = _TABLE["no_sublayers"]
"""Why → the families in whose layers attention and MLP can't be told apart."""
