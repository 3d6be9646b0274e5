"""The folder that keeps the routers' inputs while and after they are pooled.

`features.safetensors` is filled row by row in place. Which rows are done is written in the file
itself, ahead of them, so that a kill at any moment loses the last seconds and nothing else.

Axes: N targets, B rows, L layers, W windows, D hidden.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from drllm.errors import RecordError
from drllm.records.codec import write_json
from drllm.records.manifest import manifest_path, read_manifest
from drllm.records.places import only_writer
from drllm.records.resume import refuse_other_run

FEATURES_FOLDER = "features"
FEATURES_FILE = "features.safetensors"
FEATURE_VERSION = 1  # raised when the same targets would be pooled to other numbers
COMMIT_S = 2.0  # seconds between two commits, the maximum of its work that a pass loses to a kill
NOT_DONE, NOT_FINITE = 0, -1
"""What `filled` says of a row that isn't pooled yet, and of one whose states aren't finite."""
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}

Shape = tuple[int, int, int, int]


class Store:
    """Keeps the routers' inputs in a folder, memory-mapped, as `float32` or `bfloat16`.

    The folder is made if necessary; nothing else that lies in it is touched.
    """

    means: Tensor  # `[N, L, W, D]`, once `opened` is left; a map of the file, not to be written to
    filled: Tensor  # `[N]`: how many windows hold tokens, or `NOT_DONE` or `NOT_FINITE`
    _file: BinaryIO
    _committed: float

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder, self.path = folder, folder / FEATURES_FILE
        self.manifest_path = manifest_path(folder / "features")
        self.dtype = dtype

    @contextlib.contextmanager
    def opened(
        self, manifest: Mapping[str, Any], shape: Shape, say: Callable[[str], None]
    ) -> Iterator[None]:
        """Resume what the folder holds, or begin; inside the block, rows may be put.

        A folder that holds every row is only read, so it may be one without permission to write.
        However the block is left, the rows that were put are kept. `say` is told what the pass
        needs on disk, and what is there already; the shape is N, L, W, D.

        Other features in the folder are a ConfigError, which says what differs; broken files, a
        folder that can't be written, too little space, before or during the pass, and another
        training that pools into the folder a RecordError.
        """
        config = {**manifest["config"], "feature_dtype": self.dtype}
        manifest = {**manifest, "config": config, "feature_version": FEATURE_VERSION}
        self._lay_out(shape)
        if self._resume(manifest) and self._missing() == 0:
            if (self.folder / ".training.lock").exists():  # a kill after the last commit left it
                with contextlib.suppress(RecordError), self._alone():
                    pass
            say(f"the routers' inputs in {self.folder} are used again")
            self._map()
            yield
            return
        self._check_space(say)
        with self._alone():
            if not self._resume(manifest):  # nobody else has begun in the meantime
                self._begin(manifest)
            with self._refusing():
                self._file = self.path.open("r+b", buffering=0)
            self._committed = time.monotonic()
            with self._file:
                try:
                    yield
                finally:
                    self._commit()
        self._map()

    def put(self, rows: Sequence[int], means: Tensor, filled: Tensor) -> None:
        """Write `[B]` rows; in the file they count as done when they have reached the disk."""
        stored = means.to("cpu", DTYPES[self.dtype][0]).contiguous()
        with self._refusing():
            for row, values in zip(rows, stored, strict=True):
                self._write(self._start + row * self._row_bytes, values.view(torch.uint8).numpy())
        self.filled[rows] = filled.cpu()
        if time.monotonic() - self._committed >= COMMIT_S:
            self._commit()

    def remove(self) -> None:
        """Delete the features, and the folder if it holds nothing else."""
        if not self.folder.is_dir():
            return
        # As its only writer, so that the lock that a kill left goes with the rest.
        with self._alone():
            self.path.unlink(missing_ok=True)
            self.manifest_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return only_writer(self.folder, "training", "folder for the features")

    def _lay_out(self, shape: Shape) -> None:
        """Work out where things lie: a header of safetensors, `filled`, then the rows."""
        dtype, name = DTYPES[self.dtype]
        N, *row = self._shape = shape
        self._row_bytes = math.prod(row) * dtype.itemsize
        ends = [0, 8 * N, 8 * N + N * self._row_bytes]
        tensors = {
            "filled": {"dtype": "I64", "shape": [N], "data_offsets": ends[:2]},
            "means": {"dtype": name, "shape": list(shape), "data_offsets": ends[1:]},
        }
        text = json.dumps(tensors).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._start = len(self._header) + 8 * N
        self._bytes = len(self._header) + ends[-1]
        self.filled = torch.full((N,), NOT_DONE)

    def _begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, and a file without any row: whole, or not there at all."""
        write_json(self.manifest_path, manifest)
        unfinished = self.path.with_name(f".{FEATURES_FILE}.tmp")
        with self._refusing():
            with unfinished.open("wb") as file:
                file.write(self._header + self.filled.numpy().tobytes())
                file.truncate(self._bytes)  # takes no space yet
                os.fsync(file.fileno())
            unfinished.replace(self.path)

    def _resume(self, manifest: Mapping[str, Any]) -> bool:
        """Read which rows the folder holds; False if it holds no features."""
        if not self.path.exists():
            return False  # a manifest alone binds nobody: a kill came between the two
        stored = read_manifest(self.folder / "features", "features")
        broken = f"{self.path} is broken; delete {self.folder} to pool the features anew"
        if stored is None:
            raise RecordError(f"{broken} ({self.manifest_path.name} is missing)")
        refuse_other_run(
            f"{self.folder} holds other features: what is there",
            _identity(stored),
            _identity(manifest),
            "choose another folder, or delete it to pool them anew",
        )
        with self._refusing("read"), self.path.open("rb") as file:
            header = file.read(len(self._header))
            filled = file.read(8 * len(self.filled))
            size = os.fstat(file.fileno()).st_size
        if header != self._header or size != self._bytes:
            raise RecordError(broken)
        self.filled = torch.from_numpy(np.frombuffer(filled, dtype="<i8").copy())
        if bool(((self.filled < NOT_FINITE) | (self.filled > self._shape[2])).any()):
            raise RecordError(broken)
        return True

    def _commit(self) -> None:
        """Note the rows that were put as done, once they are on the disk."""
        with self._refusing():
            os.fsync(self._file.fileno())
            self._write(len(self._header), self.filled.numpy())
            os.fsync(self._file.fileno())
        self._committed = time.monotonic()

    def _write(self, place: int, values: np.ndarray[Any, Any]) -> None:
        # Not through a map: on a full disk the operating system would end the process.
        self._file.seek(place)
        rest = values.data.cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def _map(self) -> None:
        """Map the rows read-only: safetensors' own map is writable, and can't exceed the memory."""
        dtype = DTYPES[self.dtype][0]
        with self._refusing("read"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            rows = np.memmap(self.path, f"<i{dtype.itemsize}", "r", self._start, self._shape)
            self.means = torch.from_numpy(rows).view(dtype)

    def _missing(self) -> int:
        return int((self.filled == NOT_DONE).sum())

    def _check_space(self, say: Callable[[str], None]) -> None:
        """Say what the pass needs, and refuse to begin what can't end well."""
        N, missing = self._shape[0], self._missing()
        need = missing * self._row_bytes
        place = self.folder.absolute()
        free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
        needed = f"{_size(need)} in {self.folder}, where {_size(free)} are free"
        if need > free:
            raise RecordError(
                f"the routers' inputs need {needed}; free some space, choose another folder"
                + ("" if self.dtype == "bfloat16" else ", or give --feature-dtype bfloat16 (half)")
            )
        begun = f"; {N - missing} of {N} targets are there already" if missing < N else ""
        say(f"the routers' inputs need {needed}{begun}")

    @contextlib.contextmanager
    def _refusing(self, verb: str = "write") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            done = len(self.filled) - self._missing()
            raise RecordError(
                f"can't {verb} {self.path}: {error.strerror}; mend it and give the same command "
                f"again to resume it after the {done} of {len(self.filled)} targets that are there"
            ) from error


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    model, names = manifest["model"], ("fingerprint", "class", "num_layers", "hidden_size")
    return {
        "config": manifest.get("config", {}),
        "model": {name: model.get(name) for name in names},
        "dtype": manifest.get("runtime", {}).get("dtype"),
        "targets": {"routers_sha256": None, **manifest.get("targets", {})},
        "feature_version": manifest.get("feature_version"),
    }


def _size(num_bytes: int) -> str:
    giga, mega = num_bytes / 1e9, num_bytes / 1e6
    return f"{giga:.1f} GB" if giga >= 1 else f"{max(mega, 0.1):.1f} MB"
