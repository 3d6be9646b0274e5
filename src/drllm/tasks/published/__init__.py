"""Published question sets, as rows of `sets.yaml`.

The registry of tasks imports all modules in this folder.
"""
