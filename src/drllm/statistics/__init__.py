"""Intervals, paired tests, power and verdicts. Doesn't import torch."""
