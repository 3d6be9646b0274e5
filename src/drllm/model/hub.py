"""Use the Hugging Face hub: find a model's commit, explain errors, and silence its library."""

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

from drllm.errors import ModelError
from drllm.work import listener

TOKEN_VARIABLE = "HF_TOKEN"
ERRORS: tuple[type[Exception], ...]
ERRORS = (errors.HTTPError, OSError)  # type: ignore[attr-defined]
"""Errors that the hub's library raises. The first covers all errors of its HTTP library."""
HUB_TIMEOUT_S = 10.0  # of the request that shows whether a model exists
NOT_FOUND_ERRORS = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
FETCH_ERRORS = (errors.HFValidationError, errors.EntryNotFoundError, *ERRORS)
"""Errors that a download may raise and that `explain` can explain."""


def select_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options of `from_pretrained` that concern the hub."""
    names = ("token", "cache_dir", "local_files_only")
    return {name: options[name] for name in names if name in options}


def find_commit(name: str, revision: str | None, *, advice: str, **options: Any) -> str:
    """Return the commit of a hub model's revision.

    This fetches the model's config, the smallest file that shows whether the model exists.

    Args:
        name: The model's hub id.
        revision: The revision; None for the default branch.
        advice: What the user can do if the model doesn't exist, for the error message.
        options: Options of `hf_hub_download`.

    Raises:
        ModelError: The config can't be fetched, or the name stands for routers.
    """
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, **options)
    except FETCH_ERRORS as error:
        message = explain(error, "model", name, revision, advice)
        is_offline = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError) and not is_offline:
            message = f"model {name!r} has no config.json, so it isn't a transformers model"
        raise ModelError(message) from error
    if '"drllm"' in Path(file).read_text(encoding="utf-8", errors="replace"):
        raise ModelError(f"{name!r} holds routers, not a model; give them as --routers")
    return Path(file).parent.name  # the cache keeps a model's files under snapshots/COMMIT


def check_model(name: str, revision: str | None, *, advice: str) -> None:
    """Refuse a hub model that doesn't exist, with one quick request instead of a download.

    A model in the local cache needs no request. If the hub answers with another error, such as one
    of its own, loading the model will show what it is.

    Args:
        name: The model's hub id.
        revision: The revision; None for the default branch.
        advice: What the user can do if the model doesn't exist, for the error message.

    Raises:
        ModelError: The model or the revision doesn't exist, or the hub can't be reached.
    """
    if find_cached_config(name, revision) is not None:
        return
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except FETCH_ERRORS as error:
        is_answer = isinstance(error, errors.HfHubHTTPError)
        if is_answer and not isinstance(error, NOT_FOUND_ERRORS):
            return
        raise ModelError(explain(error, "model", name, revision, advice)) from error


def find_cached_config(name: str, revision: str | None) -> Path | None:
    """Return a model's `config.json` in the local cache; None if it isn't there."""
    file = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file) if isinstance(file, str) else None


def explain(error: Exception, kind: str, name: str, revision: str | None, advice: str) -> str:
    """Explain in one line why something can't be fetched from the hub, and what to do.

    Args:
        error: One of `FETCH_ERRORS`.
        kind: The kind of repository, such as `model`.
        name: The repository's hub id.
        revision: The repository's revision; None for the default branch.
        advice: What the user can do if the error itself has no remedy.
    """
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
        return f"{subject} isn't on the hub, or is private (then set {TOKEN_VARIABLE}); {advice}"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} can't be a hub id; {advice}"
    return _explain_no_download(error, subject, advice)


def _explain_no_download(error: Exception, subject: str, advice: str) -> str:
    """Explain why the hub, which may have the repository, didn't send it."""
    reason = network_problem()
    if "local_files_only" in str(error) and not constants.HF_HUB_OFFLINE:
        reason = "local_files_only is set"
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        error = cause  # the hub's response to the request
    is_offline = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.HfHubHTTPError) and not is_offline:
        return (
            f"the hub refused {subject}: {read_hub_message(error)}; if it needs a login, set "
            f"{TOKEN_VARIABLE} to a valid token"
        )
    return (
        f"{subject} isn't in the local cache, and {reason}; connect (a gated repository also "
        f"needs {TOKEN_VARIABLE}), or {advice}"
    )


def network_problem() -> str:
    """Return the reason why the hub can't be used."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return "the hub can't be reached"


def read_hub_message(error: errors.HfHubHTTPError) -> str:
    """Return the first line of the hub's message, or of the library's if the hub sent none."""
    message = (error.server_message or "").strip()
    if not message:
        return first_line(error)
    return message.splitlines()[0].rstrip(".")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; without a message, the error's class name."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip().rstrip(".")
    return type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and the hub's library inside the block; downloads still show progress.

    The function of transformers that turns its bars off also turns off the bars of downloads. So
    the latter are turned on again, unless the user had turned them off.
    """
    from transformers.utils import logging as transformers_logging  # slow to import

    with ExitStack() as stack:
        stack.enter_context(listener.quiet("huggingface_hub", "transformers"))
        downloads_are_quiet = are_progress_bars_disabled()
        if downloads_are_quiet:
            stack.callback(disable_progress_bars)
        if transformers_logging.is_progress_bar_enabled():
            stack.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
        if not downloads_are_quiet:
            enable_progress_bars()
        yield
