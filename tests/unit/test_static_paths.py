"""`paths.json`: which of its paths is meant, and for which model."""

import json
import shutil
from pathlib import Path

import pytest

from drllm.errors import PathError, RecordError
from drllm.records.healed import read_healed
from drllm.records.static_paths import load_path, read_path_list, read_paths, split_path_list
from paths_json import PATHS, written_paths

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = {"id": "owner/name", "revision": None, "class": "LlamaForCausalLM", "num_layers": 6}
MODEL |= {"hidden_size": 32, "fingerprint": "0123456789abcdef"}


def test_a_path_is_found_by_its_name(tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL)
    assert load_path(f"{file}:4.00").path_for(MODEL).layers == tuple(PATHS["4.00"])
    with pytest.raises(PathError, match=r"did you mean '4\.00'"):
        load_path(f"{file}:4.0")


def test_without_a_name_the_names_are_listed(tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL)
    for read in (load_path, lambda given: read_path_list(given, needs_names=True)):
        with pytest.raises(PathError, match=r"name one of them.*: full, 5\.00, 4\.00, again"):
            read(str(file))
    assert list(read_path_list(str(file))) == ["5.00", "4.00", "again"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"tasks": ["arc_easy", "renamed"]},
            "'tasks' names 'renamed', and 'objective' has",
        ),
        (
            {"objective": {"arc_easy": "x"}, "tasks": ["arc_easy"]},
            "'objective' of 'arc_easy' is 'x'",
        ),
        ({"num_layers": 10**30}, r"expected .* \(at `num_layers`\)"),
        ({"runtime": {"device": 3}}, "'device' of 'runtime' is 3"),
        ({"num_layers": 5}, "path 'full': 5 at position 5 of the path"),
        ({"refit_tokens": -1}, r"expected `int` >= 0 \(at `refit_tokens`\)"),
    ],
)
def test_a_file_whose_parts_do_not_fit_each_other_is_refused_in_one_line(tmp_path, changes, said):
    file = written_paths(tmp_path / "paths.json", MODEL)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(RecordError, match=rf"paths\.json: {said}"):
        load_path(f"{file}:5.00")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"executions": 4.5}, r"path '5\.00': 'executions' is 4\.5, the steps cost 5"),
        ({"steps": []}, r"path '5\.00': the path is empty"),
        ({"steps": [{"layer": -1}]}, r"expected `int` >= 0 \(at `paths\[1\]\.steps\[0\]\.layer`\)"),
        ({"name": "full"}, "path 'full' is there twice"),
    ],
)
def test_a_path_whose_parts_do_not_fit_each_other_is_refused_in_one_line(tmp_path, changes, said):
    file = written_paths(tmp_path / "paths.json", MODEL)
    values = json.loads(file.read_text())
    values["paths"][1] |= changes
    file.write_text(json.dumps(values))
    with pytest.raises(RecordError, match=rf"paths\.json: {said}"):
        read_paths(file)


def test_a_file_of_another_kind_is_not_read_as_paths(tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL)
    file.write_text(file.read_text().replace("drllm.paths", "drllm.menus"))
    with pytest.raises(RecordError, match=r"schema 'drllm\.menus'; expected 'drllm\.paths'"):
        read_paths(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": [{"layer": 0}, {"layer": 9}]}, "path 'skip1': 9 at position 1 of the path"),
        ({"executions": 2.0}, "path 'skip1': 'executions' is 2, the steps cost 3"),
        ({"schema": "drllm.path"}, r"schema 'drllm\.path'; expected 'drllm\.healed_path'"),
    ],
)
def test_a_healed_path_whose_parts_do_not_fit_each_other_is_refused(tmp_path, changes, said):
    shutil.copytree(FIXTURES / "3820ce17" / "healed", tmp_path / "healed")
    file = tmp_path / "healed" / "path.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(RecordError, match=rf"path\.json.* {said}"):
        read_healed(file)


