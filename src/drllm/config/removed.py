"""Settings and flags that were removed, and one line for each that says what to use instead."""

REMOVED_FLAGS: dict[str, str] = {
    "--edits": "--edits was removed: leaving out parts of layers and repeating blocks measured no "
    "gain; 'drllm tune' leaves out whole layers",
    "--menu": "--menu was removed: a menu of paths measured no gain; compare static paths with "
    "--paths",
    "--margin-tolerance": "--margin-tolerance was removed: no other value was measured; a path's "
    "margin may lie 0.5 nats below the full path's",
    "--paths-per-pass": "--paths-per-pass was removed: passes are as large as memory allows; "
    "--state-cache-gb bounds the memory of shared states",
    "--route-first": "--route-first was removed: prompts of a file are always routed first",
    "--no-route-first": "--no-route-first was removed: prompts of a file are always routed first; "
    "in Python, generate_many takes route_first=False",
    "--dropout": "--dropout was removed: it measured no gain; leave it out",
    "--normalise-features": "--normalise-features was removed: it measured no gain; leave it out",
    "--early-stopping": "--early-stopping was removed: it measured no gain; choose --num-epochs",
    "--weights": "--weights was removed: no study used it; every task counts the same",
    "--patience": "--patience was removed: no other value was measured; healing ends after 3 "
    "measurements without a lower KL",
    "--dry-run": "--dry-run was removed but for search; tune and heal say after their first block "
    "how long they take at most",
    "--epsilon": "--epsilon was removed here: no certificate was ever given; test the drop with "
    "'drllm evaluate --paths paths.json:NAME --max-drop 2'",
    "--max-loss-increase": "--max-loss-increase was removed here: no certificate was ever given; "
    "give it to 'drllm evaluate' with --max-drop",
    "--worked-answers": "--worked-answers was removed: every comparison says what loss it "
    "excludes; evaluate the task itself, for example --tasks gsm8k",
}
"""The message for each removed flag: why the flag was removed, and what to use instead.

A setting that was removed from YAML files is looked up by its flag."""
