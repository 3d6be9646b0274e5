"""The evaluation: compares base, routed model, baselines and paths on the same questions."""
