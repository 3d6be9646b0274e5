"""`paths.json` of `drllm gaps`: what each gap costs, and which layers to leave out."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from drllm.errors import PathError
from drllm.records.manifest import NumLayers
from drllm.records.results import Header, read_result_file
from drllm.statistics.ranges import Count

PATHS_SCHEMA = "drllm.gaps"
PATHS_FILE = "paths.json"


class GapRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cost of leaving out the layers from `first` to before `end`.

    `cheap` is the root of the relative error of the bridged state. `exact` is the KL from the full
    model in nats a token; None if it wasn't measured.
    """

    first: Count
    end: Count
    cheap: float
    exact: float | None = None


class PathRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers to leave out, and what that costs on the check part, in nats a token.

    Attributes:
        skip: The layers, from 0.
        plain: The rise of the next-token loss over the full model's, as they are left out.
        refit: The same after a refit; None if it wasn't made.
    """

    skip: tuple[Count, ...]
    plain: float
    refit: float | None = None


class GapsRecord(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of `drllm gaps`.

    Attributes:
        num_layers: L.
        texts: Name of a task or source → how many of its questions or texts were fitted on.
        num_tokens: How many tokens the costs were measured on.
        full_loss: The full model's next-token loss on the check part.
        gaps: The gaps of up to half of the layers.
        paths: For each number of layers out the best set, the fewest layers out first.
        tried: All sets that were refitted.
    """

    num_layers: NumLayers
    texts: dict[str, Count]
    num_tokens: Count
    full_loss: float
    gaps: tuple[GapRecord, ...]
    paths: tuple[PathRecord, ...]
    tried: tuple[PathRecord, ...] = ()


def read_gaps(file: Path) -> GapsRecord:
    """Read a `paths.json`; raise a RecordError if that fails."""
    return read_result_file(file, GapsRecord, PATHS_SCHEMA)


def parse_layers(text: str) -> list[int]:
    """Return the layers that a text names.

    Args:
        text: Layers and ranges of layers, such as `2-9,14`; or a file of `drllm gaps` and how many
            layers stay, such as `paths.json:15`.

    Raises:
        PathError: The text names no layers, or the file has no path of this number.
        RecordError: The file can't be read.

    Example:
        >>> parse_layers("2-4,14")
        [2, 3, 4, 14]
    """
    place, colon, number = text.rpartition(":")
    if colon and number.isdecimal():
        file = Path(place)
        record = read_gaps(file / PATHS_FILE if file.is_dir() else file)
        kept = {record.num_layers - len(path.skip): path for path in record.paths}
        if int(number) not in kept:
            raise PathError(
                f"{place} has no path of {number} layers; it has paths of "
                f"{', '.join(map(str, kept))} layers"
            )
        return list(kept[int(number)].skip)
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not dash:
            last = first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise PathError(
                f"the layers to leave out are {text!r}; give layers and ranges, such as 2-9,14, or "
                f"a file of 'drllm gaps' and how many layers stay, such as paths.json:15"
            )
        layers += range(int(first), int(last) + 1)
    return layers


def write_layers(layers: Sequence[int]) -> str:
    """Write sorted layers as `parse_layers` reads them; a range has at least three layers.

    Example:
        >>> write_layers([2, 3, 4, 14, 15])
        '2-4,14,15'
    """
    parts: list[str] = []
    start = 0
    for place, layer in enumerate(layers, start=1):
        if place < len(layers) and layers[place] == layer + 1:
            continue
        run = layers[start:place]
        if len(run) > 2:
            parts.append(f"{run[0]}-{run[-1]}")
        else:
            parts += [str(member) for member in run]
        start = place
    return ",".join(parts)
