"""Tasks: questions, prompts, and the grading of answers. Doesn't import torch."""
