"""The files in a routers folder, and the search for that folder on this machine or on the hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import OfflineModeIsEnabled

from drllm.errors import CheckpointError, ConfigError
from drllm.model import hub
from drllm.model.cards import CARD_FILE
from drllm.model.places import HUB_ID
from drllm.models.routers.places import CONFIG_FILE, WEIGHTS_FILE

AUTO_FILE = "config.json"  # for the hub, which counts downloads by it, and for transformers
FILES = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, AUTO_FILE]


def find_routers(place: Path | str, revision: str | None = None, **options: Any) -> Path:
    """Return the folder of routers that a name stands for. Download it from the hub if necessary.

    Args:
        place: A folder, or OWNER/NAME on the hub. A folder of that name is preferred. A folder
            that doesn't exist is returned too; reading it will fail.
        revision: Branch, tag or commit on the hub.
        options: `token`, `cache_dir` and `local_files_only`, as the hub's library takes them.

    Raises:
        CheckpointError: The hub doesn't have the routers, or can't be reached.
        ConfigError: A revision is given with a folder.
    """
    name = str(place)
    folder = Path(place).expanduser()
    has_hub_form = HUB_ID.fullmatch(name) is not None
    if folder.exists() or not has_hub_form:
        if revision is not None:
            raise ConfigError(
                f"the revision {revision!r} has no effect on the folder {place}; leave it out"
            )
        return folder
    try:
        folder = _download(name, revision, options)
    except hub.FETCH_ERRORS as error:
        advice = "give OWNER/NAME, or a folder that 'drllm train' has written"
        reason = hub.explain(error, "routers repository", name, revision, advice)
        raise CheckpointError(f"{reason}; there is no folder {name!r} either") from error
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"the hub repository {name!r} has no {CONFIG_FILE}; is it a base model? Then give it "
            f"as --model"
        )
    return folder


def _download(name: str, revision: str | None, options: dict[str, Any]) -> Path:
    """Download routers from the hub, and return the folder where they are now."""
    options = {"revision": revision, "allow_patterns": FILES, **options}
    with hub.quiet():
        try:
            return Path(huggingface_hub.snapshot_download(name, **options))
        except OfflineModeIsEnabled:  # some versions raise this although the commit is cached
            options["local_files_only"] = True
            return Path(huggingface_hub.snapshot_download(name, **options))
