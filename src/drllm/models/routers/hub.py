"""Routers on the hub: where a name leads, fetching, pushing, and what to say when the hub says no.

Owns the choice between a folder and the hub, and the wording of everything that can go wrong on
the way to either. Leaves what is in the files to `routers` and base models on the hub to `hub`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from drllm.errors import CheckpointError, ConfigError
from drllm.models.base.hub import ERRORS, TOKEN_VARIABLE, first_line, quiet
from drllm.models.routers.card import HUB_ID
from drllm.models.routers.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

COMMIT = re.compile(r"[0-9a-f]{40}")
NEW_TOKEN = "make one with write access in your settings there"
NAME_EXAMPLE = "give OWNER/NAME, for example your-name/routers"


def find(place: Path | str, revision: str | None = None) -> Path:
    """Return the folder of routers that a name stands for, fetching them from the hub if need be.

    What is there on this machine wins over the hub.

    Args:
        place: A folder, or OWNER/NAME on the hub.
        revision: Branch, tag or commit on the hub; None for the default branch.

    Returns:
        The folder, in the hub library's cache where the routers come from the hub. A folder that
        doesn't exist is returned too, for its reader to refuse.

    Raises:
        CheckpointError: Routers that the hub doesn't have or doesn't give, or no network.
        ConfigError: A revision of a folder.
    """
    folder = Path(place).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(str(place)) and not str(place).startswith("."):
        return _fetch(str(place), revision)
    if revision is not None:
        raise ConfigError(
            f"the revision {revision!r} has no effect on the folder {place}; leave it out"
        )
    return folder


def _fetch(name: str, revision: str | None) -> Path:
    what = f"routers {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        with quiet():
            folder = _cached_commit(name, revision) or _download(name, revision)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what} are gated: accept the terms on their hub page, then set {TOKEN_VARIABLE} to a "
            f"token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"routers {name!r} have no revision {revision!r}; give a branch, tag or commit of them"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and {what} aren't on the hub, or are private (then set "
            f"{TOKEN_VARIABLE}); give a folder that 'drllm train' has written, or OWNER/NAME"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and it can't be a hub id; give a folder that "
            f"'drllm train' has written, or OWNER/NAME"
        ) from error
    except LocalEntryNotFoundError as error:
        # Also raised for any answer that isn't one of the above; the cause tells.
        raise _unavailable(name, what, error.__cause__) from error
    except ERRORS as error:
        raise _unavailable(name, what, error) from error
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{what}: that hub repository has no {CONFIG_FILE}; is it a base model? Then give it "
            f"as --model"
        )
    return folder


def _download(name: str, revision: str | None, **options: Any) -> Path:
    wanted = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    return Path(
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, **options)
    )


def _cached_commit(name: str, revision: str | None) -> Path | None:
    """Return where a commit lies in the cache, if it is one and lies there whole.

    A commit never changes, so the hub needn't be asked. Some versions of its library ask all the
    same for the list of files, where an older version put them there.
    """
    if revision is None or not COMMIT.fullmatch(revision):
        return None
    try:
        folder = _download(name, revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return (
        folder if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file() else None
    )


def _unavailable(name: str, what: str, cause: BaseException | None) -> CheckpointError:
    if isinstance(cause, HfHubHTTPError):
        return CheckpointError(
            f"the hub refused {what}: {_answer(cause)}; if they need a login, set "
            f"{TOKEN_VARIABLE} to a valid token"
        )
    return CheckpointError(
        f"there is no folder {name!r}, {what} aren't in the local cache, and {_no_network()}; "
        f"connect, or give a folder that 'drllm train' has written"
    )


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload routers",
) -> str:
    """Upload a folder of routers to the hub, making the repository if need be.

    Args:
        folder: Everything in it is uploaded.
        repo: OWNER/NAME.
        private: Make the repository private; one that is public already is refused.
        token: With write access; None takes the one that is set or logged in with.
        revision: Branch, made if need be; None for the default branch.
        commit_message: First line of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: A name that can't be one, no token, one that isn't accepted or may not
            write there, a public repository instead of a private one, or no network.
    """
    if not HUB_ID.fullmatch(repo):
        raise CheckpointError(f"{repo!r} can't be a repository on the hub; {NAME_EXAMPLE}")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"can't push to {repo}: {_no_network()}; unset it to push")
    token = token or huggingface_hub.get_token()
    if token is None:
        raise CheckpointError(
            f"can't push to {repo} on the hub without a token: {NEW_TOKEN}, then pass it as "
            f"token=... or set {TOKEN_VARIABLE}"
        )
    api = huggingface_hub.HfApi(token=token)
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
        raise CheckpointError(
            f"{repo!r} can't be a repository on the hub: {first_line(error)}; {NAME_EXAMPLE}"
        ) from error
    except ERRORS as error:
        raise _not_pushed(repo, error) from error
    return str(commit.commit_url)


def _not_pushed(repo: str, error: Exception) -> CheckpointError:
    if not isinstance(error, HfHubHTTPError):
        return CheckpointError(
            f"can't push to {repo}: {_no_network()} ({first_line(error)}); connect and push again"
        )
    status = error.response.status_code
    if status == 401:
        advice = (
            f"the hub doesn't accept the token; {NEW_TOKEN}, then pass it as token=... or set "
            f"{TOKEN_VARIABLE}"
        )
    elif status == 403:
        advice = (
            f"the token may not write there ({_answer(error)}); give a token with write access "
            f"to {repo.split('/')[0]}, or a repository of your own"
        )
    else:
        advice = f"the hub refused: {_answer(error)}"
    return CheckpointError(f"can't push to {repo}: {advice}")


def _answer(error: HfHubHTTPError) -> str:
    """Return what the server itself says, in one line, else what its library makes of it."""
    said = (error.server_message or "").strip()
    return said.splitlines()[0].rstrip(".") if said else first_line(error)


def _no_network() -> str:
    offline = constants.HF_HUB_OFFLINE
    return "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
