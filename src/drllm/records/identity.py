"""Compares the base models of two files by their fingerprints."""

from drllm.listener import logger

QUANTISED = "quantised"
"""The first part of the fingerprint of quantised weights."""


def have_same_weights(first: str, second: str, where: str) -> bool:
    """Tell whether two fingerprints belong to the same base model, in any precision.

    A fingerprint has up to three parts with `-` between them. The first is the hash of the weights,
    or `QUANTISED`. The second is the hash of the embedding, which most quantisations don't change.
    The third is the hash of the way in which the model is quantised.

    If a model is quantised, its weights can't be compared. Then the hashes of the embeddings are
    compared, provided that both fingerprints have one. If the fingerprints aren't equal, a warning
    says that precisions differ.

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
    """Return the hashes of the weights and of the embedding; older files have no second hash."""
    weights, _, rest = fingerprint.partition("-")
    return weights, rest.partition("-")[0]


def differ(key: str, first: object, second: object, where: str) -> bool:
    """Tell whether two values of a key differ; fingerprints may differ in precision."""
    if key == "fingerprint":
        return not have_same_weights(str(first), str(second), where)
    return first != second
