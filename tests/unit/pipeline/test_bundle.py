"""What `bundle` collects from folders, which cards it writes, and what it refuses."""

import dataclasses

import msgspec
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from drllm.errors import ConfigError, ModelError
from drllm.model.cards import CARD_FILE
from drllm.model.submodel import shorten
from drllm.models.routed_model import attach, detach
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import (
    BYPASS_FILE,
    BypassRecord,
    load_bypass_with_record,
    save_bypass,
)
from drllm.pipeline.bundle import bundle, write_gguf
from drllm.prune.export import export
from drllm.records.codec import write_json
from drllm.records.manifest import new_manifest, read_manifest, write_records
from drllm.records.search import read_search
from drllm.records.shortened import SHRINK_FILE, ModelResult, ShrinkRecord, read_shrink
from search_records import make_path, make_record

NUM_LAYERS = 6
SETTINGS = {
    "num_simulations": 30,
    "dataset": "/home/me/mine.jsonl?answer=a,arc_easy",
    "data_dir": "/d",
    "reward": "/home/me/grade.py:right",
    "ray_address": "10.0.0.1:6379",
}


@pytest.fixture
def base(tiny_base):
    return tiny_base(num_layers=NUM_LAYERS)


@pytest.fixture
def searched(tmp_path, base):
    """A folder with the log of a search: of two questions, one has a shorter path that is right."""
    folder = tmp_path / "run"
    folder.mkdir()
    records = [
        make_record(make_path("111111", 1.0), make_path("110111", 1.0, kl=0.5), id="q1"),
        make_record(make_path("111111", 1.0), make_path("101111", 0.0), id="q2"),
    ]
    plan = {"plan": {"settings": SETTINGS}}
    manifest = new_manifest("search", model=base.identity, config=SETTINGS, extra=plan)
    write_records(folder / "search.jsonl", records, manifest)
    return folder


@pytest.fixture
def routers_folder(tmp_path, base):
    hidden_size = base.model.config.hidden_size
    config = RouterConfig(num_layers=NUM_LAYERS, hidden_size=hidden_size)
    save_routers(RouterStack(config), tmp_path / "routers")
    (tmp_path / "routers" / "metrics.jsonl").write_text("{}\n")
    return tmp_path / "routers"


@pytest.fixture
def smaller(tmp_path, base):
    """A checkpoint without two layers."""
    export(shorten(base.model, [2, 3]), base, tmp_path / "smaller")
    return tmp_path / "smaller"


@pytest.fixture
def bypass_folder(tmp_path, base):
    folder = tmp_path / "bypass"
    folder.mkdir()
    size = base.model.config.hidden_size
    bypass = Bypass(
        down=torch.randn(NUM_LAYERS, 2, size),
        up=torch.randn(NUM_LAYERS, size, 2),
        bias=torch.randn(NUM_LAYERS, size),
        first=torch.randn(NUM_LAYERS, size),
    )
    record = BypassRecord(
        model=base.identity,
        texts=("/home/me/texts.jsonl", "builtin_texts"),
        num_tokens=1234,
        unexplained=(0.5,) * NUM_LAYERS,
        made_from={"settings": {"rank": 2, "text": "/home/me/texts.jsonl"}},
    )
    save_bypass(folder / BYPASS_FILE, bypass, record)
    return folder


def write_routers_trained_with(bypass, folder, base):
    """Write routers that name a bypass by its hash."""
    hidden_size = base.model.config.hidden_size
    config = RouterConfig(num_layers=NUM_LAYERS, hidden_size=hidden_size, bypass=bypass.sha256)
    save_routers(RouterStack(config), folder)


def write_shrunken(folder, base):
    """Write a checkpoint as `shrink` does, from files in places of this machine."""
    config = {
        "tasks": "/home/me/mine.jsonl",
        "text": "~/stories.txt,OWNER/SET",
        "data_dir": "/home/me/data",
    }
    models = (
        ModelResult(name="full", layers=tuple(range(NUM_LAYERS)), num_bytes=12),
        ModelResult(name="5", layers=tuple(range(1, NUM_LAYERS)), num_bytes=8),
    )
    record = ShrinkRecord(
        **new_manifest("shrink", model=base.identity, config=config),
        counts={"mine": (9, 3, 3)},
        runtime={},
        models=models,
        chosen="5",
    )
    folder.mkdir()
    (folder / "config.json").write_text('{"kept_layers": [1, 2, 3, 4, 5]}')
    write_json(folder / SHRINK_FILE, record)
    return folder


