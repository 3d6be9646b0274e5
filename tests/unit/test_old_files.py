"""What commit 3820ce17 wrote and this version no longer reads is refused in one line."""

import itertools
import json

import pytest

from drllm.errors import RecordError
from drllm.models.routing.routed_model import RoutedModel
from drllm.records.removed import OLD_VERSION

MENU = {
    "schema": "drllm.menu",
    "schema_version": 2,
    "drllm_version": "0.1.0.dev0",
    "created": "2026-11-29T10:00:00+00:00",
    "model": {"id": "owner/name", "num_layers": 6},
    "tasks": ["arc_easy", "gsm8k"],
    "reads_at": 2,
    "price": 0.1,
}

READERS = (
    "show {}",  # which goes by a file's name
    "generate --path {} hello",
    "heal --path {} --tasks builtin_facts",
    "evaluate --paths {} --tasks builtin_facts",
    "export --path {} --output smaller/",
)
PLACES = ("menu", "menu/menu.json", "menu/plan.json")


@pytest.fixture
def menu(tmp_path):
    file = tmp_path / "menu" / "menu.json"
    file.parent.mkdir()
    file.write_text(json.dumps(MENU), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("command", "place"),
    [*itertools.product(READERS, PLACES[:2]), *itertools.product(READERS[1:], PLACES[2:])],
)
def test_a_menu_is_refused_in_one_line_that_names_the_version(
    drllm, menu, command, place, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    menu.with_name("plan.json").write_bytes(menu.read_bytes())
    answer = " ".join(drllm(command.format(place), status=2).err.split())
    assert OLD_VERSION in answer
    assert "is a menu" in answer


def test_a_menu_is_no_routed_model(menu):
    with pytest.raises(RecordError, match="is a menu"):
        RoutedModel.from_pretrained(menu.parent)
