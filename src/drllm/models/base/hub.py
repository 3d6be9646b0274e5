"""The Hugging Face hub: find a model's commit, explain errors in one line, quiet libraries."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

from drllm import listener
from drllm.errors import ModelError

TOKEN_VARIABLE = "HF_TOKEN"
ERRORS: tuple[type[Exception], ...]
ERRORS = (errors.HTTPError, OSError)  # type: ignore[attr-defined]
"""What the hub's library raises; the first is its HTTP library's own error, whichever that is."""
FETCH_ERRORS = (errors.HFValidationError, errors.EntryNotFoundError, *ERRORS)
"""What `explain` explains."""


def options_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a `from_pretrained` that concern the hub."""
    names = ("token", "cache_dir", "local_files_only")
    return {name: options[name] for name in names if name in options}


def find_commit(name: str, revision: str | None, *, otherwise: str, **options: Any) -> str:
    """Return the commit that a revision of a hub model stands for.

    It fetches the model's config, the smallest file that shows whether the model is there.
    """
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, **options)
    except FETCH_ERRORS as error:
        message = explain(error, "model", name, revision, otherwise)
        is_offline = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError) and not is_offline:
            message = f"model {name!r} has no config.json, so it isn't a transformers model"
        raise ModelError(message) from error
    if '"drllm"' in Path(file).read_text(encoding="utf-8", errors="replace"):
        raise ModelError(f"{name!r} holds routers, not a model; give them as --routers")
    return Path(file).parent.name  # the cache keeps a model's files under snapshots/COMMIT


def explain(error: Exception, kind: str, name: str, revision: str | None, otherwise: str) -> str:
    """Say in one line why a `kind` of thing can't be fetched, and what to do, else `otherwise`."""
    subject = f"{kind} {name!r}"
    if revision:
        subject += f" at revision {revision!r}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{subject} is gated: accept the terms on its hub page, then set {TOKEN_VARIABLE} to "
            f"a token of yours"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{kind} {name!r} has no revision {revision!r}; give a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{subject} isn't on the hub, or is private (then set {TOKEN_VARIABLE}); {otherwise}"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} can't be a hub id; {otherwise}"

    reason = no_network()
    if "local_files_only" in str(error) and not constants.HF_HUB_OFFLINE:
        reason = "local_files_only is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        # Also raised for any answer that isn't one of the above; the cause tells.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    is_offline = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.HfHubHTTPError) and not is_offline:
        return (
            f"the hub refused {subject}: {answer(error)}; if it needs a login, set "
            f"{TOKEN_VARIABLE} to a valid token"
        )
    return (
        f"{subject} isn't in the local cache, and {reason}; connect (a gated one also needs "
        f"{TOKEN_VARIABLE}), or {otherwise}"
    )


def no_network() -> str:
    """Say why there is no network."""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"


def answer(error: errors.HfHubHTTPError) -> str:
    """Return the hub's own message in one line, else that of its library."""
    message = (error.server_message or "").strip()
    if not message:
        return first_line(error)
    return message.splitlines()[0].rstrip(".")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's name if it has none."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip().rstrip(".")
    return type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and the hub's library inside the block; downloads keep their bars."""
    with ExitStack() as restored:
        restored.enter_context(listener.quiet("huggingface_hub", "transformers"))
        downloads_are_quiet = are_progress_bars_disabled()
        if downloads_are_quiet:
            restored.callback(disable_progress_bars)
        if transformers_logging.is_progress_bar_enabled():
            restored.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()  # this disables those of downloads too
        if not downloads_are_quiet:
            enable_progress_bars()
        yield
