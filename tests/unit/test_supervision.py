import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.cli import main
from drllm.config import SearchConfig, SuperviseConfig
from drllm.errors import ConfigError, RecordError
from drllm.paths import Decision
from drllm.records.codec import read_json_lines, sha256
from drllm.records.manifest import manifest_path, new_manifest, write_records
from drllm.records.search import Retest, SearchRecord, SearchRecords, TriedPath
from drllm.records.supervision import (
    RejectedQuestion,
    SupervisionRecord,
    read_supervision,
    rejected_path,
)
from drllm.supervision.rules import REASONS, TARGETS, find_candidates
from drllm.supervision.select import (
    check_settings,
    find_surplus,
    pick_targets,
    read_quotas,
    supervise,
    supervise_to_file,
)
from drllm.supervision.summary import edit_effects, summarise
from search_records import make_path, make_record

SHORTEST = SuperviseConfig(target="shortest")

MODEL = {
    "id": "some/model",
    "revision": "abc",
    "class": "LlamaForCausalLM",
    "num_layers": 4,
    "hidden_size": 32,
    "fingerprint": "0123456789abcdef",
}
PATH = re.compile(r"([012]+)(!?)(-|\+(?:none|[-.0-9]*))?(?:~([.0-9]+))?")
BAD = Retest(passed=1, asked=4, margin=-1.0, survived=False)


def tried(text: str) -> tuple[TriedPath, ...]:
    """Paths from their decisions, the full path first.

    Behind them stands `!` if the answer wasn't right, `-` if the re-test failed, `+` if it was
    survived (with this margin, else 1; the first margin is the opposite), and the KL after `~`.
    """
    found = []
    for word in text.split():
        decisions, is_wrong, again, kl = PATH.fullmatch(word).groups()
        retest = BAD if again == "-" else None
        if again and retest is None:
            margin = None if again == "+none" else float(again[1:] or 1)
            retest = Retest(passed=4, asked=4, margin=margin, survived=True)
        margin = None if retest is None or retest.margin is None else -retest.margin
        reward = 0.9 if is_wrong else 1.0
        found.append(
            make_path(decisions, reward, margin=margin, kl=kl and float(kl), retest=retest)
        )
    return tuple(found)


def record(paths: str, question: str = "What is water?", **fields: Any) -> SearchRecord:
    return make_record(*tried(paths), question=question, **{"id": question, **fields})


def chosen(target: str, paths: str, least: float | None = None) -> str:
    """The decisions that the rule picks, as text, or its reason."""
    found = find_candidates(record(paths), target, min_saving=least)
    return found if isinstance(found, str) else "".join(map(str, found[0].decisions))


