"""Tensors among the results that a stage keeps for a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
from safetensors.torch import load, save
from torch import Tensor


class KeptTensors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tensors as they are kept. Reading a damaged file fails, so that its work is done again.

    Attributes:
        content: The tensors, as a file of safetensors.
        sha256: The hash of the content.
    """

    content: bytes
    sha256: str

    def __post_init__(self) -> None:
        if hashlib.sha256(self.content).hexdigest() != self.sha256:
            raise ValueError("the tensors are damaged")

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor]) -> KeptTensors:
        """Pack tensors by name; they are copied to the CPU."""
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(on_cpu)
        return cls(content=content, sha256=hashlib.sha256(content).hexdigest())

    def unpack(self) -> dict[str, Tensor]:
        """Return the tensors by name, on the CPU."""
        return load(self.content)
