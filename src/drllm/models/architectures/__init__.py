"""Which families of models can be routed: a tiny one of each, and the check of any model."""
