"""Statistics: intervals, paired tests, power, and what they allow to be said. Loads no torch."""
