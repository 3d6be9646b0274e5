"""A file that is damaged anywhere is read, or refused in one line that names the file.

The valid files are those that an earlier version wrote, and some that are made here. Changed is a
value, a key or an item of the JSON, or single bytes. Whatever it is, nothing but a `DrllmError` may
come out.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meaning import read_or_refuse
from mutations import change_file

import drllm.cli
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import BypassRecord, load_bypass, save_bypass
from drllm.pipeline.manifest import read_run_manifest
from drllm.pipeline.recipes import read_recipe
from drllm.records.codec import write_json
from drllm.records.healed import read_healed
from drllm.records.latency import read_latency
from drllm.records.manifest import new_manifest
from drllm.records.results import read_results
from drllm.records.search import read_search
from drllm.records.shrink import ShrinkRecord, ShrunkModel, TextScores, read_shrink
from drllm.records.static_paths import load_path, read_paths
from drllm.records.supervision import read_supervision
from drllm.tasks.files import load_source

RECIPES = Path(drllm.cli.__file__).parent / "recipes"
OLD = Path(__file__).parents[1] / "fixtures" / "3820ce17"
SEEDS = range(12)  # of each file; each seed changes another place
MORE_SEEDS = range(12, 180)

Reader = Callable[[Path], object]
READERS: dict[str, tuple[str, Reader]] = {
    "search": ("run/search.jsonl", read_search),
    "search's manifest": ("run/search.manifest.json", lambda f: read_search(f.parent / SEARCH)),
    "supervision": ("run/supervision.jsonl", read_supervision),
    "tuned": ("tuned/paths.json", read_paths),
    "tuned, by name": ("tuned/paths.json", lambda f: load_path(f"{f}:skip1")),
    "healed": ("healed/path.json", read_healed),
    "results": ("run/eval/builtin_facts.json", lambda f: read_results(f.parent)),
    "latency": ("run/eval/latency.json", lambda f: read_latency(f.parent)),
    "run": ("run/run.manifest.json", lambda f: read_run_manifest(f.parent)),
    "recipe": ("own/recipe.yaml", read_recipe),
    "routers": ("run/routers/router_config.json", lambda f: load_routers(f.parent)),
    "weights": ("run/routers/routers.safetensors", lambda f: load_routers(f.parent)),
    "bypass": ("bypass/bypass.safetensors", load_bypass),
    "shrink": ("own/shrink.json", read_shrink),
    "questions": ("own/questions.jsonl", lambda f: load_source(str(f)).examples("search")),
}
"""Name → a valid file, and what reads it."""
REPORTED = (
    *("run/search.jsonl", "run/search.manifest.json", "run/run.manifest.json"),
    *("run/supervision.jsonl", "run/supervision.manifest.json"),
    *("run/routers/router_config.json", "run/routers/metrics.jsonl", "run/routers/layers.json"),
    *("run/eval/builtin_facts.json", "run/eval/samples.jsonl", "run/eval/latency.json"),
    *("tuned/paths.json", "healed/path.json"),
)
"""The files that `drllm report` reads, in folders of which it makes a report."""
IN_FOLDERS = ("results", "latency", "routers", "run")
SHOWN = ("search", "supervision", "tuned", "healed", "shrink", *IN_FOLDERS)
"""What `drllm show` prints: files, and files that it finds in their folder."""
SEARCH = "search.jsonl"


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> Path:
    """A folder with a valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid") / "files"
    shutil.copytree(OLD, folder)
    maps = {"down": (4, 2, 8), "up": (4, 8, 2), "bias": (4, 8), "first": (4, 8)}
    bypass = Bypass(**{name: torch.ones(shape) for name, shape in maps.items()})
    (folder / "bypass").mkdir()
    save_bypass(folder / "bypass" / "bypass.safetensors", bypass, BypassRecord(model={}))
    (folder / "own").mkdir()
    rows = [
        {"question": f"What is {number}?", "choices": ["a", "b"], "answer": number % 2}
        for number in range(12)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "own" / "questions.jsonl").write_text(text)
    write_json(folder / "own" / "shrink.json", make_shrink_record())
    shutil.copy(RECIPES / "demo_full.yaml", folder / "own" / "recipe.yaml")
    return folder


