"""The routers' inputs on disk, in a folder with a manifest and files for blocks of targets.

`features` computes these inputs, which are called features, and says what they are. A block is a
batch of targets that were pooled together. Its file is either complete or missing, so an
interrupted pass resumes with the blocks that have no file yet.

Axes: N targets, B targets of a block, L layers, W windows, D hidden.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from drllm.errors import RecordError
from drllm.model.identity import ADAPTERS
from drllm.records.codec import (
    delete_file,
    describe_invalid,
    refuse_special_file,
    write_atomically,
    write_json,
)
from drllm.records.identity import BYPASS
from drllm.records.manifest import manifest_path, read_manifest
from drllm.records.places import only_writer
from drllm.work.store import refuse_other_run

FEATURES_FOLDER = "features"
OLD_FILE = "features.safetensors"
"""A file of older versions of drllm, which had one file for all targets."""
FEATURE_VERSION = 1  # must be increased by a change of drllm that gives targets other features
MAX_SHARE_WITHOUT_NOTE = 0.5
"""A pass that needs a larger share of the free disk space says how much it needs."""
NOT_DONE = 0  # value of `filled`: the target isn't pooled yet
NOT_FINITE = -1  # value of `filled`: the target's states aren't finite
MODEL_FIELDS = ("fingerprint", "class", "num_layers", "hidden_size", BYPASS)
"""The fields of the base model in the manifest that must be the same; without a bypass its hash is
missing."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_BLOCK_FILE = re.compile(r"features-\d{6,}\.safetensors")


class Shape(NamedTuple):
    """The shape of the features of all targets."""

    num_targets: int  # N
    num_layers: int  # L
    num_windows: int  # W
    hidden_size: int  # D


class BlockMeans:
    """The means of all targets, `[N, L, W, D]`, in the files of their blocks.

    The files are memory-mapped, so the features may be larger than memory.

    Args:
        blocks: The means of each block, `[B, L, W, D]`.
        block_numbers: `[N]`, the block of each target.
        row_numbers: `[N]`, the row of each target in its block.
    """

    def __init__(
        self, blocks: Sequence[Tensor], block_numbers: Sequence[int], row_numbers: Sequence[int]
    ) -> None:
        self.blocks = blocks
        self.block_numbers = block_numbers
        self.row_numbers = row_numbers

    def __getitem__(self, targets: Tensor) -> Tensor:
        """Copy the means of some targets into memory, `[B, L, W, D]`."""
        means = []
        for target in targets.tolist():
            block = self.blocks[self.block_numbers[target]]
            means.append(block[self.row_numbers[target]])
        return torch.stack(means)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureBlock:
    """The features of a block of targets; the content of one file."""

    targets: Tensor  # [B] int64, numbers of the targets, from 0
    filled: Tensor  # [B] int64, how many windows hold tokens, or `NOT_FINITE`
    means: Tensor  # [B, L, W, D], of any floating dtype


def name_block(targets: Sequence[int]) -> str:
    """Return the name of a block; no other block with missing targets has this name."""
    return f"features-{targets[0]:06d}"


class _Manifest(msgspec.Struct):
    """The fields of the manifest that must be the same for features to be used again."""

    model: dict[str, Any]
    config: dict[str, Any] = {}
    runtime: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    feature_version: int | None = None


