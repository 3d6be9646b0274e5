"""One static path for a whole task: `tune` finds a path, and `heal` trains an adapter for it."""
