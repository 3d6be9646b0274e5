"""Figures as files: what stands in them follows from what was drawn."""

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drllm.reporting.drawing import Colours, add_legend, draw_png, draw_svg, make_panels


@pytest.mark.parametrize("write", [lambda draw: draw_svg(draw, "name"), draw_png])
@pytest.mark.parametrize("is_square", [False, True])
def test_panels_stand_where_the_last_bits_of_the_layout_do_not_count(write, is_square):
    kept: list[Axes] = []

    def draw(colours: Colours, width: float) -> Figure:
        figure, kept[:] = make_panels(2, 1, width, 3.4, height_ratios=[1.3, 2.1])
        for number, axes in enumerate(kept):
            axes.plot([0, 1.7, 3], [number, 7.3, 1000], label="right", color=colours["ink"])
            axes.set_ylabel("accuracy, %")
            add_legend(axes, columns=2)
            if is_square:
                axes.set_aspect("equal", adjustable="box")
                axes.set_ylim(0, 3)
        return figure

    assert "font-family" not in str(write(draw))  # the page's font
    for axes in kept:
        bounds = axes.get_position(original=True).bounds
        assert bounds == pytest.approx([round(value, 6) for value in bounds], abs=1e-12)
        assert all(0 < value < 1 for value in bounds)
        if is_square and write is draw_png:  # an equal aspect outlives the layout
            box = axes.get_window_extent()
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            assert box.width / (right - left) == pytest.approx(box.height / (top - bottom))
