"""Supervision: which of the paths that a search tried becomes a question's target.

`rules` pick one question's target or say why there is none, `select` applies them to all questions
and limits how many targets a task has, `summary` counts what became of them. Loads no torch.
"""
