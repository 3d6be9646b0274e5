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
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import conftest
import drllm
from devices.events import COPY, RUN, Event, own_waits
from devices.pretended import Devices, place_model
from drllm.models.check import make_tiny
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack

TASK = "builtin_facts"
NUM_NEW = 9


Run = Callable[[str, Callable[[], Any]], Any]
"""Runs a stage under a name, reports its events and returns its result."""


def main() -> None:
    """Run the stages one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, choices=(1, 2), default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--questions", type=int, default=4, help="to search")
    options = parser.parse_args()
    tokenizer = conftest.tiny_tokenizer.__wrapped__()
    model = make_tiny("llama", 3, "sdpa", num_hidden_layers=options.layers)
    with Devices() as devices:
        model = place_model(model, options.devices)

        def run_stage(name: str, stage: Callable[[], Any]) -> Any:
            with devices.counting() as events:
                result = stage()
            report(name, events)
            return result

        run_generation(model, tokenizer, run_stage)
        routers = run_routing(model, tokenizer, options.questions, run_stage)
        run_shortening(model, tokenizer, run_stage)
        run_evaluation(model, tokenizer, routers, run_stage)


def run_generation(model: Any, tokenizer: Any, run_stage: Run) -> None:
    """Run a routed model's prefill and generation on two rows, one of them padded."""
    L = model.config.num_hidden_layers
    config = RouterConfig(
        num_layers=L, hidden_size=model.config.hidden_size, label_counts=[(1, 2, 1)] * L
    )
    routers = RouterStack(config, torch.Generator().manual_seed(0))
    routed = drllm.attach(model, routers, tokenizer=tokenizer)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [0] * 5 + [20, 21, 22, 23, 24]]
    mask = [[1] * 10, [0] * 5 + [1] * 5]
    inputs = {
        "input_ids": torch.tensor(rows, device="cuda:0"),
        "attention_mask": torch.tensor(mask, device="cuda:0"),
    }

    def generate(num_new: int, num_beams: int = 1) -> Any:
        lengths = {"max_new_tokens": num_new, "min_new_tokens": num_new}
        return routed.generate(**inputs, **lengths, num_beams=num_beams, do_sample=False)

    run_stage("a routed prefill of 2 rows", lambda: routed(**inputs))
    run_stage("a prefill and 1 token", lambda: generate(1))
    run_stage(f"a prefill and {NUM_NEW} tokens", lambda: generate(NUM_NEW))
    run_stage(f"{NUM_NEW} tokens, 2 beams", lambda: generate(NUM_NEW, num_beams=2))
    drllm.detach(model)


def run_routing(model: Any, tokenizer: Any, num_questions: int, run_stage: Run) -> Any:
    """Search and train; return the trained routers."""
    records = run_stage(
        f"search, {num_questions} questions",
        lambda: drllm.search_paths(
            model, TASK, limit=num_questions, num_simulations=6, tokenizer=tokenizer
        ),
    )
    targets = drllm.supervise(records)[:4]
    return run_stage(
        "train, 4 targets, 3 epochs",
        lambda: drllm.train(
            model, targets, num_epochs=3, gradient_accumulation=1, tokenizer=tokenizer
        ),
    )


def run_shortening(model: Any, tokenizer: Any, run_stage: Run) -> None:
    """Measure the gaps of the model, leave a layer out, refit the model and teach it."""
    texts = ["Water boils when it is hot enough.", "Iron is heavier than wood."] * 6
    run_stage("gaps, 12 texts", lambda: drllm.gap_costs(model, texts, tokenizer=tokenizer))
    for name, minutes in (("a refit", 0), ("a refit, and learning for a second", 1 / 60)):
        small = drllm.shorten(model, skip=[2])
        settings = {"minutes": minutes, "rank": 2, "refit_tokens": 200, "tokenizer": tokenizer}
        learn = partial(drllm.learn, small, TASK, teacher=model, **settings)
        run_stage(name, learn)


def run_evaluation(model: Any, tokenizer: Any, routers: Any, run_stage: Run) -> None:
    """Evaluate trained routers."""
    run_stage(
        "evaluate, 4 questions",
        lambda: drllm.evaluate(
            drllm.attach(model, routers, tokenizer=tokenizer),
            TASK,
            limit=4,
            latency=True,
            latency_rounds=2,
        ),
    )


def report(name: str, events: list[Event]) -> None:
    """Print the waits, copies and operations of a stage."""
    waits = own_waits(events)
    num_copies = sum(event.kind == COPY for event in events)
    num_runs = sum(event.kind == RUN for event in events)
    print(f"{name}: {waits.total()} waits, {num_copies} copies, {num_runs} operations")
    for line, num in waits.most_common():
        print(f"  {num:5} {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
