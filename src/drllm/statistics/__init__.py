"""Intervals, paired tests, power and verdicts. Loads no torch."""
