"""The published question sets, as rows of two tables: `options` and `answers`.

Every module in this folder is found by the registry of tasks.
"""
