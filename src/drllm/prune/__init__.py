"""The static side: leave layers out for good, repair the model, teach it, and write it."""
