"""Whether two files are of one base model, by the fingerprints that they carry."""

from drllm.listener import logger

QUANTISED = "quantised"
"""What a fingerprint begins with where the weights can't be read as they were trained."""


def same_weights(one: str, other: str, where: str) -> bool:
    """Say whether two fingerprints are of the same base model, in whatever precision.

    A fingerprint is the weights' hash or `QUANTISED` and, behind a `-`, that of the embedding,
    which most quantisations leave as it is, and that of how the model is quantised. Where one is
    quantised the embeddings must agree, as far as they are known, and `where` it is warned of.
    """
    ours, our_embedding, *_ = [*one.split("-"), ""]
    theirs, their_embedding, *_ = [*other.split("-"), ""]
    if QUANTISED not in (ours, theirs):
        return ours == theirs
    if our_embedding and their_embedding and our_embedding != their_embedding:
        return False
    if one != other:
        logger.warning(
            "%s: one of two base models is quantised, so only class, size and embedding were "
            "compared; answers may differ between precisions",
            where,
        )
    return True


def differ(key: str, one: object, other: object, where: str) -> bool:
    """Say whether two identities differ under a key; of fingerprints, as `same_weights` does."""
    is_print = key == "fingerprint"
    return not same_weights(str(one), str(other), where) if is_print else one != other