def make_shrink_record() -> ShrinkRecord:
    """Return what a shrink of one candidate found."""
    full = ShrunkModel(name="full", layers=(0, 1, 2), num_bytes=12)
    less = ShrunkModel(
        name="skip1", layers=(0, 2), num_bytes=8, texts={"own": TextScores(loss=2.0)}
    )
    return ShrinkRecord(
        **new_manifest("shrink", model={"num_layers": 3}, config={"minutes": 1.0}),
        tasks=(),
        texts=("own",),
        num_questions={"own": 90},
        num_held_out={"own": 30},
        runtime={},
        questions_sha256="",
        models=(full, less),
    )


def make_damaged(name: str, seed: int, valid_files: Path, folder: Path) -> Path:
    """Change a copy of a valid file, and return the copy."""
    relative, _ = READERS[name]
    copied = folder / f"damaged-{seed}"
    shutil.copytree((valid_files / relative).parent, copied)
    file = copied / Path(relative).name
    change_file(file, random.Random(f"{name} {seed}"))
    return file


def read_damaged(name: str, seed: int, valid_files: Path, folder: Path) -> None:
    """Change a copy of a valid file, and read it."""
    _, read = READERS[name]
    file = make_damaged(name, seed, valid_files, folder)
    read_or_refuse(read, file)


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(name, valid_files):
    relative, read = READERS[name]
    read(valid_files / relative)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(name, valid_files, tmp_path):
    for seed in SEEDS:
        read_damaged(name, seed, valid_files, tmp_path)


def show_damaged(name: str, seed: int, valid_files: Path, folder: Path) -> None:
    """Change a copy of a valid file, and print it by `drllm show`."""
    file = make_damaged(name, seed, valid_files, folder)
    place = file.parent if name in IN_FOLDERS else file
    assert drllm.cli.main(["show", str(place)]) in (0, 2)


@pytest.mark.parametrize("name", SHOWN)
def test_a_damaged_file_is_shown_or_refused(name, valid_files, tmp_path, capsys):
    for seed in SEEDS:
        show_damaged(name, seed, valid_files, tmp_path)


def report_damaged(relative: str, seed: int, valid_files: Path, folder: Path) -> None:
    """Change a copy of a valid file, and report on the folder that holds it, as `drllm report`.

    Every other seed makes a records file one of the user's own, by leaving its manifest out.
    """
    top, *way = Path(relative).parts
    copied = folder / f"reported-{seed}"
    shutil.copytree(valid_files / top, copied)
    file = copied.joinpath(*way)
    change_file(file, random.Random(f"report {relative} {seed}"))
    if file.suffix == ".jsonl" and seed % 2:
        file.with_name(f"{file.stem}.manifest.json").unlink(missing_ok=True)
    assert drllm.cli.main(["report", str(copied)]) in (0, 2)


@pytest.mark.parametrize("relative", REPORTED)
def test_a_damaged_file_is_reported_or_refused(
    relative, valid_files, tmp_path, capsys, monkeypatch
):
    # Drawing takes seconds; the thorough test below draws.
    monkeypatch.setattr("drllm.reporting.stage.draw_png", lambda *_: b"")
    monkeypatch.setattr("drllm.reporting.page.draw_svg", lambda *_, **__: "")
    for seed in SEEDS:
        report_damaged(relative, seed, valid_files, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("relative", REPORTED)
def test_many_more_damaged_files_are_reported_or_refused(relative, valid_files, tmp_path, capsys):
    for seed in MORE_SEEDS:
        report_damaged(relative, seed, valid_files, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHOWN)
def test_many_more_damaged_files_are_shown_or_refused(name, valid_files, tmp_path, capsys):
    for seed in MORE_SEEDS:
        show_damaged(name, seed, valid_files, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", READERS)
def test_many_more_damaged_files_are_read_or_refused(name, valid_files, tmp_path):
    for seed in MORE_SEEDS:
        read_damaged(name, seed, valid_files, tmp_path)
