"""The stage `bundle`: collect what can be published, each artefact in a folder with a card.

An artefact is a checkpoint with fewer layers, the same as a GGUF file, trained routers, a bypass,
or the log of a search as a data set. Each folder can be pushed to the hub as it is.

Source: ours.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCardData, ModelCard, ModelCardData
from msgspec.structs import replace

from drllm.errors import ConfigError, ModelError
from drllm.model.cards import CARD_FILE, describe_alias, name_base_model, render_card
from drllm.model.places import HUB_ID
from drllm.model.submodel import KEPT_LAYERS
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.models.routers.config import read_config
from drllm.models.routers.places import CONFIG_FILE
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import (
    BYPASS_FILE,
    BypassRecord,
    load_bypass,
    load_bypass_with_record,
    save_bypass,
)
from drllm.records.codec import write_atomically, write_json
from drllm.records.manifest import read_manifest, to_lines, write_records
from drllm.records.places import check_new_folder, create_folder
from drllm.records.published import hide_folder, hide_model_place, hide_places
from drllm.records.search import SEARCH_FILE, SearchRecord, read_search
from drllm.records.shortened import SHRINK_FILE, read_shrink
from drllm.supervision.rules import is_saving, is_valid
from drllm.work.listener import Listener

CHECKPOINT = "checkpoint"
GGUF = "checkpoint-gguf"
ROUTERS = "routers"
BYPASS = "bypass"
SEARCH_LOG = "search-log"
"""The artefacts, by the names of their folders."""

SEARCH_CARD = Path(__file__).with_name("search_card.md.j2")
BYPASS_CARD = Path(__file__).with_name("bypass_card.md.j2")
GGUF_CARD = Path(__file__).with_name("gguf_card.md.j2")
CONVERTER = "convert_hf_to_gguf.py"  # of a checkout of llama.cpp
GGUF_TYPE = "bf16"
BASE_MODEL_FIELDS = ("base_model", "base_model_relation", "license")
"""What the card of a GGUF file takes from its checkpoint's, for the hub."""
LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""The lists of a config that say of which kind each layer is."""


class Artefact(NamedTuple):
    """What can be published.

    Attributes:
        kind: `checkpoint`, `checkpoint-gguf`, `routers`, `bypass` or `search-log`.
        folder: Its folder, with a card.
        source: The folder that it was made from.
    """

    kind: str
    folder: Path
    source: Path


def bundle(
    sources: Sequence[Path | str],
    output_dir: Path | str,
    *,
    llama_cpp: Path | str | None = None,
    listener: Listener | None = None,
) -> list[Artefact]:
    """Collect what can be published from folders of earlier stages.

    The output appears only when every artefact is complete.

    Args:
        sources: Folders that `drllm run`, `shrink`, `learn`, `export`, `train`, `bypass` or
            `search` have written.
        output_dir: The folder to make. An empty folder may exist.
        llama_cpp: A checkout of llama.cpp, whose converter writes the checkpoint as GGUF too.
        listener: Receives notes.

    Returns:
        The artefacts.

    Raises:
        ConfigError: A source has nothing to publish, two have the same kind of artefact, routers
            come without their bypass, the output is inside a checkpoint, there is no converter, or
            it can't be trusted with the layers.
        ModelError: The converter failed.
        RecordError: A file can't be read or written.
    """
    listener = listener or Listener()
    output = Path(output_dir)
    check_new_folder(output)
    converter = None if llama_cpp is None else find_converter(Path(llama_cpp))
    source_of = find_artefacts([Path(source) for source in sources])
    if CHECKPOINT in source_of:
        _refuse_inside(output, source_of[CHECKPOINT])
    if ROUTERS in source_of:
        _refuse_without_bypass(source_of[ROUTERS], source_of.get(BYPASS))
    if converter is not None and CHECKPOINT not in source_of:
        raise ConfigError("no source has a checkpoint to convert; leave --llama-cpp out")
    with create_folder(output) as folder:
        for kind, source in source_of.items():
            with listener.busy(f"collecting the {kind} of {source}"):
                if kind == CHECKPOINT:
                    write_checkpoint(source, folder / kind, listener)
                elif kind == ROUTERS:
                    write_routers(source, folder / kind)
                elif kind == BYPASS:
                    write_bypass(source, folder / kind)
                else:
                    write_search_log(source, folder / kind)
        if converter is not None:
            with listener.busy("converting the checkpoint to GGUF"):
                write_gguf(folder / CHECKPOINT, folder / GGUF, converter)
            source_of[GGUF] = source_of[CHECKPOINT]
    return [Artefact(kind, output / kind, source) for kind, source in source_of.items()]


def _refuse_inside(output: Path, checkpoint: Path) -> None:
    """Refuse to write into the folder of a checkpoint, which is copied as a whole."""
    if output.resolve().is_relative_to(checkpoint.resolve()):
        raise ConfigError(f"{output} is inside {checkpoint}, which is copied; give another folder")


def _refuse_without_bypass(routers_folder: Path, bypass_folder: Path | None) -> None:
    """Refuse routers that were trained with a bypass, if it isn't published beside them."""
    expected = read_config(routers_folder).bypass
    if not expected:
        return
    if bypass_folder is None:
        raise ConfigError(
            f"the routers in {routers_folder} were trained with a bypass, without which they don't "
            f"run; give its folder too"
        )
    if load_bypass(bypass_folder).sha256 != expected:
        raise ConfigError(
            f"the routers in {routers_folder} were trained with another bypass than that in "
            f"{bypass_folder}; give its folder instead"
        )


