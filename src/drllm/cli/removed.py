"""Verbs that were removed, and one line for each that says what to use instead."""

REMOVED_VERBS: dict[str, str] = {
    "menu": "'menu' was removed: a menu of paths measured no gain; use 'drllm tune' and "
    "'drllm heal' for one path per task",
    "sweep": "'sweep' was removed; give 'drllm run' a recipe for each setting, and compare their "
    "reports",
}
"""The message for each removed verb: why the verb was removed, and what to use instead."""
