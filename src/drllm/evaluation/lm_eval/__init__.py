"""Run routed models in lm-evaluation-harness, and the harness' tasks in drllm's evaluations.

No other package of drllm imports `lm_eval`.
"""
