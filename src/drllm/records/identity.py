"""Compares the base models that two files name, by their fingerprints."""

from drllm.listener import logger

QUANTISED = "quantised"
"""The start of a fingerprint whose weights can't be read as they were trained."""


def same_weights(first: str, second: str, where: str) -> bool:
    """Return whether two fingerprints are of the same base model, in whatever precision.

    A fingerprint has up to three parts with `-` between them: the hash of the weights or
    `QUANTISED`, the hash of the embedding, which most quantisations don't change, and that of how
    the model is quantised. If one of the two is quantised, the embeddings must be equal as far as
    they are known, and a warning says that precisions differ.

    Args:
        first: A fingerprint.
        second: The other one.
        where: The file or setting that has it, for the warning.
    """
    first_weights, first_embedding = _parts(first)
    second_weights, second_embedding = _parts(second)
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


def _parts(fingerprint: str) -> tuple[str, str]:
    """Return the hashes of weights and embedding; the latter is empty in older files."""
    weights, _, rest = fingerprint.partition("-")
    return weights, rest.partition("-")[0]


def differ(key: str, first: object, second: object, where: str) -> bool:
    """Return whether the values of a key differ; fingerprints are compared by `same_weights`."""
    if key == "fingerprint":
        return not same_weights(str(first), str(second), where)
    return first != second
