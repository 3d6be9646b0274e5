"""Run routed models in lm-evaluation-harness, and its tasks in our evaluations.

No other package imports `lm_eval`.
"""
