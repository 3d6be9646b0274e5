"""What a model gains and loses by its number of layers: refitted, and after learning right answers.

For each number of layers the layers to leave out are chosen, the model is refitted, and LoRA learns
from the same number of question draws; the full model is trained alike. Everything is measured once
on the held-out questions of the tasks, and on texts of other kinds. Finished parts are kept in the
output folder.

    python benchmarks/learning.py --tasks arc_easy,arc_challenge --data-dir DATA \
        --layers 30,25,20,15,12,10 --seeds 0,1,2 --many-seeds 25,15,30 --steps 600
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from statistics import fmean

from common import parser_of

from drllm.config import GapsConfig, LearnConfig
from drllm.model.load import load
from drllm.model.prompts import encode
from drllm.model.submodel import shorten
from drllm.prune.choose import choose_layers
from drllm.prune.learn import learn
from drllm.prune.loss import make_text_item
from drllm.prune.measure import Measurement, measure_model
from drllm.prune.repairs.base import Lessons
from drllm.prune.shrink import compare_accuracy
from drllm.records.codec import read_json, write_json
from drllm.records.gaps import read_gaps
from drllm.tasks.parts import read_questions
from drllm.tasks.texts import read_texts
from drllm.work.listener import Listener

NUM_TEXTS = 100  # of each kind of other text
MAX_TOKENS = 256


class Lines(Listener):
    """Prints notes."""

    def note(self, text: str) -> None:
        """Print a note."""
        print(text, flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, quick="one seed, few steps, few questions drawn")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="builtin_facts")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--layers", default="25,20,15", help="numbers of layers to keep")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--many-seeds", default="", help="numbers of layers that get every seed")
    parser.add_argument("--steps", type=int, default=400, help="of four question draws each")
    parser.add_argument("--text", default="builtin_texts", help="texts of other kinds to measure")
    parser.add_argument("--learn-text", default=None, help="texts given to learning as --text")
    parser.add_argument("--part", default="held out", help="check: leave the held-out part alone")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    steps = 5 if arguments.quick else arguments.steps
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    base = load(arguments.model)
    listener = Lines()
    questions = read_questions(
        LearnConfig(tasks=arguments.tasks, text=arguments.learn_text, data_dir=arguments.data_dir)
    )
    lessons = Lessons.read(base, questions, 512, listener)
    kept = [int(word) for word in arguments.layers.split(",") if word]
    paths_file = folder / "paths.json"
    if not paths_file.exists():
        numbers = [base.num_layers - number for number in kept if number < base.num_layers]
        write_json(paths_file, choose_layers(base, lessons, numbers, GapsConfig(), listener))
    skips = {base.num_layers - len(path.skip): path.skip for path in read_gaps(paths_file).paths}
    skips[base.num_layers] = ()
    others = {}
    for name, texts in read_texts(arguments.text, NUM_TEXTS, 0).items():
        tokens = [encode(base.tokenizer, text)[:MAX_TOKENS] for text in texts]
        others[name] = [make_text_item(text) for text in tokens]

    def measure(name: str, model: object) -> Measurement:
        """Measure a model once: its answers, and the loss of other texts."""
        file = folder / f"{name}.json"
        if not file.exists():
            short = dataclasses.replace(base, model=model)
            tasks = () if arguments.part == "check" else questions.tasks
            measured = measure_model(short, tasks, others, arguments.data_dir, 0, listener)
            write_json(file, measured)
        return read_json(file, Measurement)

    results: dict[str, Measurement] = {"full": measure("full", base.model)}
    seeds = [int(word) for word in arguments.seeds.split(",")]
    for number in sorted(set(kept), reverse=True):
        for seed in seeds if str(number) in arguments.many_seeds.split(",") else seeds[:1]:
            name = f"{number} learned, seed {seed}"
            if not (folder / f"{name}.json").exists():
                started = time.monotonic()
                model = shorten(base.model, skips[number])
                config = LearnConfig(
                    steps=steps,
                    seed=seed,
                    repairs="refit,lora" if skips[number] else "lora",
                )
                if skips[number] and seed == seeds[0]:
                    refit = dataclasses.replace(config, repairs="refit")
                    learn(model, questions, teacher=base, config=refit, listener=listener)
                    results[f"{number} refit"] = measure(f"{number} refit", model)
                    config = dataclasses.replace(config, repairs="lora")
                report = learn(
                    model,
                    questions,
                    teacher=base,
                    config=config,
                    work=folder / f"work-{number}-{seed}",
                    listener=listener,
                )
                report["seconds"] = time.monotonic() - started
                (folder / f"report-{number}-{seed}.json").write_text(json.dumps(report))
                measure(name, model)
            if skips[number]:
                results[f"{number} refit"] = read_json(folder / f"{number} refit.json", Measurement)
            results[name] = read_json(folder / f"{name}.json", Measurement)
    _print(results, base.num_layers)
    if arguments.json:
        figures = {name: _summarise(result) for name, result in results.items()}
        arguments.json.write_text(json.dumps(figures, indent=1))


def _summarise(result: Measurement) -> dict[str, object]:
    """Return the accuracies of each task by each measure, and the mean losses."""
    return {
        "accuracy": {
            task: {measure: fmean(scores) for measure, scores in answers.scores.items()}
            for task, answers in result.tasks.items()
        },
        "losses": {name: fmean(values) for name, values in result.losses.items()},
    }


def _print(results: dict[str, Measurement], num_layers: int) -> None:
    """Print a line for each model: accuracy pooled over tasks, differences, losses of texts."""
    full = list(results["full"].tasks.values())
    trained = results.get(f"{num_layers} learned, seed 0")
    for name, result in results.items():
        answers = list(result.tasks.values())
        parts = [f"{name:22}"]
        for measure in ("acc_norm", "acc"):
            scores = [score for task in answers for score in task.scores.get(measure, [])]
            if scores:
                parts.append(f"{measure} {100 * fmean(scores):5.1f}")
        for title, other in (("full", full), ("trained", trained and [*trained.tasks.values()])):
            if answers and other:
                verdict = compare_accuracy(answers, other, 0)
                low, high = (100 * end for end in verdict.interval)
                parts.append(f"minus {title} {100 * verdict.mean:+.1f} ({low:+.1f} to {high:+.1f})")
        parts += [f"{kind} {fmean(values):.3f}" for kind, values in result.losses.items()]
        print(" · ".join(parts), flush=True)


if __name__ == "__main__":
    main()