def test_each_kind_has_a_folder_with_a_card(searched, routers_folder, smaller, base, tmp_path):
    output = tmp_path / "publish"
    artefacts = bundle([searched, routers_folder, smaller], output)
    assert {artefact.kind for artefact in artefacts} == {"search-log", "routers", "checkpoint"}
    assert {folder.name for folder in output.iterdir()} == {name.kind for name in artefacts}
    for artefact in artefacts:
        assert (artefact.folder / CARD_FILE).read_text().startswith("---\n")


def test_routers_come_without_what_else_a_training_leaves(routers_folder, base, tmp_path):
    [artefact] = bundle([routers_folder], tmp_path / "publish")
    assert not (artefact.folder / "metrics.jsonl").exists()
    detach(attach(base, artefact.folder))


def test_a_bypass_comes_with_what_it_was_fitted_on_but_no_place(bypass_folder, base, tmp_path):
    [artefact] = bundle([bypass_folder], tmp_path / "publish")
    bypass, record = load_bypass_with_record(artefact.folder)
    assert bypass.sha256 == load_bypass_with_record(bypass_folder)[0].sha256
    assert record.texts == ("texts.jsonl", "builtin_texts")
    assert record.made_from["settings"] == {"rank": 2, "text": "texts.jsonl"}
    card = (artefact.folder / CARD_FILE).read_text()
    assert "1,234 tokens of texts.jsonl, builtin_texts" in card
    assert "/home/me" not in card
    detach(attach(base, bypass=artefact.folder))


def test_routers_that_need_a_bypass_are_published_beside_it(bypass_folder, base, tmp_path):
    bypass, _ = load_bypass_with_record(bypass_folder)
    write_routers_trained_with(bypass, tmp_path / "routers", base)
    artefacts = bundle([tmp_path / "routers", bypass_folder], tmp_path / "publish")
    folders = {artefact.kind: artefact.folder for artefact in artefacts}
    card = (folders["routers"] / CARD_FILE).read_text()
    assert 'bypass="bypass.safetensors"' in card
    detach(attach(base, folders["routers"], bypass=folders["bypass"]))


def test_routers_that_need_a_bypass_are_refused_without_it(bypass_folder, base, tmp_path):
    bypass, record = load_bypass_with_record(bypass_folder)
    write_routers_trained_with(bypass, tmp_path / "routers", base)
    with pytest.raises(ConfigError, match="trained with a bypass"):
        bundle([tmp_path / "routers"], tmp_path / "publish")
    other = dataclasses.replace(bypass, bias=bypass.bias + 1)
    save_bypass(bypass_folder / BYPASS_FILE, other, record)
    with pytest.raises(ConfigError, match="another bypass"):
        bundle([tmp_path / "routers", bypass_folder], tmp_path / "publish")
    assert not (tmp_path / "publish").exists()