def find_artefacts(sources: Sequence[Path]) -> dict[str, Path]:
    """Return where each kind of artefact is.

    Raises:
        ConfigError: A source has nothing to publish, or two have the same kind of artefact.
    """
    source_of: dict[str, Path] = {}
    for source in sources:
        places = _find_in_folder(source)
        if not places:
            raise ConfigError(
                f"{source} has nothing to publish; give a folder that drllm run, shrink, "
                f"learn, export, train, bypass or search has written"
            )
        for kind, place in places.items():
            if kind in source_of:
                raise ConfigError(
                    f"{source_of[kind]} and {place} are both of the kind {kind!r}; give one of "
                    f"them, and bundle the other into a folder of its own"
                )
            source_of[kind] = place
    return source_of


def _find_in_folder(source: Path) -> dict[str, Path]:
    """Return where each kind of artefact is in one folder."""
    places = {}
    config_file = source / "config.json"
    if config_file.is_file() and KEPT_LAYERS in json.loads(config_file.read_text("utf-8")):
        places[CHECKPOINT] = source
    for folder in (source / "routers", source):
        if (folder / CONFIG_FILE).is_file() and ROUTERS not in places:
            places[ROUTERS] = folder
    if (source / BYPASS_FILE).is_file():
        places[BYPASS] = source
    if (source / SEARCH_FILE).is_file():
        places[SEARCH_LOG] = source
    return places


def write_checkpoint(source: Path, folder: Path, listener: Listener) -> None:
    """Copy a checkpoint of a shortened model."""
    _refuse_links(source)
    shutil.copytree(source, folder)
    if (source / SHRINK_FILE).is_file():
        record = read_shrink(source / SHRINK_FILE)
        if record.is_forced:
            listener.note(f"{source} was written by --force: {record.verdict}")
        public = replace(
            record, model=hide_model_place(record.model), config=hide_places(record.config)
        )
        write_json(folder / SHRINK_FILE, public)


