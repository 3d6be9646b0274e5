"""Routing: a frozen model whose layers are skipped, executed or repeated, as a policy decides."""
