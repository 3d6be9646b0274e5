"""The report of a run, made from its files alone; loads no model and no torch."""
