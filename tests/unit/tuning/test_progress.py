from drllm.tuning.run import AXIS, AXIS_WIDTH, drawn


def test_an_interval_is_drawn_to_scale_and_cut_off_where_the_axis_ends():
    assert len(AXIS) == AXIS_WIDTH
    assert drawn(-0.4, -0.4, 0.2) == "●" + "─" * 19 + "│" + "─" * 9 + "┤"
    assert drawn(0.0, 0.0, 0.0) == " " * 20 + "●"
    assert drawn(-0.9, -5.0, -0.3) == "<────┤" + " " * 14 + "│"
    assert drawn(-5.0, -6.0, -4.0) == "<" + " " * 19 + "│"
    assert drawn(0.3, 0.1, 9.0) == " " * 20 + "│" + " " * 4 + "├────>"
