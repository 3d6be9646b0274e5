"""Baselines that run as many layers as the routed model. Useful routers must beat them."""
