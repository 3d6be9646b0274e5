"""The style of a report's drawings, helpers to draw them, and their output as SVG and PNG.

matplotlib draws without pyplot, so nothing global changes. In an `<svg>` element, colours are CSS
variables that follow the page's light or dark scheme, and texts have the page's font. A PNG has the
colours of the light scheme. The values of the variables are in `templates/style.css`.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colours: TypeAlias = Mapping[str, str]  # name of a colour → colour for matplotlib
Draw: TypeAlias = Callable[[Colours, float], "Figure"]
"""Draws a figure, given its colours and its width in inches."""

NARROW = 4.2  # inches; 8-point texts can still be read on a phone
WIDE = 9.0  # inches; the width of a large figure
PNG_DPI = 160

# The names of colours, which are CSS variables of the page.
NAMES = ("ink", "faint", "grid", "skip", "repeat", "run", "s0", "s1", "s2", "s3", "s4", "s5")
_STYLE = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
LIGHT: Colours = {name: re.findall(rf"--{name}: (#\w{{6}});", _STYLE)[0] for name in NAMES}
"""Name of a colour → its value in the page's light scheme, for PNGs."""
VARIABLES: Colours = {name: "#" + 3 * f"{number:02x}" for number, name in enumerate(NAMES, start=1)}
"""Name of a CSS variable → the colour that stands for it while matplotlib draws: #010101, …"""
_INK = (
    "text.color",
    "axes.labelcolor",
    "xtick.labelcolor",
    "ytick.labelcolor",
    "legend.labelcolor",
)
_FAINT = ("axes.edgecolor", "xtick.color", "ytick.color")


def draw_svg(draw: Draw, name: str, width: float = NARROW) -> str:
    """Return a drawing as an `<svg>` element for a page with several drawings.

    The name must be unique on the page. The ids of the drawing's shapes depend on the name, so they
    are unique too, and the same in every run.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_style(VARIABLES) | {"svg.hashsalt": name}):
        figure = _lay_out(draw(VARIABLES, width))
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _remove_foreign_parts(file.getvalue())


def _remove_foreign_parts(text: str) -> str:
    """Remove the parts of an SVG of matplotlib that disturb a page; use CSS variables as colours.

    The removed parts are the file header, the metadata with addresses, a style for the whole page,
    the fixed size, duplicate ids, and fonts.
    """
    text = text[text.index("<svg") :]
    foreign = r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->"
    text = re.sub(foreign, "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href=", "href=")
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*', r"<svg \1", text, count=1)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)  # an older matplotlib
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for variable, colour in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", text).strip()


def draw_png(draw: Draw, width: float = NARROW) -> bytes:
    """Return a drawing as the bytes of a PNG file, with dark lines on white."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(_style(LIGHT) | {"savefig.facecolor": "#ffffff"}):
        figure = _lay_out(draw(LIGHT, width))
        figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return file.getvalue()


def _lay_out(figure: Figure) -> Figure:
    """Give the panels their final places, so that saving the figure draws everything only once."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        # Without rounding, two drawings of the same figure would differ: the last bits of the
        # bounds depend on memory addresses, and ids in the file depend on these bits.
        bounds = axes.get_position(original=True).bounds
        left, bottom, width, height = (round(value, 6) for value in bounds)
        axes.set_position((left, bottom, width, height))
    return figure


def _style(colours: Colours) -> dict[Any, Any]:
    """Return matplotlib's settings for these colours."""
    return {
        **dict.fromkeys(_INK, colours["ink"]),
        **dict.fromkeys(_FAINT, colours["faint"]),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        **dict.fromkeys(("font.size", "axes.titlesize"), 8),
        "grid.color": colours["grid"],
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "text.parse_math": False,  # the name of a system may hold a $
    }


def make_panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure with this size in inches; return the figure and its panels row by row.

    The options are passed to `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


def add_legend(axes: Axes, *, columns: int) -> None:
    """Add a legend above the panel's right corner."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderpad": 0.2}
    axes.legend(handles, names, ncols=columns, borderaxespad=0, handlelength=1.4, **place)


def use_whole_numbers(axes: Axes) -> None:
    """Put whole numbers on the horizontal axis, without lines through them."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))
    axes.grid(visible=False, axis="x")


def spread_apart(places: Sequence[float], least: float) -> list[float]:
    """Return the places, moved up and down until neighbours are `least` apart, up to rounding.

    Each step pushes two neighbours that are too close away from each other.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for _ in range(20 * len(places) ** 2):
        for below, above in itertools.pairwise(order):
            distance = moved[above] - moved[below]
            push = max(0.0, least - distance) / 2
            moved[below] -= push
            moved[above] += push
    return moved
