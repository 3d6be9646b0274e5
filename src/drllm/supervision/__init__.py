"""Supervision: which of the paths that a search tried becomes a question's target.

`rules` picks one question's target or says why there is none, `quotas` limits how many targets a
task has, `select` applies both to all questions and writes `supervision.jsonl`, `summary` counts
what was found and what became of it. Loads no torch.
"""
