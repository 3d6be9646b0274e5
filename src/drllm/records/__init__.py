"""Typed records and their files: search, supervision, results, manifests; JSON; resume.

`docs/formats.md` describes the same files for readers without Python. Doesn't import torch.
"""
