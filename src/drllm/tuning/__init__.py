"""One static path for a whole task: `tune` finds a path, and `heal` repairs it."""
