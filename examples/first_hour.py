"""The first hour in one script: attach, search, supervise, train, evaluate, report.

It is small on purpose: 16 questions under 6 simulations teach little, and 12 tell little; the
report says so. What has been done already in the folder is resumed, not done again.

    python examples/first_hour.py [--model smollm2-135m] [--output runs/first_hour]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import drllm

TASK = "builtin_facts"


def main() -> None:
    """Go through all stages, and say after each what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--output", type=Path, default=Path("runs/first_hour"))
    options = parser.parse_args()

    # Attach: the model stays the same object, and follows decisions from now on.
    base = drllm.load(options.model)
    routed = drllm.attach(base)
    inputs = routed.tokenizer("The capital of France is", return_tensors="pt").to(routed.device)
    plan = [1] * routed.num_layers
    plan[routed.num_layers // 2] = 0
    for name, block in {"base": routed.disabled(), "skips a layer": routed.fixed(plan)}.items():
        with block:
            output = routed.generate(**inputs, max_new_tokens=4, do_sample=False)
        print(f"{name}: {routed.tokenizer.decode(output[0])!r}")
    print(f"its route: {drllm.sketch(routed.last_route[0].tolist())}")

    # Search: which layer paths answer a question as the whole model does?
    records = drllm.search_paths(base, TASK, limit=16, num_simulations=6, output_dir=options.output)
    print(f"search: {sum(len(each.paths) for each in records)} paths of {len(records)} questions")

    # Supervise: a target path a question: of those that save, the one closest to the model.
    targets = drllm.supervise(records, output=options.output / "supervision.jsonl")
    print(f"targets: {len(targets)}, of {targets.summary['questions']} questions")

    # Train routers on them, and attach these.
    routers = drllm.train(base, targets, num_epochs=5, output_dir=options.output / "routers")
    routed = drllm.attach(base, routers)
    print(f"routers: {sum(weight.numel() for weight in routers.parameters())} weights")

    # Evaluate on questions that neither search nor training has seen, and report.
    results = drllm.evaluate(
        routed, TASK, limit=12, baselines="none", output_dir=options.output / "eval"
    )
    for system in results[0].systems:
        print(f"{system.name}: {system.accuracy:.0%} right with {system.executions:.1f} executions")
    page, _ = drllm.report(results)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
