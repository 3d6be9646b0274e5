"""Constants that settings of several stages share."""

SPLITS = ("search", "fit", "select", "test")
"""The parts that a task's questions are divided into."""
