"""How the drawings of a report are made: colours, style, labels, and what leaves as SVG or PNG.

Drawn by matplotlib without pyplot, so that nothing global is touched. In an `<svg>` element colours
are CSS variables that follow the page's light or dark scheme, and texts are texts in the page's own
font; a PNG has the light scheme's colours. The variables' values are in `templates/style.css`.
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

Colours: TypeAlias = Mapping[str, str]  # name of a colour → what matplotlib draws with
Draw: TypeAlias = Callable[[Colours, float], "Figure"]
"""Makes a figure in the colours given, so many inches wide."""

NARROW, WIDE = 4.2, 9.0
"""Inches of a figure that a phone shows, whose 8-point texts can still be read there, and of a
large one."""
PNG_DPI = 160

NAMES = ("ink", "faint", "grid", "skip", "repeat", "run", "s0", "s1", "s2", "s3", "s4", "s5")
_STYLE = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
LIGHT: Colours = {name: re.findall(rf"--{name}: (#\w{{6}});", _STYLE)[0] for name in NAMES}
"""Name of a colour → as the page's light scheme has it, for pictures that follow nothing."""
VARIABLES: Colours = {name: "#" + 3 * f"{number:02x}" for number, name in enumerate(NAMES, start=1)}
"""Name of a CSS variable → the placeholder that matplotlib draws with."""


def svg(draw: Draw, name: str, width: float = NARROW) -> str:
    """Return a drawing as an `<svg>` element that can stand in a page with others.

    Taken out: the file header, the metadata (foreign addresses), a style that would apply to the
    whole page, the fixed size, names that would be given twice in a page, and fonts. Its name,
    unlike all others of the page, keeps names of shapes apart, and equal between runs.
    """
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context(_style(VARIABLES) | {"svg.hashsalt": name}):
        _laid_out(draw(VARIABLES, width)).savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    foreign = r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->"
    text = re.sub(foreign, "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href=", "href=")
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*', r"<svg \1", text, count=1)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for variable, colour in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", text).strip()


def png(draw: Draw, width: float = NARROW) -> bytes:
    """Return a drawing as the bytes of a PNG file, dark on white."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context(_style(LIGHT) | {"savefig.facecolor": "#ffffff"}):
        figure = _laid_out(draw(LIGHT, width))
        figure.savefig(drawn, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return drawn.getvalue()


def _laid_out(figure: Figure) -> Figure:
    """Place the panels now; left to saving, everything would be drawn twice."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        # The solver's last bits follow addresses in memory, and names in the file follow its bits.
        bounds = axes.get_position(original=True).bounds
        left, bottom, width, height = (round(value, 6) for value in bounds)
        axes.set_position((left, bottom, width, height))
    return figure


def _style(colours: Colours) -> dict[Any, Any]:
    used = {
        "ink": "text.color axes.labelcolor xtick.labelcolor ytick.labelcolor legend.labelcolor",
        "faint": "axes.edgecolor xtick.color ytick.color",
        "grid": "grid.color",
    }
    return {key: colours[name] for name, keys in used.items() for key in keys.split()} | {
        **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        **dict.fromkeys(("font.size", "axes.titlesize"), 8),
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a system may be called anything
    }


def panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches, with its panels row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


def legend(axes: Axes, *, columns: int) -> None:
    """Name what was drawn above the panel's corner."""
    names = axes.get_legend_handles_labels()
    if names[0]:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderpad": 0.2}
        axes.legend(*names, ncols=columns, borderaxespad=0, handlelength=1.4, **place)


def whole_numbers(axes: Axes) -> None:
    """Put whole numbers on the horizontal axis, without lines through them."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))
    axes.grid(visible=False, axis="x")


def apart(places: Sequence[float], least: float) -> list[float]:
    """Push places up and down until neighbours are so far apart, but for a rounding error."""
    order, found = sorted(range(len(places)), key=places.__getitem__), list(places)
    for _ in range(20 * len(places) ** 2):
        for below, above in itertools.pairwise(order):
            push = max(0.0, least - (found[above] - found[below])) / 2
            found[below], found[above] = found[below] - push, found[above] + push
    return found
