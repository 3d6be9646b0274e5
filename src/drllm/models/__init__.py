"""The frozen base model and everything that rides on it."""
