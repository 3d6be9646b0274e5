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


def options_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a `from_pretrained` that say how the hub is asked."""
    return {n: given[n] for n in ("token", "cache_dir", "local_files_only") if n in given}


def find_commit(name: str, revision: str | None, *, otherwise: str, **options: Any) -> str:
    """Return the commit that a revision of a hub model stands for.

    The model's config is fetched for it, the smallest file that tells whether the model is there.
    """
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, **options)
    except FETCH_ERRORS as error:
        said = explain(error, "model", name, revision, otherwise)
        is_local = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError) and not is_local:
            said = f"model {name!r} has no config.json, so it isn't a transformers model"
        raise ModelError(said) from error
    if '"drllm"' in Path(file).read_text(encoding="utf-8", errors="replace"):
        raise ModelError(f"{name!r} holds routers, not a model; give them as --routers")
    return Path(file).parent.name  # the cache keeps a model's files under snapshots/COMMIT


def explain(error: Exception, kind: str, name: str, revision: str | None, otherwise: str) -> str:
    """Say in one line why a `kind` of thing can't be fetched, and what to do, else `otherwise`."""
    what = f"{kind} {name!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{what} is gated: accept the terms on its hub page, then set {TOKEN_VARIABLE} to a "
            f"token of yours"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{kind} {name!r} has no revision {revision!r}; give a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what} isn't on the hub, or is private (then set {TOKEN_VARIABLE}); {otherwise}"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} can't be a hub id; {otherwise}"
    why = no_network()
    if "local_files_only" in str(error) and not constants.HF_HUB_OFFLINE:
        why = "local_files_only is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        # Also raised for any answer that isn't one of the above; the cause tells.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, errors.HfHubHTTPError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return (
            f"the hub refused {what}: {answer(error)}; if it needs a login, set "
            f"{TOKEN_VARIABLE} to a valid token"
        )
    return (
        f"{what} isn't in the local cache, and {why}; connect (a gated one also needs "
        f"{TOKEN_VARIABLE}), or {otherwise}"
    )


def no_network() -> str:
    """Say why there is no network."""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"


def answer(error: errors.HfHubHTTPError) -> str:
    """Return what the hub itself says, in one line, else what its library makes of it."""
    said = (error.server_message or "").strip()
    return said.splitlines()[0].rstrip(".") if said else first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and the hub's library inside the block, but for bars of downloads."""
    with ExitStack() as restored:
        restored.enter_context(listener.quiet("huggingface_hub", "transformers"))
        downloads_are_quiet = are_progress_bars_disabled()
        if downloads_are_quiet:
            restored.callback(disable_progress_bars)
        if transformers_logging.is_progress_bar_enabled():
            restored.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()  # and, unasked, those of downloads
        if not downloads_are_quiet:
            enable_progress_bars()
        yield
