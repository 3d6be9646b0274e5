"""Compares the base models of two files by their fingerprints and their bypasses."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

QUANTISED = "quantised"
"""The first part of the fingerprint of quantised weights."""


def have_same_weights(first: str, second: str, where: str) -> bool:
    """Tell whether two fingerprints belong to the same base model, in any precision.

    A fingerprint has up to three parts with `-` between them:

    1. the hash of the weights, or `QUANTISED`;
    2. the hash of the embedding, which most quantisations don't change (older files lack it);
    3. for a quantised model, the hash of the way in which it is quantised.

    The weights of a quantised model can't be compared with other weights. If either model is
    quantised, the hashes of the embeddings are compared instead; without two of these hashes the
    result is True. A warning says so, unless the fingerprints are equal.

    Args:
        first: A fingerprint.
        second: Another fingerprint.
        where: The file or setting of the second fingerprint, for the warning.
    """
    first_weights, first_embedding = _split_fingerprint(first)
    second_weights, second_embedding = _split_fingerprint(second)
    if QUANTISED not in (first_weights, second_weights):
        return first_weights == second_weights
    if first_embedding and second_embedding and first_embedding != second_embedding:
        return False
    if first != second:
        logger.warning(
            "%s: one of two base models is quantised, so only class, size and embedding were "
            "compared; answers may differ between precisions",
            where,
        )
    return True


def _split_fingerprint(fingerprint: str) -> tuple[str, str]:
    """Return the hashes of the weights and of the embedding; the second may be empty."""
    parts = fingerprint.split("-")
    embedding = parts[1] if len(parts) > 1 else ""
    return parts[0], embedding


BYPASS = "bypass"
"""The key of the hash of a bypass in an identity. Without a bypass the key is missing."""


def compare_bypass(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Say how the bypasses of two identities differ; return an empty text if they are the same."""
    first_hash = first.get(BYPASS)
    second_hash = second.get(BYPASS)
    if first_hash == second_hash:
        return ""
    return f"{_name_bypass(first_hash)}, and not {_name_bypass(second_hash)}"


def _name_bypass(sha256: str | None) -> str:
    return f"the bypass {sha256[:8]}" if sha256 else "no bypass"


def differ(key: str, first: object, second: object, where: str) -> bool:
    """Tell whether two models differ in one value of their identities.

    Args:
        key: The name of the value. Two `fingerprint`s of the same weights in different precisions
            count as equal; see `have_same_weights`.
        first: The value of a model.
        second: The value of another model.
        where: The file or setting of the second value, for a warning.
    """
    if key == "fingerprint":
        return not have_same_weights(str(first), str(second), where)
    return first != second