def test_the_log_of_a_search_is_a_data_set_and_is_read_again(searched, tmp_path):
    datasets = pytest.importorskip("datasets")
    [artefact] = bundle([searched], tmp_path / "publish")
    assert read_search(artefact.folder / "search.jsonl") == read_search(searched / "search.jsonl")
    rows = datasets.load_dataset(
        str(artefact.folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["id"] for row in rows] == ["q1", "q2"]
    assert rows[0]["paths"][1]["decisions"] == [1, 1, 0, 1, 1, 1]


def test_the_card_of_a_search_counts_what_is_in_it(searched, tmp_path):
    [artefact] = bundle([searched], tmp_path / "publish")
    card = (artefact.folder / CARD_FILE).read_text()
    assert "- 2 questions: facts (2)." in card
    assert "right on 2 questions. On 1 a path with fewer executions is right" in card
    assert "`num_simulations` 30" in card


NASTY = "<img src=x onerror=alert(1)> [c](javascript:alert(1)) | `x` \x1b[31m"


def list_markup(text):
    """Return the HTML and the links of a Markdown text, and its raw control characters."""
    markup = {"html_block", "html_inline", "link_open", "image"}
    tokens = MarkdownIt().parse(text)
    for token in list(tokens):
        tokens += token.children or ()
    found = [token.content or str(token.attrs) for token in tokens if token.type in markup]
    return found + [character for character in text if character < " " and character != "\n"]


def test_no_text_of_a_record_becomes_markup_in_a_card(searched, base, tmp_path):
    records = read_search(searched / "search.jsonl")
    nasty = [msgspec.structs.replace(record, task=NASTY, reward=NASTY) for record in records]
    identity = {**base.identity, "id": NASTY, "class": NASTY, "revision": NASTY}
    manifest = new_manifest("search", model=identity, config={"strategy": NASTY})
    write_records(searched / "search.jsonl", nasty, manifest)
    [artefact] = bundle([searched], tmp_path / "publish")
    _, _, body = (artefact.folder / CARD_FILE).read_text().split("---\n", 2)
    assert list_markup(body) == []
    assert "javascript" in body  # it is shown


def test_no_place_of_this_machine_is_published(searched, tmp_path):
    [artefact] = bundle([searched], tmp_path / "publish")
    manifest = read_manifest(artefact.folder / "search.jsonl", "search")
    assert manifest["config"] == {
        "num_simulations": 30,
        "dataset": "mine.jsonl?answer=a,arc_easy",
        "reward": "grade.py:right",
    }
    assert not any("/home/me" in file.read_text() for file in artefact.folder.iterdir())


def test_a_reward_is_published_without_the_folder_of_its_file(searched, tmp_path):
    reward = "/home/me/grade.py:right@0123456789abcdef"
    manifest = read_manifest(searched / "search.jsonl", "search")
    records = [
        msgspec.structs.replace(record, reward=reward)
        for record in read_search(searched / "search.jsonl")
    ]
    write_records(searched / "search.jsonl", records, manifest)
    [artefact] = bundle([searched], tmp_path / "publish")
    published = read_search(artefact.folder / "search.jsonl")
    assert {record.reward for record in published} == {"grade.py:right@0123456789abcdef"}
    assert not any("/home/me" in file.read_text() for file in artefact.folder.iterdir())


def test_routers_name_no_folder_of_their_model_and_rewards(base, tmp_path):
    config = RouterConfig(
        num_layers=NUM_LAYERS,
        hidden_size=base.model.config.hidden_size,
        base_model="/home/me/llama",
        training={"rewards": ["/home/me/grade.py:right@0123456789abcdef", "letter"]},
    )
    save_routers(RouterStack(config), tmp_path / "routers")
    [artefact] = bundle([tmp_path / "routers"], tmp_path / "publish")
    published = load_routers(artefact.folder).config
    assert published.base_model == "llama"
    assert published.training["rewards"] == ["grade.py:right@0123456789abcdef", "letter"]


def test_a_log_names_no_folder_of_its_model(searched, tmp_path):
    file = searched / "search.jsonl"
    manifest = read_manifest(file, "search")
    manifest["model"] = {**manifest["model"], "id": "/home/me/llama"}
    write_records(file, read_search(file), manifest)
    [artefact] = bundle([searched], tmp_path / "publish")
    assert read_manifest(artefact.folder / "search.jsonl", "search")["model"]["id"] == "llama"
    assert not any("/home/me" in file.read_text() for file in artefact.folder.iterdir())


def test_the_record_of_a_shrunken_checkpoint_names_no_place(base, tmp_path):
    smaller = write_shrunken(tmp_path / "smaller", base)
    [artefact] = bundle([smaller], tmp_path / "publish")
    record = read_shrink(artefact.folder / SHRINK_FILE)
    assert record.config["tasks"] == "mine.jsonl"
    assert record.config["text"] == "stories.txt,OWNER/SET"
    assert "data_dir" not in record.config
    assert "/home/me" not in (artefact.folder / SHRINK_FILE).read_text()


def test_a_checkpoint_is_not_bundled_into_itself(base, tmp_path):
    smaller = write_shrunken(tmp_path / "smaller", base)
    before = sorted(smaller.iterdir())
    with pytest.raises(ConfigError, match="inside"):
        bundle([smaller], smaller / "publish")
    assert sorted(smaller.iterdir()) == before


def test_a_log_without_a_manifest_says_that_its_settings_are_unknown(searched, tmp_path):
    (searched / "search.manifest.json").unlink()
    [artefact] = bundle([searched], tmp_path / "publish")
    assert "nothing is known of the settings" in (artefact.folder / CARD_FILE).read_text()


def test_what_is_missing_or_there_twice_is_refused(searched, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has nothing to publish"):
        bundle([tmp_path / "empty"], tmp_path / "publish")
    with pytest.raises(ConfigError, match="both of the kind 'search-log'"):
        bundle([searched, searched], tmp_path / "publish")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="isn't empty"):
        bundle([searched], tmp_path / "full")
    assert not (tmp_path / "publish").exists()


CONVERTER = """
import pathlib, sys
assert pathlib.Path(sys.argv[1], "config.json").is_file()
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes(b"GGUF")
"""


def test_a_link_in_a_checkpoint_is_refused_and_what_it_leads_to_is_not_published(base, tmp_path):
    source = write_shrunken(tmp_path / "smaller", base)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (source / "notes.txt").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"notes\.txt.* is a link"):
        bundle([source], tmp_path / "publish")
    assert not (tmp_path / "publish").exists()