class FeatureStore:
    """A folder of features.

    Use `open` first. Then run the missing blocks within `writing`, if there are any; `work.run`
    takes the store as `keep`. The folder is created with its first block, and other files in it are
    never touched.

    Args:
        folder: The folder.
        dtype: How means are stored, `float32` or `bfloat16`.

    Attributes:
        filled: `[N]` int64, how many windows of each target hold tokens, or `NOT_DONE`, or
            `NOT_FINITE`. Set by `open`.
        means: The means of all targets that are done. Set by `open`, and again after `writing`.
        shape: The shape of all features. Set by `open`.
    """

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder = folder
        self.dtype = dtype
        self.manifest_path = manifest_path(folder / "features")

    def open(self, manifest: Mapping[str, Any], shape: Shape) -> None:
        """Read the features that are in the folder already; write nothing.

        Args:
            manifest: What the features are made from.
            shape: The shape of all features.

        Raises:
            ConfigError: The folder holds features that are made from something else.
            RecordError: A file is broken or can't be read, or an older version wrote the features.
        """
        config = {**manifest["config"], "feature_dtype": self.dtype}
        self.manifest = {**manifest, "config": config, "feature_version": FEATURE_VERSION}
        self.shape = shape
        self._read_blocks()

    @property
    def num_missing(self) -> int:
        """The number of targets that have no features in the folder yet."""
        return int((self.filled == NOT_DONE).sum())

    @property
    def num_done(self) -> int:
        """The number of targets whose features are in the folder."""
        return self.shape.num_targets - self.num_missing

    @contextlib.contextmanager
    def writing(self, note: Callable[[str], None]) -> Iterator[None]:
        """Lock the folder for a `with` block in which `put` may be called.

        Args:
            note: Receives lines on the disk space that the missing blocks need, and on the targets
                that are done already.

        Raises:
            RecordError: There is too little space, the folder can't be written, or another training
                writes to it.
        """
        self._check_space(note)
        with self._lock():
            self._read_blocks()  # another training may have written blocks since `open`
            if self.num_done == 0:
                write_json(self.manifest_path, self.manifest)
            yield
        self._read_blocks()  # `means` reads the new blocks too

    def get(self, key: str) -> FeatureBlock | None:
        """Return None: a block that runs has only targets that are missing in the folder."""
        return None

    def put(self, key: str, result: FeatureBlock) -> FeatureBlock:
        """Write the file of a block.

        Args:
            key: The block's name, as `name_block` returns it.
            result: The features of targets that no other block has.

        Returns:
            The block in its file, which doesn't take memory.
        """
        path = self.folder / f"{key}.safetensors"
        tensors = {
            "targets": result.targets,
            "filled": result.filled.to("cpu", torch.int64),
            "means": result.means.to("cpu", DTYPES[self.dtype]).contiguous(),
        }
        try:
            write_atomically(path, to_safetensors(tensors))
        except RecordError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise RecordError(
                f"can't write {path}: {cause.strerror}; fix that and run the same command again; "
                f"it resumes after {self.num_done} of {self.shape.num_targets} targets"
            ) from cause
        block = self._read_block(path)
        self.filled[block.targets] = block.filled
        return block

    def steps_of(self, key: str) -> None:
        """Return None: a block is pooled in one step."""
        return

    def block_files(self) -> list[Path]:
        """Return the files of all blocks."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _BLOCK_FILE.fullmatch(path.name))

    def remove(self) -> None:
        """Delete the features, and the folder if it holds nothing else."""
        if not self.folder.is_dir():
            return
        with self._lock():  # releasing it also deletes the lock file of a killed training
            for path in self.block_files():
                delete_file(path)
            delete_file(self.folder / OLD_FILE)
            delete_file(self.manifest_path)
        with contextlib.suppress(OSError):  # the folder isn't empty
            self.folder.rmdir()

    def remove_stale_lock(self) -> None:
        """Delete the lock file that a training left if it was killed after its last block."""
        if (self.folder / ".training.lock").exists():
            # Taking the lock and releasing it deletes the file; a running training keeps it.
            with contextlib.suppress(RecordError), self._lock():
                pass

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return only_writer(self.folder, "training", "folder for the features")

    def _read_blocks(self) -> None:
        """Read the files of all blocks, and check that they belong to these features."""
        self._refuse_old_file()
        num_targets = self.shape.num_targets
        self.filled = torch.full((num_targets,), NOT_DONE)
        block_numbers = [0] * num_targets
        row_numbers = [0] * num_targets
        blocks: list[Tensor] = []
        files = self.block_files()
        if files:  # without blocks any manifest may be replaced, so it isn't checked
            self._check_manifest()
        for path in files:
            block = self._read_block(path)
            for row, target in enumerate(block.targets.tolist()):
                block_numbers[target] = len(blocks)
                row_numbers[target] = row
            self.filled[block.targets] = block.filled
            blocks.append(block.means)
        self.means = BlockMeans(blocks, block_numbers, row_numbers)

    def _read_block(self, path: Path) -> FeatureBlock:
        refuse_special_file(path, "read")
        try:
            block = FeatureBlock(**load_file(path))
        except OSError as error:
            raise RecordError(f"can't read {path}: {error.strerror or error}") from error
        except (SafetensorError, TypeError) as error:  # TypeError: tensors have other names
            raise _make_broken_error(path) from error
        if not self._is_valid(block):
            raise _make_broken_error(path)
        return block

    def _is_valid(self, block: FeatureBlock) -> bool:
        """Tell whether a block fits these features, and no earlier block has its targets."""
        num_targets, *target_shape = self.shape
        if block.targets.ndim != 1 or block.targets.dtype != torch.int64:
            return False
        size = len(block.targets)
        if list(block.means.shape) != [size, *target_shape]:
            return False
        if block.means.dtype != DTYPES[self.dtype]:
            return False
        if list(block.filled.shape) != [size] or block.filled.dtype != torch.int64:
            return False
        targets = block.targets.tolist()
        if len(set(targets)) < size or not all(0 <= target < num_targets for target in targets):
            return False
        is_in_earlier_block = self.filled[block.targets] != NOT_DONE  # [B]
        if bool(is_in_earlier_block.any()):
            return False
        valid_values = [*range(1, self.shape.num_windows + 1), NOT_FINITE]
        return all(value in valid_values for value in block.filled.tolist())

    def _refuse_old_file(self) -> None:
        path = self.folder / OLD_FILE
        if path.exists() or path.is_symlink():
            raise RecordError(
                f"{path} was written by an older version of drllm; delete {self.folder} to pool "
                f"the features again, or choose another folder"
            )

    def _check_manifest(self) -> None:
        """Refuse features of another run, and a manifest that is missing or broken."""
        values = read_manifest(self.folder / "features", "features")
        remedy = f"delete {self.folder} to pool the features again"
        if values is None:
            raise RecordError(
                f"{self.folder} is broken ({self.manifest_path.name} is missing); {remedy}"
            )
        try:
            stored = msgspec.convert(values, _Manifest)
        except msgspec.ValidationError as error:
            raise RecordError(
                f"{self.manifest_path}: {describe_invalid(error)}; {remedy}"
            ) from error
        refuse_other_run(
            f"the folder of features {self.folder}",
            _make_identity(stored),
            _make_identity(msgspec.convert(self.manifest, _Manifest)),
            "choose another folder, or delete this one to compute the features again",
        )

    def _check_space(self, note: Callable[[str], None]) -> None:
        """Refuse a pass that doesn't fit on the disk; print a note if it is tight or resumed."""
        _, *target_shape = self.shape
        bytes_per_target = math.prod(target_shape) * DTYPES[self.dtype].itemsize
        needed_bytes = self.num_missing * bytes_per_target
        free_bytes = shutil.disk_usage(_find_existing_parent(self.folder)).free
        sentence = (
            f"the routers' inputs need {_format_size(needed_bytes)} in {self.folder}, where "
            f"{_format_size(free_bytes)} are free"
        )
        if needed_bytes > free_bytes:
            remedy = "free some space or choose another folder"
            if self.dtype != "bfloat16":
                remedy = (
                    "free some space, choose another folder, or give --feature-dtype bfloat16, "
                    "which needs half"
                )
            raise RecordError(f"{sentence}; {remedy}")
        if needed_bytes > MAX_SHARE_WITHOUT_NOTE * free_bytes:
            note(sentence)
        if self.num_done > 0:
            note(
                f"{self.num_done} of {self.shape.num_targets} targets are in {self.folder} already"
            )


def _make_identity(manifest: _Manifest) -> dict[str, Any]:
    """Return the values that must be the same for features to be used again."""
    return {
        "config": manifest.config,
        "model": {name: manifest.model.get(name) for name in MODEL_FIELDS},
        "dtype": manifest.runtime.get("dtype"),
        "adapters": manifest.runtime.get(ADAPTERS),
        "targets": manifest.targets,
        "feature_version": manifest.feature_version,
    }


def _make_broken_error(path: Path) -> RecordError:
    return RecordError(f"{path} is broken; delete it to pool its targets again")


def _find_existing_parent(folder: Path) -> Path:
    """Return the folder itself, or the nearest folder above it that exists."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    return parent


def _format_size(num_bytes: int) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{max(num_bytes / 1e6, 0.1):.1f} MB"
