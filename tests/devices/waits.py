"""Print what a GPU would make drllm wait for, stage by stage, by line of drllm.

    python tests/devices/waits.py [--devices 2] [--layers 6] [--questions 4]

The GPU is pretended (tests/devices/pretended.py), the model is tiny and random. What is counted is
the number of times that the host waits until the device has done all it was told, the number of
copies from one device to another, and the number of operations that the device is told to run; of
the latter two those of transformers and accelerate as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import conftest
import drllm
from devices.pretended import COPY, RUN, Devices, Event, own_waits, placed
from drllm.models.check import make_tiny
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack

TASK = "builtin_facts"
NUM_NEW = 9


def main() -> None:
    """Run the stages one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, choices=(1, 2), default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--questions", type=int, default=4, help="to search and to tune on")
    options = parser.parse_args()
    L, num, tokenizer = options.layers, options.questions, conftest.tiny_tokenizer.__wrapped__()
    model = make_tiny("llama", 3, "sdpa", num_hidden_layers=L)
    config = RouterConfig(
        num_layers=L, hidden_size=model.config.hidden_size, label_counts=[(1, 2, 1)] * L
    )
    with Devices() as devices:
        model = placed(model, options.devices)

        def stage(name: str, run: Callable[[], Any]) -> Any:
            with devices.counting() as events:
                found = run()
            report(name, events)
            return found

        routers = RouterStack(config, torch.Generator().manual_seed(0))
        routed = drllm.attach(model, routers, tokenizer=tokenizer)
        rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [0] * 5 + [20, 21, 22, 23, 24]]
        inputs = {
            "input_ids": torch.tensor(rows, device="cuda:0"),
            "attention_mask": torch.tensor([[1] * 10, [0] * 5 + [1] * 5], device="cuda:0"),
        }

        def generate(num_new: int, **more: Any) -> Any:
            return routed.generate(
                **inputs, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, **more
            )

        stage("a routed prefill of 2 rows", lambda: routed(**inputs))
        stage("a prefill and 1 token", lambda: generate(1))
        stage(f"a prefill and {NUM_NEW} tokens", lambda: generate(NUM_NEW))
        stage(f"{NUM_NEW} tokens, 2 beams", lambda: generate(NUM_NEW, num_beams=2))
        drllm.detach(model)
        shared = {"tokenizer": tokenizer}
        records = stage(
            f"search, {num} questions",
            lambda: drllm.search_paths(model, TASK, limit=num, num_simulations=6, **shared),
        )
        targets = drllm.supervise(records)[:4]
        trained = stage(
            "train, 4 targets, 3 epochs",
            lambda: drllm.train(model, targets, num_epochs=3, gradient_accumulation=1, **shared),
        )
        stage(
            f"tune, {num} questions a part",
            lambda: drllm.tune(model, TASK, num_fit=num, num_judged=num, max_skipped=1, **shared),
        )
        path = drllm.StaticPath([*range(2), *range(3, L)])
        stage(
            "heal, 3 steps",
            lambda: drllm.heal(model, path, TASK, limit=20, steps=3, num_held_out=2, **shared),
        )
        stage(
            "evaluate, 4 questions",
            lambda: drllm.evaluate(
                drllm.attach(model, trained, tokenizer=tokenizer),
                TASK,
                limit=4,
                latency=True,
                latency_rounds=2,
            ),
        )


def report(name: str, events: list[Event]) -> None:
    """Print the waits, copies and operations of a stage."""
    waits = own_waits(events)
    copies, runs = (sum(each.kind == kind for each in events) for kind in (COPY, RUN))
    print(f"{name}: {waits.total()} waits, {copies} copies, {runs} operations")
    for line, num in waits.most_common():
        print(f"  {num:5} {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
