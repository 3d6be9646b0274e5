"""Score many (prompt, path) pairs at once, with the same results as one at a time."""
