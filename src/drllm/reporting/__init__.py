"""The report of a run, made from its files alone. This package loads no model and no torch."""
