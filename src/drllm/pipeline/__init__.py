"""Runs all stages of a recipe, one after the other, in a run folder (`folder.run_recipe`)."""
