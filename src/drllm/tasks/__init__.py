"""Tasks: questions, prompts, and the grading of answers. This package doesn't import torch."""
