"""Statistics: intervals, paired tests and what they can show. Loads no torch."""
