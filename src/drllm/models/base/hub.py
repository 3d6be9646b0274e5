"""The Hugging Face hub: whether a model can be had from it, and why not, in one line.

Owns the question for a model's commit and the silence of the libraries meanwhile. Leaves opening
the model to `loading`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

from drllm.errors import ModelError

TOKEN_VARIABLE = "HF_TOKEN"
ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError)
"""What the hub's library raises; the first is its HTTP library's own error, whichever that is."""


def find_commit(name: str, revision: str | None, *, otherwise: str) -> str:
    """Return the commit that a revision of a hub model stands for.

    The model's config is fetched for it, the smallest file that tells whether the model can be
    had.

    Args:
        name: OWNER/NAME.
        revision: Branch, tag or commit; None for the default branch.
        otherwise: What to advise where there is no such model or no network.

    Raises:
        ModelError: A model that is absent, private or gated, no such revision, or no network.
    """
    what = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError as error:
        raise ModelError(
            f"{what} is gated: accept its terms on its hub page, then set {TOKEN_VARIABLE} to a "
            f"token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model {name!r} has no revision {revision!r}; give a branch, tag or commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{what} isn't on the hub, or is private (then set {TOKEN_VARIABLE}); {otherwise}"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{name!r} can't be a hub id; {otherwise}") from error
    except LocalEntryNotFoundError as error:
        # Also raised for any answer that isn't one of the above; the cause tells.
        raise _unavailable(what, error.__cause__, otherwise) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{what} has no config.json, so it isn't a transformers model") from error
    except ERRORS as error:
        raise _unavailable(what, error, otherwise) from error
    return Path(file).parent.name  # the cache keeps a model's files under snapshots/COMMIT


def _unavailable(what: str, cause: BaseException | None, otherwise: str) -> ModelError:
    if isinstance(cause, HfHubHTTPError):
        return ModelError(
            f"the hub refused {what}: {first_line(cause)}; if it needs a login, set "
            f"{TOKEN_VARIABLE} to a valid token"
        )
    offline = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
    return ModelError(
        f"{what} isn't in the local cache and {why}; connect (gated models need "
        f"{TOKEN_VARIABLE}), or {otherwise}"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and the hub's library inside the block, but for bars of downloads."""
    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    if bars:
        transformers_logging.disable_progress_bar()  # and, unasked, those of downloads
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()
