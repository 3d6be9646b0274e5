from drllm.tuning.level_lines import AXIS, AXIS_WIDTH, draw_interval


def test_an_interval_is_drawn_to_scale_and_cut_off_where_the_axis_ends():
    assert len(AXIS) == AXIS_WIDTH
    assert draw_interval(-0.4, -0.4, 0.2) == "●" + "─" * 19 + "│" + "─" * 9 + "┤"
    assert draw_interval(0.0, 0.0, 0.0) == " " * 20 + "●"
    assert draw_interval(-0.9, -5.0, -0.3) == "<────┤" + " " * 14 + "│"
    assert draw_interval(-5.0, -6.0, -4.0) == "<" + " " * 19 + "│"
    assert draw_interval(0.3, 0.1, 9.0) == " " * 20 + "│" + " " * 4 + "├────>"
