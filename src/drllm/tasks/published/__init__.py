"""The published question sets, as rows of `sets.yaml`.

Every module in this folder is found by the registry of tasks.
"""