def test_a_file_of_a_newer_version_is_answered_by_its_version_alone(tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL)
    file.write_text(file.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    for given in (str(file), f"{file}:5.00"):
        with pytest.raises(RecordError, match=r"schema version 99.*install a newer") as caught:
            load_path(given)
        assert "decisions" not in str(caught.value)


def test_a_name_that_stands_in_several_files_comes_behind_that_of_the_folder_or_file(tmp_path):
    few, one = {name: PATHS[name] for name in ("5.00", "4.00")}, {"5.00": PATHS["5.00"]}
    files = [
        written_paths(tmp_path / "arc" / "paths.json", MODEL, paths=few),
        written_paths(tmp_path / "facts" / "paths.json", MODEL, paths=one),
        written_paths(tmp_path / "more.json", MODEL, paths=one),
    ]
    found = read_path_list(",".join(map(str, files)))
    assert list(found) == ["arc:5.00", "4.00", "facts:5.00", "more:5.00"]
    assert [path.file for path in found.values()] == [files[0], *files]
    with pytest.raises(PathError, match=r"'5\.00' is there twice"):
        read_path_list(f"{files[0]},{files[0]}:5.00")


def test_a_list_may_name_a_folder_with_a_comma(tmp_path):
    folder = tmp_path / "small,v2"
    folder.mkdir()
    file = written_paths(folder / "paths.json", MODEL)
    assert list(read_path_list([f"{file}:4.00"])) == ["4.00"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"num_layers": 5}, r"num_layers 6 \(this model has 5\)"),
        ({"hidden_size": 64}, r"hidden_size 32 \(this model has 64\)"),
        ({"class": "GPT2LMHeadModel"}, "class LlamaForCausalLM"),
        ({"fingerprint": "f" * 16}, "fingerprint 0123456789abcdef"),
        ({"fingerprint": "", "id": "owner/other"}, r"id owner/name \(this model has owner/other\)"),
    ],
)
def test_paths_of_another_model_are_refused_in_one_line(tmp_path, other, said):
    file = written_paths(tmp_path / "paths.json", MODEL)
    with pytest.raises(PathError, match=f"paths of owner/name with .*{said}") as caught:
        load_path(f"{file}:5.00").path_for({**MODEL, **other})
    assert "\n" not in str(caught.value)


def test_the_same_weights_under_another_name_are_the_same_model(tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL)
    load_path(f"{file}:5.00").path_for({**MODEL, "id": "models/copy", "revision": "abc"})


@pytest.mark.parametrize(
    "place",
    ["without:1,2,4", "without: 4, 1-2", "without 1,2,4", "without:1 - 2,2,4", " without:1,2,4 "],
)
def test_a_path_may_be_given_as_layers_to_leave_out(place):
    path = load_path(place)
    assert path.name == "without 1,2,4"
    assert path.path_for(MODEL).layers == (0, 3, 5)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("without:3", "without 3"),
        ("without:13,14", "without 13,14"),
        ("without:15,13,14,3,20,21", "without 3,13-15,20,21"),
        ("without:0-2,4-6", "without 0-2,4-6"),
    ],
)
def test_three_layers_or_more_in_a_row_are_a_range_in_the_name(place, name):
    assert load_path(place).name == name
    assert load_path(name).skipped == load_path(place).skipped


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("without:", "'' isn't a layer; .* without:13-15"),
        ("without:1,x", "'x' isn't a layer"),
        ("without:-1", "'-1' isn't a layer"),
        ("without:4-2", "'4-2' is an empty range"),
        ("without:1,6", "the model has no layer 6; give layers from 0 to 5"),
        ("without:0-5", "all layers are left out"),
    ],
)
def test_layers_that_cannot_be_left_out_are_refused_in_one_line(place, said):
    with pytest.raises(PathError, match=f"^{place}: .*{said}") as caught:
        load_path(place).path_for(MODEL)
    assert "\n" not in str(caught.value)


def test_layers_to_leave_out_may_stand_in_a_list_beside_files(tmp_path):
    file = written_paths(tmp_path / "paths.json", MODEL)
    places = f"without:1,2,{file}:4.00, without:3-4 ,5"
    assert split_path_list(places) == ["without:1,2", f"{file}:4.00", "without:3-4,5"]
    assert list(read_path_list(places)) == ["without 1,2", "4.00", "without 3-5"]
    with pytest.raises(PathError, match="'without 1,2' is there twice"):
        read_path_list("without:1,2,without:2,1")


def test_a_name_that_the_system_refuses_is_answered_in_one_line():
    for read in (load_path, read_path_list):
        with pytest.raises(RecordError, match=r"can't read x*: File name too long"):
            read("x" * 300)
