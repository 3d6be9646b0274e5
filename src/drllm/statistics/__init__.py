"""Statistics of comparisons: intervals, paired tests, power and verdicts. Imports no torch."""
