"""The ranges of numbers in files: msgspec refuses a file with a number outside of its range."""

from typing import Annotated, TypeAlias

import msgspec

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
"""A number of things."""
Amount: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
"""A number that can't be negative, such as seconds."""
Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
"""A share of a whole, such as an accuracy or a probability."""
