"""Baselines at equal executions: what a router must beat to have learned anything."""
