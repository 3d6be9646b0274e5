"""Supervision: choose a target for each question among the paths of a search.

`rules` choose the target of one question, or say why it has none. `select` applies a rule to all
questions, leaves out duplicates and enforces quotas. `summary` counts the results. This package
doesn't import torch.
"""
