"""Push routers to the Hugging Face hub, for `RoutedModel.push_to_hub`."""

import dataclasses
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from drllm.errors import CheckpointError
from drllm.model import hub
from drllm.model.aliases import ALIASES
from drllm.model.places import HUB_ID
from drllm.models.routers.checkpoint import complete_config, save_routers
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack

TOKEN_ADVICE = (
    f"make a token with write access in your settings on the hub, then pass it as token=... or set "
    f"{hub.TOKEN_VARIABLE}"
)
NAME_ADVICE = "give OWNER/NAME, for example your-name/routers"


def push_routers(
    routers: RouterStack,
    model: Any,
    repo: str,
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Push routers with a model card to a repository on the hub, and make it if necessary.

    If the base model is only on this machine, its name isn't pushed, and a warning says so.
    `RoutedModel.push_to_hub` explains the parameters.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: The repository's name isn't valid, there is no token or no network, or the
            hub refuses the push.
    """
    config = _remove_local_name(complete_config(routers.config, model))
    if not HUB_ID.fullmatch(repo):
        raise CheckpointError(f"{repo!r} can't be a repository on the hub; {NAME_ADVICE}")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"can't push to {repo}: HF_HUB_OFFLINE is set; unset it to push")
    token = token or huggingface_hub.get_token()
    if token is None:
        raise CheckpointError(f"can't push to {repo} on the hub without a token: {TOKEN_ADVICE}")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="drllm-routers-") as folder:
        save_routers(routers, folder, config=config, place=repo)
        try:
            _create_repository(api, repo, private, revision)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message
            )
        except HFValidationError as error:
            reason = hub.first_line(error)
            raise CheckpointError(
                f"{repo!r} can't be a repository on the hub: {reason}; {NAME_ADVICE}"
            ) from error
        except hub.ERRORS as error:
            raise CheckpointError(f"can't push to {repo}: {_explain(repo, error)}") from error
    return str(commit.commit_url)


def _create_repository(
    api: huggingface_hub.HfApi, repo: str, private: bool, revision: str | None
) -> None:
    """Make the repository and the branch if they don't exist.

    Refuse a public repository that exists already if `private` is True.
    """
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise CheckpointError(
            f"{repo} is public already and private=True can't change that, so nothing was "
            f"pushed; make it private in its settings on the hub, or choose another name"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)


def _remove_local_name(config: RouterConfig) -> RouterConfig:
    """Return a config without the base model's name if only this machine has that model.

    On other machines the name would be useless, and it would reveal the names of local folders.
    """
    name = config.base_model
    if not name or name in ALIASES or _is_hub_id(name):
        return config
    warnings.warn(
        f"{name!r} isn't a hub id, so the pushed routers don't name their base model; pass it as "
        f"base=... when you load them",
        stacklevel=4,  # the caller of `RoutedModel.push_to_hub`
    )
    return dataclasses.replace(config, base_model="", base_revision=None)


def _is_hub_id(name: str) -> bool:
    """Say whether a name has the form of a hub id, and isn't a file or folder here."""
    has_form = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    return has_form and not Path(name).expanduser().exists()


def _explain(repo: str, error: Exception) -> str:
    """Say in one line why the hub refused a push, and what to do."""
    if not isinstance(error, HfHubHTTPError):
        return f"{hub.network_problem()} ({hub.first_line(error)}); connect and push again"
    if error.response.status_code == 401:
        return f"the hub doesn't accept the token; {TOKEN_ADVICE}"
    if error.response.status_code == 403:
        owner = repo.split("/")[0]
        return (
            f"the token has no write access ({hub.read_hub_message(error)}); give a token with "
            f"write access to {owner}, or a repository of your own"
        )
    return f"the hub refused: {hub.read_hub_message(error)}"
