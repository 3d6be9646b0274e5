"""Load the frozen base model, find its layers, encode its prompts, and identify it."""
