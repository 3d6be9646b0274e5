"""Supervision: which of the paths that a search tried becomes a question's target.

`rules` pick one question's target or say why it has none, `select` applies them to all questions
and enforces quotas, and `summary` counts the results. Doesn't import torch.
"""
