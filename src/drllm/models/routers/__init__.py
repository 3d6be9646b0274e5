"""Saved routers: their folder, their card, the hub, and the base model that they belong to."""