def _refuse_links(folder: Path) -> None:
    """Refuse a folder with links, since a copy would have what they lead to, wherever it is."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link, and what it leads to would be published; delete it, or put the "
                f"file in its place"
            )


def write_routers(source: Path, folder: Path) -> None:
    """Write routers with their card, without what else the training left in their folder."""
    routers = load_routers(source)
    training = dict(routers.config.training)
    if "rewards" in training:
        training["rewards"] = [hide_folder(reward) for reward in training["rewards"]]
    base_model = routers.config.base_model
    if base_model:
        base_model = hide_folder(base_model)
    config = dataclasses.replace(routers.config, training=training, base_model=base_model)
    save_routers(routers, folder, config=config)


def write_bypass(source: Path, folder: Path) -> None:
    """Write a bypass with a card, without the places of the texts that it was fitted on."""
    bypass, record = load_bypass_with_record(source)
    model = hide_model_place(record.model)
    settings = hide_places(record.made_from.get("settings", {}))
    public = replace(
        record,
        model=model,
        texts=tuple(hide_folder(name) for name in record.texts),
        made_from={**record.made_from, "model": model, "settings": settings},
    )
    folder.mkdir()
    save_bypass(folder / BYPASS_FILE, bypass, public)
    write_atomically(folder / CARD_FILE, write_bypass_card(bypass, public))


def write_bypass_card(bypass: Bypass, record: BypassRecord) -> str:
    """Return the card of a bypass, from its file alone."""
    metadata = ModelCardData(library_name="drllm", tags=["layer-routing", "dynamic-depth"])
    name = record.model.get("id") or ""
    is_on_hub = HUB_ID.fullmatch(name) is not None
    name_base_model(metadata, name, "adapter", is_on_hub=is_on_hub)
    return render_card(
        BYPASS_CARD,
        metadata,
        alias=describe_alias(name),
        base=record.model,
        bypass=bypass,
        file=BYPASS_FILE,
        record=record,
        settings=record.made_from["settings"],
    )


def write_search_log(source: Path, folder: Path) -> None:
    """Write the log of a search with a card from which `datasets` loads it."""
    file = source / SEARCH_FILE
    records = read_search(file)
    manifest = read_manifest(file, "search") or {}
    public = [replace(record, reward=hide_folder(record.reward)) for record in records]
    folder.mkdir()
    if manifest:
        manifest["config"] = hide_places(manifest.get("config", {}))
        manifest["model"] = hide_model_place(manifest.get("model", {}))
        manifest.pop("plan", None)  # by which a search resumes; it names the same places
        write_records(folder / SEARCH_FILE, public, manifest)
    else:
        write_atomically(folder / SEARCH_FILE, to_lines(public))
    write_atomically(folder / CARD_FILE, write_search_card(public, manifest))


def write_search_card(records: Sequence[SearchRecord], manifest: dict[str, Any]) -> str:
    """Return the card of the log of a search, from its records and its manifest alone."""
    metadata = DatasetCardData(
        tags=["layer-routing", "dynamic-depth", "drllm"],
        configs=[{"config_name": "default", "data_files": SEARCH_FILE}],
    )
    num_saving = 0
    for record in records:
        num_saving += any(is_saving(path, record) for path in record.paths)
    return render_card(
        SEARCH_CARD,
        metadata,
        by_task=Counter(record.task for record in records),
        num_questions=len(records),
        num_paths=sum(len(record.paths) for record in records),
        num_right=sum(is_valid(record.full) for record in records),
        num_saving=num_saving,
        num_layers=records[0].num_layers,
        rewards=sorted({record.reward for record in records}),
        base=manifest.get("model", {}),
        settings=manifest.get("config", {}),
        version=manifest.get("drllm_version", ""),
        created=manifest.get("created", ""),
    )


def find_converter(llama_cpp: Path) -> Path:
    """Return the converter of a checkout of llama.cpp.

    Raises:
        ConfigError: The folder has none.
    """
    converter = llama_cpp.expanduser() / CONVERTER
    if not converter.is_file():
        raise ConfigError(
            f"--llama-cpp: {llama_cpp} has no {CONVERTER}; give a checkout of llama.cpp"
        )
    return converter.resolve()


def write_gguf(checkpoint: Path, folder: Path, converter: Path) -> None:
    """Convert a checkpoint to GGUF, and write its card."""
    refuse_mixed_layers(checkpoint)
    folder.mkdir()
    file = folder / f"model-{GGUF_TYPE}.gguf"
    convert_to_gguf(checkpoint, file, converter, GGUF_TYPE)
    checkpoint_card = ModelCard((checkpoint / CARD_FILE).read_text(encoding="utf-8"))
    base_model = {name: checkpoint_card.data.get(name) for name in BASE_MODEL_FIELDS}
    metadata = ModelCardData(
        library_name="gguf", tags=["layer-routing", "dynamic-depth", "drllm"], **base_model
    )
    card = render_card(
        GGUF_CARD,
        metadata,
        file=file.name,
        weights=GGUF_TYPE,
        checkpoint=checkpoint_card.text.strip(),
    )
    write_atomically(folder / CARD_FILE, card)


def refuse_mixed_layers(checkpoint: Path) -> None:
    """Refuse a checkpoint whose layers are of different kinds, such as one of Gemma 3.

    llama.cpp derives the kinds of some families from a layer's number: every sixth layer of Gemma 3
    has no window and another RoPE base. Where layers were left out, that is wrong, and the file
    would load and write bad text.

    Raises:
        ConfigError: The layers are of different kinds.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for name in LAYER_LISTS:
        kinds = config.get(name) or []
        if len(set(kinds)) > 1:
            raise ConfigError(
                f"the layers of this checkpoint are of different kinds ({name} in config.json), "
                f"and llama.cpp may derive them from a layer's number; leave --llama-cpp out, or "
                f"convert the checkpoint yourself and compare what both write"
            )


def convert_to_gguf(checkpoint: Path, file: Path, converter: Path, weights: str) -> None:
    """Convert a checkpoint to GGUF with llama.cpp's own converter.

    Args:
        checkpoint: The folder of the checkpoint.
        file: The file to write.
        converter: The converter; see `find_converter`.
        weights: How weights are stored: `f32`, `f16`, `bf16` or another type of the converter.

    Raises:
        ModelError: The converter fails.
    """
    command = [sys.executable, str(converter), str(checkpoint), "--outtype", weights]
    process = subprocess.run(
        [*command, "--outfile", str(file)], capture_output=True, text=True, check=False
    )
    if process.returncode != 0 or not file.is_file():
        lines = (process.stderr or process.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise ModelError(f"{converter.name} can't convert the checkpoint: {reason}")
