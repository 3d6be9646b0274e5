"""Runs all stages of a recipe in a row (`folder.run`)."""
