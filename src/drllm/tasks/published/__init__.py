"""Published question sets, as rows of `sets.yaml`.

The registry of tasks imports every module in this folder.
"""
