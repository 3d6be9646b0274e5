"""How much of the loss of left-out layers a refit takes back, on texts that nothing was fitted on.

Each file of `--text` has one kind of text. The layers are chosen and refitted on these files, and
the next-token loss is measured on the files of `--held-out`. Layers that are given by `--skip` are
refitted beside those that are chosen. Finished rows are kept in the output folder.

    python benchmarks/refit.py --text FILE,... --held-out FILE,... --layers 25,20,15 \
        --skip 13-15/14-18
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from common import add_model, base_of, parser_of
from common.compare import average_kinds
from common.texts import read_kinds, refuse_fitted_texts

from drllm.config import GapsConfig
from drllm.model.submodel import shorten
from drllm.prune.choose import choose_layers
from drllm.prune.loss import make_text_item
from drllm.prune.repairs.base import Lessons
from drllm.prune.repairs.refit import solve_gaps
from drllm.prune.states import measure_text_losses
from drllm.records.codec import read_json, write_json
from drllm.records.gaps import parse_layers, read_gaps
from drllm.work.listener import Listener

MAX_TOKENS = 512
NUM_TEXTS = 100  # of each kind that are measured
NUM_CHECKED = 50  # of each kind that sets of layers are compared on


def main() -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, quick="few texts and tokens")
    add_model(parser)
    parser.add_argument("--text", required=True, help="files of texts to fit on")
    parser.add_argument("--held-out", required=True, help="files of texts to measure on")
    parser.add_argument("--layers", default="25,20,15", help="numbers of layers to keep")
    parser.add_argument("--skip", default="", help="sets of layers to leave out as well, by /")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to refit on")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/refit"))
    options = parser.parse_args()
    base = base_of(options)
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    measured = read_kinds(options.held_out, base, MAX_TOKENS)
    for kind, texts in measured.items():
        measured[kind] = texts[: 4 if options.quick else NUM_TEXTS]
    fitted = read_kinds(options.text, base, MAX_TOKENS)
    refuse_fitted_texts(fitted, measured)
    fit = {}
    check = {}
    for kind, texts in fitted.items():
        items = [make_text_item(text) for text in texts]
        num_checked = min(NUM_CHECKED, len(items) // 4)
        check[kind] = items[:num_checked]
        fit[kind] = items[num_checked:]
    lessons = Lessons(fit, check)

    paths_file = folder / "paths.json"
    if not paths_file.exists():
        numbers = [base.num_layers - int(word) for word in options.layers.split(",") if word]
        config = GapsConfig(refit_tokens=1_000 if options.quick else 10_000)
        write_json(paths_file, choose_layers(base, lessons, numbers, config, Listener()))
    skips = [path.skip for path in read_gaps(paths_file).paths]
    skips += [tuple(sorted(parse_layers(words))) for words in options.skip.split("/") if words]

    def measure(model: Any) -> dict[str, list[float]]:
        """Return the loss of each text, by kind."""
        return {kind: measure_text_losses(model, texts) for kind, texts in measured.items()}

    texts_to_refit_on = lessons.choose_texts(1_000 if options.quick else options.tokens, 0)
    full = measure(base.model)
    print("full · " + " · ".join(f"{kind} {fmean(values):.3f}" for kind, values in full.items()))
    figures = {}
    for skip in dict.fromkeys(skips):
        name = ",".join(map(str, skip))
        file = folder / f"{name}.json"
        if not file.exists():
            model = shorten(base.model, skip)
            plain = measure(model)
            solve_gaps(model, base.model, texts_to_refit_on)
            write_json(file, {"plain": plain, "refit": measure(model)})
        figures[name] = read_json(file, dict[str, dict[str, list[float]]])
        for way, of_kind in figures[name].items():
            rises = {}
            for kind, values in of_kind.items():
                pairs = zip(values, full[kind], strict=True)
                rises[kind] = [short - whole for short, whole in pairs]
            mean, (low, high) = average_kinds(rises)
            words = [f"{len(skip)} out: {name}", f"{way} {mean:+.3f} ({low:+.3f} to {high:+.3f})"]
            words += [f"{kind} {fmean(values):+.3f}" for kind, values in rises.items()]
            print(" · ".join(words), flush=True)
    if options.json:
        write_json(options.json, {"full": full, "rows": figures})


if __name__ == "__main__":
    main()
