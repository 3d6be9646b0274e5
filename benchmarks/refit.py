"""How much of the loss of left-out layers a refit takes back, on texts that nothing was fitted on.

Each file of `--text` has one kind of text. The layers are chosen and refitted on these files, and
the next-token loss is measured on the files of `--held-out`. Layers that are given by `--skip` are
refitted beside those that are chosen. Finished rows are kept in the output folder.

    python benchmarks/refit.py --text FILE,... --held-out FILE,... --layers 25,20,15 \
        --skip 13-15/14-18
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean

from common import add_model, base_of, parser_of
from common.compare import average_kinds
from common.texts import read_kinds, refuse_fitted_texts

from drllm.config import GapsConfig, LearnConfig
from drllm.model.submodel import shorten
from drllm.prune.choose import choose_layers
from drllm.prune.repairs.base import REPAIRS, Lessons
from drllm.prune.states import measure_text_losses
from drllm.records.codec import read_json, write_json
from drllm.records.gaps import GapsRecord, parse_layers, read_gaps
from drllm.tasks.parts import PARTS, Questions
from drllm.tasks.texts import read_texts
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
    listener = Listener()
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    measured = read_kinds(options.held_out, base, MAX_TOKENS)
    for kind, texts in measured.items():
        measured[kind] = texts[: 4 if options.quick else NUM_TEXTS]
    refuse_fitted_texts(read_kinds(options.text, base, MAX_TOKENS), measured)

    parts: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
    for kind, all_texts in read_texts(options.text, None, 0).items():
        num_checked = min(NUM_CHECKED, len(all_texts) // 4)
        parts["check"][kind] = all_texts[:num_checked]
        parts["fit"][kind] = all_texts[num_checked:]
    questions = Questions((), dict.fromkeys(PARTS, ()), parts)
    lessons = Lessons.read(base, questions, MAX_TOKENS, listener)

    paths_file = folder / "paths.json"
    if not paths_file.exists():
        numbers = [base.num_layers - int(word) for word in options.layers.split(",") if word]
        config = GapsConfig(refit_tokens=1_000 if options.quick else 10_000)
        record: GapsRecord = choose_layers(base, lessons, numbers, config, listener)
        write_json(paths_file, record)
    skips = [path.skip for path in read_gaps(paths_file).paths]
    skips += [tuple(sorted(parse_layers(words))) for words in options.skip.split("/") if words]

    refit = REPAIRS.get("refit")(
        LearnConfig(refit_tokens=1_000 if options.quick else options.tokens)
    )
    full = {kind: measure_text_losses(base.model, texts) for kind, texts in measured.items()}
    print("full · " + " · ".join(f"{kind} {fmean(values):.3f}" for kind, values in full.items()))
    figures = {}
    for skip in dict.fromkeys(skips):
        name = ",".join(map(str, skip))
        file = folder / f"{name}.json"
        if not file.exists():
            model = shorten(base.model, skip)
            losses = {}
            for way in ("plain", "refit"):
                if way == "refit":
                    with tempfile.TemporaryDirectory() as work:
                        refit.fit(model, base.model, lessons, Path(work), listener)
                losses[way] = {
                    kind: measure_text_losses(model, texts) for kind, texts in measured.items()
                }
            write_json(file, losses)
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
