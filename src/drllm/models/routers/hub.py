"""Routers on the hub: fetched by name, and pushed with a model card."""

import dataclasses
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from drllm.errors import CheckpointError, ConfigError
from drllm.models.base import hub
from drllm.models.base.load import ALIASES
from drllm.models.routers import checkpoint
from drllm.models.routers.card import HUB_ID
from drllm.models.routers.checkpoint import CONFIG_FILE, described, save_routers
from drllm.models.routers.stack import RouterStack

FILES = [CONFIG_FILE, checkpoint.WEIGHTS_FILE, checkpoint.CARD_FILE, checkpoint.COUNTED_FILE]
NEW_TOKEN = "make one with write access in your settings there, then pass it as token=... or set "
NEW_TOKEN += hub.TOKEN_VARIABLE
NAME_EXAMPLE = "give OWNER/NAME, for example your-name/routers"


def find(place: Path | str, revision: str | None = None, **options: Any) -> Path:
    """Return the folder of routers that a name stands for, fetched from the hub if necessary.

    A folder on this machine wins over OWNER/NAME on the hub. One that doesn't exist is returned
    too, for its reader to refuse. Options are `token`, `cache_dir` and `local_files_only`, as the
    hub's library takes them. Routers that can't be had are a CheckpointError.
    """
    name, folder = str(place), Path(place).expanduser()
    if folder.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        if revision is not None:
            raise ConfigError(
                f"the revision {revision!r} has no effect on the folder {place}; leave it out"
            )
        return folder
    try:
        with hub.quiet():
            fetch = partial(
                huggingface_hub.snapshot_download, name, revision=revision, allow_patterns=FILES
            )
            try:
                fetched = fetch(**options)
            except OfflineModeIsEnabled:  # which some versions say of a commit that is in the cache
                fetched = fetch(**{**options, "local_files_only": True})
    except hub.FETCH_ERRORS as error:
        otherwise = "give OWNER/NAME, or a folder that 'drllm train' has written"
        said = hub.explain(error, "routers repository", name, revision, otherwise)
        raise CheckpointError(f"{said}; there is no folder {name!r} either") from error
    folder = Path(fetched)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"the hub repository {name!r} has no {CONFIG_FILE}; is it a base model? Then give it "
            f"as --model"
        )
    return folder


def push_routers(
    routers: RouterStack,
    model: Any,
    repo: str,
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Push routers with a model card to the hub, making the repository if necessary.

    The name of a base model that only this machine has isn't pushed, and a warning says so: it
    would lead nobody anywhere, and tell how folders are called here.
    """
    config = described(routers.config, model)
    name = config.base_model
    is_local = Path(name).expanduser().exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if name and name not in ALIASES and is_local:
        warnings.warn(
            f"{name!r} is no hub id, so the pushed routers don't name their base model; whoever "
            f"loads them gives it as base=...",
            stacklevel=3,
        )
        config = dataclasses.replace(config, base_model="", base_revision=None)
    if not HUB_ID.fullmatch(repo):
        raise CheckpointError(f"{repo!r} can't be a repository on the hub; {NAME_EXAMPLE}")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"can't push to {repo}: {hub.no_network()}; unset it to push")
    token = token or huggingface_hub.get_token()
    if token is None:
        raise CheckpointError(f"can't push to {repo} on the hub without a token: {NEW_TOKEN}")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="drllm-routers-") as folder:
        save_routers(routers, folder, config=config, place=repo)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise CheckpointError(
                    f"{repo} is public already and private=True can't change that, so nothing was "
                    f"pushed; make it private in its settings on the hub, or choose another name"
                )
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message
            )
        except HFValidationError as error:
            said = hub.first_line(error)
            raise CheckpointError(
                f"{repo!r} can't be a repository on the hub: {said}; {NAME_EXAMPLE}"
            ) from error
        except hub.ERRORS as error:
            raise CheckpointError(f"can't push to {repo}: {_refusal(repo, error)}") from error
    return str(commit.commit_url)


def _refusal(repo: str, error: Exception) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"{hub.no_network()} ({hub.first_line(error)}); connect and push again"
    if error.response.status_code == 401:
        return f"the hub doesn't accept the token; {NEW_TOKEN}"
    if error.response.status_code == 403:
        return (
            f"the token may not write there ({hub.answer(error)}); give a token with write access "
            f"to {repo.split('/')[0]}, or a repository of your own"
        )
    return f"the hub refused: {hub.answer(error)}"
