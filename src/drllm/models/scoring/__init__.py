"""Scoring many (prompt, path) pairs at once, exactly as each alone would be."""
