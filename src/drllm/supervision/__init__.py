"""Supervision: which of the paths that a search tried becomes a question's target.

`rules` picks one question's target or says why there is none, `select` applies it and the quotas
to all questions and writes `supervision.jsonl`, `summary` counts what was found and what became of
it. Loads no torch.
"""
