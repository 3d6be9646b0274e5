"""All stages in one script: attach, search, supervise, train, evaluate, report.

It is small on purpose: routers learn little from 16 questions, and 12 test questions show little,
as the report will say. Run again, it resumes from the files in the output folder.

    python examples/first_hour.py [--model smollm2-135m] [--output-dir runs/first_hour]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import drllm

TASK = "builtin_facts"


def main() -> None:
    """Run all stages, and print a line of results after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/first_hour"))
    options = parser.parse_args()

    # Attach: the model stays the same object, but runs the layers that are chosen from now on.
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

    # Search: which layer paths answer each question as well as the whole model?
    records = drllm.search_paths(
        base, TASK, limit=16, num_simulations=6, output_dir=options.output_dir
    )
    num_paths = sum(len(record.paths) for record in records)
    print(f"search: {num_paths} paths of {len(records)} questions")

    # Supervise: choose a target path per question, the saving one closest to the whole model.
    targets = drllm.supervise(records, output_dir=options.output_dir)
    print(f"targets: {len(targets)}, of {targets.summary['questions']} questions")

    # Train routers on the targets, and attach them.
    routers = drllm.train(base, targets, num_epochs=5, output_dir=options.output_dir / "routers")
    routed = drllm.attach(base, routers)
    print(f"routers: {sum(weight.numel() for weight in routers.parameters())} weights")

    # Evaluate on questions that neither the search nor the training has seen, and report.
    results = drllm.evaluate(
        routed, TASK, limit=12, baselines="none", output_dir=options.output_dir / "eval"
    )
    for system in results[0].systems:
        print(f"{system.name}: {system.accuracy:.0%} right with {system.executions:.1f} executions")
    print(f"what to do: {results[0].headline}")
    page, _ = drllm.report(results)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
