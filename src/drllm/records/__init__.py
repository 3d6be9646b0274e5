"""Typed records and their files: search, supervision, results and manifests.

The package also reads and writes JSON, and keeps the unfinished work of interrupted runs.
`docs/formats.md` describes the same files for readers without Python. This package doesn't import
torch.
"""
