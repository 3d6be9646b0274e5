"""The tree search over layer paths, one question at a time or many in step."""