CASES = """
shortest        1111+ 1110+ 1100+ 1000- 0001           1100  the fewest executions of survivors
shortest        1111+ 1110+.5 1101+.7 1011+none        1101  then the margin in the re-test
shortest        1111+ 1011+none 1110+-5                1110  no margin comes after a negative one
shortest        1111+ 1101+.5 1110+.5                  1101  then the earlier simulation
shortest        1111+ 1110-                            1111  only right paths that survived
shortest        1111! 1110 1101-                       no path survived the re-test
shortest        1111! 1110!+                           no valid path
largest_margin  1111! 1110+.5 2111+.7 1000+none        2111  whatever the length
largest_margin  1111! 1110+.5 1100+.5                  1100  then the fewer executions
largest_margin  1111+ 1110-                            1111  only right paths that survived
largest_margin  1111! 1110 1101-                       no path survived the re-test
largest_margin  1111! 1110!+                           no valid path
paper           1111 1110 1000-                        1000  the shortest one, re-tested or not
paper           1111 1101+.1 1110+9                    1101  then the earlier simulation
paper           1111 1110 1200                         1200  then the fewer different layers
paper           1111! 1112 0111!                       1112  an improving path may be longer
paper           1111                                   only the full path
paper           1111 2111 2011 0111!                   only the full path
released        1111 2111 0111!                        1111  the full path too
released        1111 1110 1000-                        1000  the shortest right path
released        1111! 1112                             1112  an improving one
released        1111! 1110!                            no valid path
least_kl        1111+~0 1110+~.3 1011!~.1 0111!~.2     1011  whatever the reward
least_kl        1111!~0 1110!~.5 0011!~.5 1100!~.5     0011  then the fewer executions
least_kl        1111!~0 2111!~.01 2011!~.02            no path saves enough
least_kl        1111!~0 1110! 1100!~5                  1100  none without a KL
least_kl        1111 1110                              no KL in the record
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_a_rule_picks_its_target(case):
    target, paths, expected, *_ = re.split(r"\s{2,}", case)
    assert chosen(target, paths) == expected


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0.1, "1111111110"),
        (0.11, "1111111100"),
        (0.3, "1111111000"),
        (0.31, "no path saves enough"),
    ],
)
def test_a_kl_target_saves_the_least_share_or_more(least, expected):
    paths = " ".join(f"{'1' * (10 - n)}{'0' * n}!~0.{n}" for n in range(4))
    assert chosen("least_kl", paths, least=least) == expected


PATHS = "1111+~0 1110+~0.2 1100+~0.7 1000-~2 0001!~3"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("shortest", {"1111", "1110", "1100"}),
        ("largest_margin", {"1111", "1110", "1100"}),
        ("released", {"1111", "1110", "1100", "1000"}),
        ("paper", {"1110", "1100", "1000"}),
        ("least_kl", {"1110", "1100", "1000", "0001"}),
    ],
)
def test_a_rule_picks_from_these_paths(target, expected):
    def found(**settings: float) -> set[str]:
        paths = find_candidates(record(PATHS), target, **settings)
        return {"".join(map(str, path.decisions)) for path in paths}

    assert found() == expected
    if target == "least_kl":
        assert found(min_saving=0.5) == {"1100", "1000", "0001"}


SAVING, IMPROVING, FULL_ONLY = "1111+ 1100+", "1111! 2110+", "1111+"
LUCKY, HOPELESS = "1111! 1110-", "1111! 1110!"


def questions(*kinds: str) -> list[SearchRecord]:
    return [record(paths, question=f"Question {n}?") for n, paths in enumerate(kinds)]


@pytest.mark.parametrize("returned", [[], "too hard"])
def test_a_rule_that_returns_neither_paths_nor_a_known_reason_is_refused(monkeypatch, returned):
    def rule(_):
        return returned

    monkeypatch.setattr(TARGETS, "get", lambda _: rule)
    with pytest.raises(ConfigError, match=f"'own' returned {re.escape(repr(returned))} for quest"):
        find_candidates(record("1111 1101"), "own")


def test_a_target_carries_what_training_needs_and_improves_where_the_full_path_failed():
    target, *others = pick_targets(questions(SAVING, IMPROVING, FULL_ONLY), SHORTEST)
    assert target.question == "Question 0?"
    assert target.prompt == "Q: Question 0?"
    assert target.answer == "wet"
    assert target.optimal_layer_config == (1, 1, 0, 0)
    assert (target.id, target.task) == ("Question 0?", "facts")
    assert (target.executions, target.margin) == (2.0, -1.0)
    assert [each.improving for each in (target, *others)] == [False, True, False]


def test_the_summary_counts_what_the_search_found_and_what_became_of_it():
    found = questions(SAVING, IMPROVING, FULL_ONLY, LUCKY, HOPELESS, HOPELESS)
    paths = {
        "saving_before_retest": 2,
        "saving_after_retest": 1,
        "improving_before_retest": 2,
        "improving_after_retest": 1,
    }
    yields = {"base_correct": 2, "valid_before_retest": 4, "valid_after_retest": 3, **paths}

    assert pick_targets(found, SHORTEST).summary == {
        "questions": 6,
        "copies": 0,
        "targets": 3,
        "rejected": dict.fromkeys(REASONS, 0)
        | {"no valid path": 2, "no path survived the re-test": 1},
        **yields,
        "paths": paths,
        "tasks": {
            "facts": {"questions": 6, "copies": 0, **yields, "targets": 3, "improving_targets": 1}
        },
        "wrong_targets": 0,
        "executions": pytest.approx(10 / 3),
        "class_counts": [3, 8, 1],
        "class_counts_by_layer": [[0, 2, 1], [0, 3, 0], [1, 2, 0], [2, 1, 0]],
    }


def test_targets_that_answer_wrong_are_counted():
    found = questions("1111+~0 1110!~.1 1100+~.2", "1111!~0 1110+~.1", "1111+~0 1110~.1 1100!~.2")
    config = SuperviseConfig(target="least_kl", min_saving=0.1)
    assert pick_targets(found, config).summary["wrong_targets"] == 1


def test_a_target_is_not_wrong_because_a_later_search_of_its_question_graded_otherwise():
    first = record("1111 1100")
    second = record("1111 1100!", reward="exact")
    config = SuperviseConfig(target="released")
    assert pick_targets([first, second], config).summary["wrong_targets"] == 0


def test_the_summary_tells_the_tasks_apart():
    found = [
        record(SAVING, question="a?", task="one"),
        record(IMPROVING, question="b?", task="two"),
        record(HOPELESS, question="c?", task="one"),
    ]
    tasks = pick_targets(found, SHORTEST).summary["tasks"]

    counts = {
        name: (task["questions"], task["base_correct"], task["targets"], task["improving_targets"])
        for name, task in tasks.items()
    }
    assert counts == {"one": (2, 1, 1, 0), "two": (1, 0, 1, 1)}


def test_a_copy_adds_to_no_count_but_that_of_copies():
    found = [
        record(SAVING, question="What is ice?", task="first"),
        record(HOPELESS, question="What is fog?", task="first"),
    ]
    copies = [
        record(IMPROVING, question="  what is\nICE? ", task="second"),
        record(SAVING, question="What is fog?", id="again", task="second"),
        record(SAVING, question="What is fog?", id="again", task="third"),
    ]
    alone = pick_targets(found, SHORTEST).summary
    joined = pick_targets([*found, *copies], SHORTEST).summary

    assert (alone.pop("copies"), joined.pop("copies")) == (0, 3)
    assert joined["tasks"].pop("second") == {
        **dict.fromkeys(joined["tasks"]["first"], 0),
        "copies": 2,
    }
    assert joined["tasks"].pop("third")["copies"] == 1
    assert joined == alone


def test_a_quota_takes_the_first_targets_not_the_first_questions():
    found = questions(HOPELESS, SAVING, SAVING, SAVING)
    supervision = pick_targets(found, replace(SHORTEST, quotas="facts=2"))
    assert [target.id for target in supervision] == ["Question 1?", "Question 2?"]
    assert supervision.reasons[3] == "over the quota"
    assert supervision.summary["tasks"]["facts"]["targets"] == 2


def test_a_copy_of_a_question_takes_no_place_in_a_quota():
    found = [
        record(SAVING, question="a?", task="one"),
        record(SAVING, question="A?", id="copy", task="two"),
        record(SAVING, question="b?", task="two"),
    ]
    supervision = pick_targets(found, replace(SHORTEST, quotas="two=1"))
    assert [target.question for target in supervision] == ["a?", "b?"]


def test_a_quota_for_a_task_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match=r"'fact'.*'facts'"):
        pick_targets(questions(SAVING), replace(SHORTEST, quotas="fact=2"))


def test_the_least_saving_has_no_use_but_for_kl():
    with pytest.raises(ConfigError, match=r"--min-saving 0\.2 has no effect with --target paper"):
        check_settings(SuperviseConfig(target="paper", min_saving=0.2), ["facts"])
    assert check_settings(SuperviseConfig(target="least_kl", min_saving=0.2), ["facts"]) == {}


def test_targets_by_kl_are_refused_before_a_search_that_computes_none():
    config = SuperviseConfig(target="least_kl")
    check_settings(config, ["facts"], SearchConfig())
    with pytest.raises(ConfigError, match=r"needs the KL of paths, which --no-kl leaves out"):
        check_settings(config, ["facts"], SearchConfig(kl=False))


def written(file: Path, *found: SearchRecord, **model: Any) -> Path:
    write_records(file, found, new_manifest("search", model=MODEL | model, config={}))
    return file


def search_file(folder: Path, *kinds: str, name: str = "search.jsonl", **model: Any) -> Path:
    found = [record(paths, question=f"{name} {n}?") for n, paths in enumerate(kinds)]
    return written(folder / name, *found, **model)


def supervised(*sources: Path, **settings: Any) -> Path:
    """Write the targets beside the first source, and return where."""
    output = sources[0].with_name("supervision.jsonl")
    supervise(sources, SuperviseConfig(**{"target": "shortest", **settings}), output.parent)
    return output


def manifest(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest_path(output).read_text())
    return found


def ids(output: Path) -> list[str]:
    return [row.id for row in read_supervision(output)]


def rejected(output: Path) -> list[tuple[str, str, str, str]]:
    """The lines of the file of rejects beside the targets."""
    rows = [row for _, row in read_json_lines(rejected_path(output), RejectedQuestion)]
    return [(row.id, row.task, row.question, row.reason) for row in rows]


def test_targets_are_written_with_a_manifest_of_model_settings_inputs_and_summary(tmp_path):
    source = search_file(tmp_path, SAVING, IMPROVING, HOPELESS)
    output = tmp_path / "new" / "supervision.jsonl"
    config = SuperviseConfig(target="largest_margin")
    found = supervise([source], config, output.parent)

    assert tuple(read_supervision(output)) == tuple(found)
    assert [row.optimal_layer_config for row in found] == [(1, 1, 0, 0), (2, 1, 1, 0)]
    fields = manifest(output)
    assert fields["schema"] == "drllm.supervision"
    assert fields["model"] == MODEL
    assert fields["config"] == config.to_dict()
    assert fields["inputs"] == {"search.jsonl": sha256(source)}
    assert fields["summary"] == found.summary
    assert fields["rewards"] == ["loglikelihood"]


def test_the_manifest_names_the_rewards_of_the_targets_only(tmp_path):
    kinds = {"letter": SAVING, "exact": SAVING, "boxed": HOPELESS}
    found = [record(kinds[name], question=f"{name}?", reward=name) for name in kinds]
    output = supervised(written(tmp_path / "search.jsonl", *found))
    assert manifest(output)["rewards"] == ["exact", "letter"]


def test_every_question_without_a_target_is_written_with_its_reason(tmp_path):
    one = search_file(tmp_path, HOPELESS, SAVING, name="a.jsonl")
    two = written(
        tmp_path / "b.jsonl",
        record(LUCKY, question="b?", id="q1", task="other"),
        record(SAVING, question="A.jsonl  0?", id="q2", task="other"),
    )
    output = tmp_path / "out" / "mine.jsonl"
    supervise_to_file([one, two], SHORTEST, output)

    assert rejected(output) == [
        ("a.jsonl 0?", "facts", "a.jsonl 0?", "no valid path"),
        ("q1", "other", "b?", "no path survived the re-test"),
        ("q2", "other", "A.jsonl  0?", "same question twice"),
    ]
    names = sorted(path.name for path in output.parent.iterdir())
    assert names == ["mine.jsonl", "mine.manifest.json", "mine.rejected.jsonl"]


def test_rejects_are_replaced_with_the_targets_and_go_where_all_have_one(tmp_path):
    source = search_file(tmp_path, SAVING, LUCKY)
    assert len(rejected(supervised(source))) == 1
    output = supervised(source, target="paper", quotas="facts=1")
    assert [reason for *_, reason in rejected(output)] == ["over the quota"]
    supervised(search_file(tmp_path, SAVING, name="b.jsonl"))
    assert not rejected_path(output).exists()


def test_targets_are_never_trusted_before_their_rejects_are_written(tmp_path, monkeypatch):
    output = supervised(search_file(tmp_path, SAVING, name="a.jsonl"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drllm.supervision.select.write_or_remove", killed)
    with pytest.raises(KeyboardInterrupt):
        supervised(search_file(tmp_path, SAVING, LUCKY))

    # The targets are still those of the first search, and so says their manifest.
    assert list(manifest(output)["inputs"]) == ["a.jsonl"]
    assert ids(output) == ["a.jsonl 0?"]


def test_the_manifest_tells_what_became_of_each_file_and_counts_copies_once(tmp_path):
    found = questions(SAVING, HOPELESS, SAVING, SAVING, LUCKY)
    one = written(tmp_path / "a.jsonl", *found[:2])
    two = written(tmp_path / "b.jsonl", found[0], *found[2:])

    counts = {
        name: (
            *(file[each] for each in ("questions", "copies", "targets")),
            {reason: n for reason, n in file["rejected"].items() if n},
        )
        for name, file in manifest(supervised(one, two, quotas="facts=2"))["files"].items()
    }
    assert ids(tmp_path / "supervision.jsonl") == ["Question 0?", "Question 2?"]
    assert list(counts.items()) == [
        ("a.jsonl", (2, 0, 1, {"no valid path": 1})),
        ("b.jsonl", (3, 1, 1, {"no path survived the re-test": 1, "over the quota": 1})),
    ]


def test_the_model_is_what_the_manifests_tell_of_it(tmp_path):
    first, second = (search_file(tmp_path, SAVING, name=name) for name in ("a.jsonl", "b.jsonl"))
    manifest_path(first).unlink()
    assert manifest(supervised(first))["model"] == {"num_layers": 4}
    assert manifest(supervised(first, second))["model"] == MODEL


def test_one_set_of_weights_under_two_ids_is_one_model(tmp_path):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, SAVING, name="b.jsonl", id="local/copy", revision=None)
    assert len(ids(supervised(first, second))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "fedcba9876543210"}, "fingerprint .*fedcba9876543210"),
        ({"class": "Qwen3ForCausalLM"}, "class .*Qwen3ForCausalLM"),
        ({"hidden_size": 64}, "hidden_size 32 and 64"),
    ],
)
def test_files_of_different_base_models_are_refused_naming_both(tmp_path, changes, message):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, SAVING, name="b.jsonl", **changes)
    with pytest.raises(RecordError, match=rf"a\.jsonl and .*b\.jsonl are .*{message}"):
        supervised(first, second)
    assert not (tmp_path / "supervision.jsonl").exists()


def test_without_fingerprints_the_ids_must_agree(tmp_path):
    for name in ("a", "b"):
        found = [record(SAVING, question=name)]
        known = new_manifest("search", model={"id": f"{name}/model"}, config={})
        write_records(tmp_path / f"{name}.jsonl", found, known)
    with pytest.raises(RecordError, match="id 'a/model' and 'b/model'"):
        supervised(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_files_of_different_depths_are_refused_even_without_manifests(tmp_path):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, "111+", name="b.jsonl")
    for file in (first, second):
        manifest_path(file).unlink()
    with pytest.raises(RecordError, match="num_layers 4 and 3"):
        supervised(first, second)


@pytest.mark.parametrize(
    ("kinds", "changes", "message"),
    [
        ((SAVING, "111+"), {}, r"line 2: .* 3 layers, but .* line 1 on 4"),
        ((SAVING,), {"num_layers": 30}, r"paths of 4 layers, but its manifest names .* of 30"),
    ],
)
def test_two_depths_in_one_search_are_refused(tmp_path, kinds, changes, message):
    with pytest.raises(RecordError, match=message):
        supervised(search_file(tmp_path, *kinds, **changes))


def test_single_records_of_two_depths_are_refused():
    deep = record("11111 11011", question="What is ice?")
    with pytest.raises(RecordError, match=r"'What is ice\?' was searched on 5 layers, .* on 4;"):
        supervise([record("1111 1101"), deep], target="released")


def test_single_records_keep_their_place_among_searches():
    first = record("1111 1101")
    copy = SearchRecords.of([record("1111 1110")])
    for searches, expected in (([first, copy], (1, 1, 0, 1)), ([copy, first], (1, 1, 1, 0))):
        [target] = supervise(searches, target="released")
        assert target.optimal_layer_config == expected


def test_two_questions_under_one_id_are_refused(tmp_path):
    files = [
        written(tmp_path / name, record(SAVING, question=f"What is {name}?", id="q1"))
        for name in ("a.jsonl", "b.jsonl")
    ]
    with pytest.raises(RecordError, match="different questions with id 'q1' of task 'facts'"):
        supervised(*files)


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        (
            (LUCKY, HOPELESS, HOPELESS),
            {},
            r"none of the 3 .* \(no valid path: 2, no path survived the re-test: 1\)",
        ),
        (
            (SAVING, IMPROVING),
            {"target": "least_kl"},
            r"no KL in the record: 2\); search again with --kl",
        ),
        (
            ("1111!~0 1110!~.25",),
            {"target": "least_kl", "min_saving": 0.5},
            r"no path saves enough: 1\); .* smaller --min-saving",
        ),
    ],
)
def test_no_target_at_all_is_an_error_that_names_the_reasons_and_leaves_the_old_targets(
    tmp_path, kinds, settings, message
):
    source = search_file(tmp_path, *kinds)
    with pytest.raises(RecordError, match=message):
        supervised(source, **settings)
    assert list(tmp_path.glob("supervision*")) == []
    output = supervised(search_file(tmp_path, SAVING, name="a.jsonl"))
    with pytest.raises(RecordError, match=message):
        supervised(source, **settings)
    assert ids(output) == ["a.jsonl 0?"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.rejected.jsonl"])
def test_a_file_is_not_both_read_and_written(tmp_path, name):
    source = search_file(tmp_path, SAVING, LUCKY, name=name)
    before = source.read_text()
    with pytest.raises(RecordError, match=rf"{name} is both read and written"):
        supervise_to_file([source], SHORTEST, tmp_path / "." / "out.jsonl")
    assert source.read_text() == before


def test_a_file_given_twice_is_refused(tmp_path):
    source = search_file(tmp_path, SAVING)
    with pytest.raises(RecordError, match="given twice"):
        supervised(source, tmp_path / "." / source.name)


def test_what_makes_no_sense_is_refused_before_files_are_read(tmp_path):
    with pytest.raises(ConfigError, match="'facts' isn't a quota"):
        supervised(tmp_path / "gone.jsonl", quotas="facts")
    with pytest.raises(RecordError, match="no search file is given"):
        supervise([], SHORTEST, Path())


def target(letter: str) -> SupervisionRecord:
    """A target from a letter: it is the task, a capital improves."""
    given = {"question": "?", "optimal_layer_config": (1, 1), "answer": "!"}
    return SupervisionRecord(**given, task=letter.lower(), improving=letter.isupper())


def left(text: str, quotas: dict[str, int], share: float | None = None) -> str:
    """What stays of a target a letter, in order; what goes is a dot."""
    gone = find_surplus([*map(target, text)], quotas, share)
    return "".join("." if place in gone else letter for place, letter in enumerate(text))


def test_quotas_are_read_with_or_without_spaces():
    assert read_quotas("arc_easy=400,dart-1=200") == {"arc_easy": 400, "dart-1": 200}
    assert read_quotas(" arc_easy = 400 , dart-1=200 ") == {"arc_easy": 400, "dart-1": 200}
    assert read_quotas(None) == {}


@pytest.mark.parametrize(
    "text", ["", "arc_easy", "arc_easy=", "=3", "a=0", "a=-1", "a=1.5", "a=x", "a=1,"]
)
def test_what_is_no_quota_is_refused_with_the_form_that_is(text):
    with pytest.raises(ConfigError, match=r"isn't a quota; give TASK=COUNT"):
        read_quotas(text)


def test_a_task_named_twice_is_refused():
    with pytest.raises(ConfigError, match="names task 'a' twice"):
        read_quotas("a=1,b=2,a=3")


@pytest.mark.parametrize(
    ("text", "quotas", "stays"),
    [
        ("abaabb", {"a": 2, "b": 1}, "aba..."),  # the first targets of each task
        ("abab", {"a": 1}, "ab.b"),  # a task without a quota keeps all
        ("aab", {"a": 5, "b": 5}, "aab"),  # a quota that is not reached costs nothing
        ("aAb", {}, "aAb"),
    ],
)
def test_a_quota_keeps_the_first_targets_of_its_task(text, quotas, stays):
    assert left(text, quotas) == stays


@pytest.mark.parametrize(
    ("text", "quotas", "share", "stays"),
    [
        # a later improving target takes the place of the first one that doesn't improve,
        ("aaaa" + "AaA", {"a": 4}, 0.25, ".aaa" + "A.."),
        # as many of them as the share wants; none where it is met; as many as there are
        ("aAaa" + "aAAA", {"a": 4}, 0.75, ".A.a" + ".AA."),
        ("aAAA" + "AA", {"a": 4}, 0.5, "aAAA" + ".."),
        ("aaaa" + "aA", {"a": 4}, 0.75, ".aaa" + ".A"),
        # each task has the share of its own quota; one below its quota is left alone
        ("aabb" + "ABBA", {"a": 2, "b": 2}, 0.5, ".a.b" + "AB.."),
        ("aaA", {"a": 4}, 0.75, "aaA"),
        # a task without a quota is thinned by itself; without any, all tasks are together
        ("aAbbbB", {"a": 2}, 0.5, "aAb..B"),
        ("aaBB", {}, 0.5, "aaBB"),
        ("aaaBB", {}, 0.5, "aa.BB"),
        # the last targets that don't improve go, all of them where nothing improves
        ("aaAaA", {}, 0.5, "aaA.A"),
        ("aAa", {}, 0.3, "aAa"),
        ("aAa", {}, 1.0, ".A."),
        ("aa", {}, 0.3, ".."),
    ],
)
def test_a_share_of_the_targets_improves(text, quotas, share, stays):
    assert left(text, quotas, share) == stays


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 1 / 3, 0.7, 0.9])
@pytest.mark.parametrize("improving", [1, 3, 9])
def test_the_share_is_met_with_as_few_drops_as_possible(share, improving):
    stays = 100 + improving - left("a" * 100 + "A" * improving, {}, share).count(".")
    assert improving / stays >= share - 1e-12
    assert improving / (stays + 1) < share or stays == 100 + improving


def published(improving: list[bool], quota: int, share: float) -> set[int]:
    """Go over the targets one by one, as the published script does; return the places that stay."""
    kept: list[int] = []
    for place, better in enumerate(improving):
        if len(kept) < quota:
            kept.append(place)
        elif better:
            worse = [slot for slot, old in enumerate(kept) if not improving[old]]
            if not worse:
                break
            kept[worse[0]] = place
        if len(kept) >= quota and sum(improving[k] for k in kept) / len(kept) >= share:
            break
    return set(kept)


@given(
    st.lists(st.booleans(), max_size=40),
    st.integers(1, 12),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
)
def test_quota_and_share_keep_what_going_one_by_one_would(improving, quota, share):
    kept = [target("A" if better else "a") for better in improving]
    gone = find_surplus(kept, {"a": quota}, share)
    assert set(range(len(kept))) - gone == published(improving, quota, share)


def test_single_edits_are_ranked_by_what_they_change_of_the_reward():
    found = [record("1111 1110! 1011 2111!"), record("1111! 1110 1011", "What is ice?")]
    skips = edit_effects(found, Decision.SKIP, 1)
    assert [(layer, round(change, 9)) for layer, change in skips] == [(1, 0.05), (3, 0.0)]
    assert edit_effects(found, Decision.REPEAT, 2) == []


def test_targets_of_questions_that_no_search_has_are_counted_and_none_is_wrong():
    own = [target("a"), target("B")]
    summary = summarise([], own, {})
    assert (summary["targets"], summary["wrong_targets"]) == (2, 0)
    assert summary["class_counts"] == [0, 4, 0]


def test_a_file_of_targets_with_the_three_documented_fields_is_shown(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    row = {"question": "What is ice?", "optimal_layer_config": [1, 0, 1, 2], "answer": "water"}
    file.write_text(json.dumps(row) + "\n")
    assert main(["show", str(file)]) == 0
    assert "skip 1 (25.0 %), execute 2 (50.0 %), repeat 1 (25.0 %)" in capsys.readouterr().out
