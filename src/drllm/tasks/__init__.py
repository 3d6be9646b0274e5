"""Tasks: questions, prompts, and the grading of answers. Loads no torch."""
