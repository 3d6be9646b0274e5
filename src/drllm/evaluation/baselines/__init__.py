"""Baselines with as many executions as the routed model, which useful routers have to beat."""
