"""The frozen base model: where it comes from, opening it, and what it is recognised by."""