def test_the_checkpoint_is_converted_by_the_converter_of_llama_cpp(smaller, base, tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    artefacts = bundle([smaller], tmp_path / "publish", llama_cpp=tmp_path)
    folder = {artefact.kind: artefact.folder for artefact in artefacts}["checkpoint-gguf"]
    assert [file.name for file in folder.glob("*.gguf")] == ["model-bf16.gguf"]
    card = (folder / CARD_FILE).read_text()
    assert "model-bf16.gguf" in card
    assert "4 of 6 layers" in card  # the checkpoint's own card is in it
    assert ModelCard(card).data.library_name == "gguf"


def test_a_gguf_file_names_the_base_model_of_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    front = "base_model: owner/name\nbase_model_relation: merge\nlicense: mit"
    (checkpoint / CARD_FILE).write_text(f"---\n{front}\n---\n\n# A path\n")
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(CONVERTER)
    write_gguf(checkpoint, tmp_path / "gguf", converter)
    data = ModelCard.load(tmp_path / "gguf" / CARD_FILE).data
    assert (data.base_model, data.base_model_relation, data.license) == (
        "owner/name",
        "merge",
        "mit",
    )


def test_a_converter_that_fails_leaves_nothing(smaller, base, tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    with pytest.raises(ModelError, match="no such architecture"):
        bundle([smaller], tmp_path / "publish", llama_cpp=tmp_path)
    assert not (tmp_path / "publish").exists()
    with pytest.raises(ConfigError, match=r"has no convert_hf_to_gguf\.py"):
        bundle([smaller], tmp_path / "publish", llama_cpp=tmp_path / "none")


def test_layers_of_different_kinds_are_not_converted(tiny_base, tiny_model, tmp_path):
    gemma = tiny_base(tiny_model("gemma3_text"))
    assert len(set(gemma.model.config.layer_types)) == 2
    export(shorten(gemma.model, [2, 3]), gemma, tmp_path / "smaller")
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    with pytest.raises(ConfigError, match="layer_types in"):
        bundle([tmp_path / "smaller"], tmp_path / "publish", llama_cpp=tmp_path)
    assert not (tmp_path / "publish").exists()


def test_the_command_says_what_it_made(drllm, searched, tmp_path):
    output = drllm("bundle", searched, "--output-dir", tmp_path / "publish").out
    assert "search-log" in output
    assert f"hf upload OWNER/NAME {tmp_path / 'publish' / 'search-log'}" in output


def test_the_command_at_the_end_of_a_bundle_can_be_pasted(drllm, searched, tmp_path):
    output = drllm("bundle", searched, "--output-dir", tmp_path / "to publish").out
    assert f"hf upload OWNER/NAME '{tmp_path / 'to publish' / 'search-log'}'" in output
