"""One static path for a whole task: search, choice, test."""
