"""Score many (prompt, path) pairs at once; the results are the same as for each pair alone."""
