from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SuperviseConfig
from drllm.cost import executions
from drllm.errors import ConfigError, RecordError
from drllm.records import (
    RejectedQuestion,
    Retest,
    SearchRecord,
    TriedPath,
    manifest_path,
    new_manifest,
    read_json_lines,
    read_supervision,
    rejected_path,
    sha256,
    write_records,
)
from drllm.supervision.rules import REASONS, candidates
from drllm.supervision.select import check_settings, supervise, targets

MODEL = {
    "id": "some/model",
    "revision": "abc",
    "class": "LlamaForCausalLM",
    "num_layers": 4,
    "hidden_size": 32,
    "fingerprint": "0123456789abcdef",
}
GOOD = Retest(passed=3, asked=4, margin=1.0, survived=True)
BAD = Retest(passed=1, asked=4, margin=-1.0, survived=False)


def good(margin: float | None) -> Retest:
    return Retest(passed=4, asked=4, margin=margin, survived=True)


def tried(
    decisions: str,
    reward: float = 1.0,
    retest: Retest | None = None,
    margin: float | None = None,
    kl: float | None = None,
) -> TriedPath:
    """A path from its decisions as text; `record` numbers the simulations."""
    values = tuple(int(value) for value in decisions)
    return TriedPath(
        decisions=values,
        simulation=0,
        reward=reward,
        margin=margin,
        executions=executions(values),
        kl=kl,
        retest=retest,
    )


def record(*paths: TriedPath, question: str = "What is water?", **fields: Any) -> SearchRecord:
    """A searched question; the first path is the full one."""
    values = {
        "id": question,
        "task": "facts",
        "prompt": f"Q: {question}",
        "answer": "wet",
        "reward": "loglikelihood",
    }
    return SearchRecord(
        **(values | fields),
        question=question,
        num_layers=len(paths[0].decisions),
        paths=tuple(
            TriedPath(**{name: getattr(path, name) for name in path.__slots__} | {"simulation": n})
            for n, path in enumerate(paths)
        ),
        seconds=1.0,
    )


def chosen(target: str, *paths: TriedPath, least: float | None = None) -> str:
    """The decisions that the rule picks, as text, or its reason."""
    found = candidates(record(*paths), target, min_saving=least)
    return found if isinstance(found, str) else "".join(map(str, found[0].decisions))


# --- one question ------------------------------------------------------------------------------


def harming(decisions: str, kl: float | None, **fields: Any) -> TriedPath:
    return tried(decisions, **{"reward": 0.0} | fields, kl=kl)


FULL, WRONG = tried("1111", retest=GOOD), tried("1111", 0.0)
RETESTED = ("shortest", "largest_margin")
CASES: dict[str, tuple[str, tuple[TriedPath, ...], str]] = {
    "the fewest executions among the survivors": (
        "shortest",
        (
            FULL,
            tried("1110", retest=GOOD),
            tried("1100", retest=GOOD),
            tried("1000", retest=BAD),
            tried("0001"),
        ),
        "1100",
    ),
    "of equal lengths the larger margin in the re-test": (
        "shortest",
        (
            FULL,
            tried("1110", retest=good(0.5), margin=9.0),
            tried("1101", retest=good(0.7), margin=0.1),
            tried("1011", retest=good(None)),
        ),
        "1101",
    ),
    "no margin comes after a negative one": (
        "shortest",
        (FULL, tried("1011", retest=good(None)), tried("1110", retest=good(-5.0))),
        "1110",
    ),
    "of equal margins the earlier simulation": (
        "shortest",
        (FULL, tried("1101", retest=good(0.5)), tried("1110", retest=good(0.5))),
        "1101",
    ),
    "the largest margin in the re-test whatever the length": (
        "largest_margin",
        (
            WRONG,
            tried("1110", retest=good(0.5), margin=9.0),
            tried("2111", retest=good(0.7), margin=0.1),
            tried("1000", retest=good(None)),
        ),
        "2111",
    ),
    "of equal margins the fewer executions": (
        "largest_margin",
        (WRONG, tried("1110", retest=good(0.5)), tried("1100", retest=good(0.5))),
        "1100",
    ),
    "paper: the shortest right path, re-tested or not": (
        "paper",
        (tried("1111"), tried("1110"), tried("1000", retest=BAD)),
        "1000",
    ),
    "paper: of equal lengths the earlier simulation": (
        "paper",
        (tried("1111"), tried("1101", retest=good(0.1)), tried("1110", retest=good(9.0))),
        "1101",
    ),
    "paper: an improving path may be longer": (
        "paper",
        (WRONG, tried("1112"), tried("0111", 0.0)),
        "1112",
    ),
    "paper: not the full path alone": ("paper", (tried("1111"),), "only the full path"),
    "paper: no path that gains nothing": (
        "paper",
        (tried("1111"), tried("2111"), tried("2011"), tried("0111", 0.0)),
        "only the full path",
    ),
    "released: the full path too": (
        "released",
        (tried("1111"), tried("2111"), tried("0111", 0.0)),
        "1111",
    ),
    "released: the shortest right path": (
        "released",
        (tried("1111"), tried("1110"), tried("1000", retest=BAD)),
        "1000",
    ),
    "released: an improving path": ("released", (WRONG, tried("1112")), "1112"),
    "released: no right path": ("released", (WRONG, tried("1110", 0.5)), "no valid path"),
    "least KL whatever the reward": (
        "least_kl",
        (
            harming("1111", 0.0, reward=1.0, retest=GOOD),
            harming("1110", 0.3, reward=1.0, retest=GOOD),
            harming("1011", 0.1),
            harming("0111", 0.2),
        ),
        "1011",
    ),
    "of equal KL the fewer executions, then the earlier simulation": (
        "least_kl",
        (*(harming(text, 0.5 * (text != "1111")) for text in ("1111", "1110", "0011", "1100")),),
        "0011",
    ),
    "least KL: no path that saves nothing": (
        "least_kl",
        (harming("1111", 0.0), harming("2111", 0.01), harming("2011", 0.02)),
        "no path saves enough",
    ),
    "least KL: no path without one": (
        "least_kl",
        (harming("1111", 0.0), harming("1110", None), harming("1100", 5.0)),
        "1100",
    ),
    "least KL: a record without any": (
        "least_kl",
        (tried("1111"), tried("1110")),
        "no KL in the record",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_picks_its_target(case: str):
    target, paths, expected = CASES[case]
    assert chosen(target, *paths) == expected


@pytest.mark.parametrize("target", RETESTED)
@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((FULL, tried("1110", retest=BAD)), "1111"),
        ((WRONG, tried("1110"), tried("1101", retest=BAD)), "no path survived the re-test"),
        ((WRONG, tried("1110", 0.9, GOOD)), "no valid path"),
        ((WRONG, tried("1110", 0.5)), "no valid path"),
    ],
)
def test_only_right_paths_that_survived_are_targets(
    target: str, paths: tuple[TriedPath, ...], expected: str
):
    assert chosen(target, *paths) == expected


def test_a_kl_target_saves_the_least_share_or_more():
    paths = (
        harming("1111111111", 0.0),
        harming("1111111110", 0.1),
        harming("1111111100", 0.2),
        harming("1111111000", 0.4),
    )
    assert chosen("least_kl", *paths, least=0.1) == "1111111110"
    assert chosen("least_kl", *paths, least=0.11) == "1111111100"
    assert chosen("least_kl", *paths, least=0.3) == "1111111000"
    assert chosen("least_kl", *paths, least=0.31) == "no path saves enough"


# --- all valid paths ---------------------------------------------------------------------------


def soft(target: str, path_weights: str, *paths: TriedPath, **settings: Any) -> dict[str, float]:
    """The valid paths written with the target, as text, with their weights."""
    config = SuperviseConfig(target=target, path_weights=path_weights, **settings)
    [found] = targets([record(*paths)], config)
    return {"".join(map(str, path.decisions)): path.weight for path in found.valid_paths or ()}


SOFT_PATHS = (
    tried("1111", retest=GOOD, kl=0.0),
    tried("1110", retest=GOOD, kl=0.2),
    tried("1100", retest=GOOD, kl=0.7),
    tried("1000", retest=BAD, kl=2.0),
    tried("0001", reward=0.0, kl=3.0),
)


def test_no_valid_paths_are_written_unless_asked_for():
    assert soft("shortest", "none", *SOFT_PATHS) == {}


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
def test_the_valid_paths_are_those_that_the_rule_picks_from(target: str, expected: set[str]):
    assert set(soft(target, "equal", *SOFT_PATHS)) == expected


def test_kl_leaves_paths_that_save_too_little_out_of_the_valid_ones():
    found = soft("least_kl", "equal", *SOFT_PATHS, min_saving=0.5)
    assert set(found) == {"1100", "1000", "0001"}


def test_valid_paths_weigh_the_same_half_by_execution_or_by_kl():
    assert soft("shortest", "equal", *SOFT_PATHS) == {"1111": 1, "1110": 1, "1100": 1}
    assert soft("shortest", "shorter", *SOFT_PATHS) == {"1111": 0.25, "1110": 0.5, "1100": 1}
    closer = soft("shortest", "closer", *SOFT_PATHS)
    expected = {"1111": 1, "1110": math.exp(-0.2), "1100": math.exp(-0.7)}
    assert closer == pytest.approx(expected)


def test_weights_by_kl_need_the_kl():
    paths = (tried("1111", retest=GOOD, kl=0.0), tried("1110", retest=GOOD))
    with pytest.raises(ConfigError, match="--path-weights closer needs each path's KL"):
        soft("shortest", "closer", *paths)


def test_valid_paths_do_not_change_the_target():
    config = SuperviseConfig(path_weights="shorter")
    [softened] = targets([record(*SOFT_PATHS)], config)
    [plain] = targets([record(*SOFT_PATHS)], SuperviseConfig())
    assert softened.optimal_layer_config == plain.optimal_layer_config


# --- many questions ----------------------------------------------------------------------------

SAVING = (tried("1111", retest=GOOD), tried("1100", retest=GOOD, margin=2.5))
IMPROVING = (tried("1111", 0.0), tried("2110", retest=GOOD))
FULL_ONLY = (tried("1111", retest=GOOD),)
LUCKY = (tried("1111", 0.0), tried("1110", retest=BAD))
HOPELESS = (tried("1111", 0.0), tried("1110", 0.0))


def questions(*kinds: tuple[TriedPath, ...]) -> list[SearchRecord]:
    return [record(*paths, question=f"Question {n}?") for n, paths in enumerate(kinds)]


def test_a_target_carries_what_training_needs():
    (target,) = targets(questions(SAVING), SuperviseConfig())

    assert target.question == "Question 0?"
    assert target.prompt == "Q: Question 0?"
    assert target.answer == "wet"
    assert target.optimal_layer_config == (1, 1, 0, 0)
    assert (target.id, target.task) == ("Question 0?", "facts")
    assert (target.executions, target.improving, target.margin) == (2.0, False, 2.5)


def test_a_target_is_improving_where_the_full_path_failed():
    supervision = targets(questions(SAVING, IMPROVING, FULL_ONLY), SuperviseConfig())

    assert [target.improving for target in supervision] == [False, True, False]


def test_the_summary_counts_what_the_search_found_and_what_became_of_it():
    found = questions(SAVING, IMPROVING, FULL_ONLY, LUCKY, HOPELESS, HOPELESS)

    assert targets(found, SuperviseConfig()).summary == {
        "questions": 6,
        "copies": 0,
        "targets": 3,
        "rejected": {
            "no valid path": 2,
            "only the full path": 0,
            "no path survived the re-test": 1,
            "no KL in the record": 0,
            "no path saves enough": 0,
            "over the quota": 0,
        },
        "base_correct": 2,
        "valid_before_retest": 4,
        "valid_after_retest": 3,
        "saving_before_retest": 2,
        "saving_after_retest": 1,
        "improving_before_retest": 2,
        "improving_after_retest": 1,
        "paths": {
            "saving_before_retest": 2,
            "saving_after_retest": 1,
            "improving_before_retest": 2,
            "improving_after_retest": 1,
        },
        "tasks": {
            "facts": {
                "questions": 6,
                "copies": 0,
                "base_correct": 2,
                "valid_before_retest": 4,
                "valid_after_retest": 3,
                "saving_before_retest": 2,
                "saving_after_retest": 1,
                "improving_before_retest": 2,
                "improving_after_retest": 1,
                "targets": 3,
                "improving_targets": 1,
            }
        },
        "executions": pytest.approx(10 / 3),
        "class_counts": [3, 8, 1],
        "class_counts_by_layer": [[0, 2, 1], [0, 3, 0], [1, 2, 0], [2, 1, 0]],
    }


def test_the_summary_tells_the_tasks_apart():
    found = [
        record(*SAVING, question="a?", task="one"),
        record(*IMPROVING, question="b?", task="two"),
        record(*HOPELESS, question="c?", task="one"),
    ]
    tasks = targets(found, SuperviseConfig()).summary["tasks"]

    told = {
        name: (task["questions"], task["base_correct"], task["targets"], task["improving_targets"])
        for name, task in tasks.items()
    }
    assert told == {"one": (2, 1, 1, 0), "two": (1, 0, 1, 1)}


def test_every_question_is_told_why_it_has_no_target():
    found = questions(SAVING, HOPELESS, LUCKY)

    assert targets(found, SuperviseConfig()).reasons == (
        None,
        "no valid path",
        "no path survived the re-test",
    )


def test_no_questions_make_no_targets():
    supervision = targets([], SuperviseConfig())

    assert supervision == ()
    assert supervision.summary["class_counts"] == [0, 0, 0]


def test_a_question_asked_twice_counts_once_in_whatever_task_and_spelling():
    found = [
        record(*SAVING, question="What is ice?", task="first"),
        record(*IMPROVING, question="  what is\nICE? ", task="second"),
    ]
    supervision = targets(found, SuperviseConfig())

    assert [target.task for target in supervision] == ["first"]
    assert supervision.reasons == (None, "same question twice")
    assert (supervision.summary["questions"], supervision.summary["copies"]) == (1, 1)


def test_a_copy_adds_to_no_count_but_that_of_copies():
    found = [
        record(*SAVING, question="What is ice?", task="first"),
        record(*HOPELESS, question="What is fog?", task="first"),
    ]
    copies = [
        record(*IMPROVING, question="what is ice?", task="second"),
        record(*SAVING, question="What is fog?", id="again", task="second"),
        record(*SAVING, question="What is fog?", id="again", task="third"),
    ]
    alone, joined = (
        targets(records, SuperviseConfig()).summary for records in (found, [*found, *copies])
    )

    assert (alone.pop("copies"), joined.pop("copies")) == (0, 3)
    assert joined["tasks"].pop("second") == {
        **dict.fromkeys(joined["tasks"]["first"], 0),
        "copies": 2,
    }
    assert joined["tasks"].pop("third")["copies"] == 1
    assert joined == alone


def test_the_first_of_two_copies_counts_even_if_it_has_no_target():
    found = [
        record(*HOPELESS, question="What is ice?", task="first"),
        record(*SAVING, question="What is ice?", task="second"),
    ]
    supervision = targets(found, SuperviseConfig())

    assert supervision == ()
    assert supervision.reasons == ("no valid path", "same question twice")
    assert supervision.summary["rejected"]["no valid path"] == 1
    assert sum(supervision.summary["rejected"].values()) == 1


def kept(share: float, *kinds: tuple[TriedPath, ...]) -> list[str]:
    config = SuperviseConfig(quota_improving=share)
    return [target.id[9] for target in targets(questions(*kinds), config)]


def test_the_quota_drops_the_last_targets_that_do_not_improve():
    assert kept(0.5, SAVING, SAVING, IMPROVING, SAVING, IMPROVING) == ["0", "1", "2", "4"]


def test_the_quota_keeps_all_where_enough_improve():
    assert kept(0.3, SAVING, IMPROVING, SAVING) == ["0", "1", "2"]


def test_a_quota_of_1_keeps_only_improving_targets():
    assert kept(1.0, SAVING, IMPROVING, SAVING) == ["1"]


def test_the_quota_drops_everything_where_nothing_improves():
    assert kept(0.3, SAVING, SAVING) == []


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 1 / 3, 0.7, 0.9])
@pytest.mark.parametrize("improving", [1, 3, 9])
def test_the_quota_is_met_with_as_few_drops_as_possible(share: float, improving: int):
    config = SuperviseConfig(quota_improving=share)
    supervision = targets(questions(*[SAVING] * 100, *[IMPROVING] * improving), config)

    left = len(supervision)
    assert improving / left >= share - 1e-12
    assert improving / (left + 1) < share or left == 100 + improving
    assert supervision.summary["rejected"]["over the quota"] == 100 + improving - left


def test_a_quota_takes_the_first_targets_not_the_first_questions():
    found = questions(HOPELESS, SAVING, SAVING, SAVING)
    supervision = targets(found, SuperviseConfig(quotas="facts=2"))

    assert [target.id for target in supervision] == ["Question 1?", "Question 2?"]
    assert supervision.reasons[3] == "over the quota"
    assert supervision.summary["tasks"]["facts"]["targets"] == 2


def test_a_copy_of_a_question_takes_no_place_in_a_quota():
    found = [
        record(*SAVING, question="a?", task="one"),
        record(*SAVING, question="A?", id="copy", task="two"),
        record(*SAVING, question="b?", task="two"),
    ]
    supervision = targets(found, SuperviseConfig(quotas="two=1"))

    assert [target.question for target in supervision] == ["a?", "b?"]


def test_a_quota_for_a_task_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match=r"unknown task 'fact'; did you mean 'facts'\? Valid"):
        targets(questions(SAVING), SuperviseConfig(quotas="fact=2"))


def test_the_least_saving_has_no_use_but_for_kl():
    with pytest.raises(ConfigError, match=r"--min-saving 0\.2 has no effect with --target paper"):
        check_settings(SuperviseConfig(target="paper", min_saving=0.2), ["facts"])
    assert check_settings(SuperviseConfig(target="least_kl", min_saving=0.2), ["facts"]) == {}


def test_the_least_saving_of_the_settings_is_followed():
    paths = (harming("1111", 0.0), harming("1110", 0.1), harming("1000", 0.9))

    def picked(**settings: Any) -> tuple[int, ...]:
        config = SuperviseConfig(target="least_kl", **settings)
        return targets([record(*paths)], config)[0].optimal_layer_config

    assert picked() == (1, 1, 1, 0)
    assert picked(min_saving=0.5) == (1, 0, 0, 0)


def test_every_question_has_a_target_or_a_reason():
    found = questions(SAVING, SAVING, SAVING, IMPROVING, FULL_ONLY, LUCKY, HOPELESS)
    found.append(record(*SAVING, question="question 0?", task="copy"))
    summary = targets(found, SuperviseConfig(quota_improving=0.5)).summary

    assert set(summary["rejected"]) == set(REASONS)
    assert summary["targets"] + sum(summary["rejected"].values()) == summary["questions"] == 7
    assert summary["questions"] + summary["copies"] == len(found)
    assert summary["rejected"]["over the quota"] == 3


# --- files -------------------------------------------------------------------------------------


def search_file(
    folder: Path, *kinds: tuple[TriedPath, ...], name: str = "search.jsonl", **model: Any
) -> Path:
    found = [record(*paths, question=f"{name} {n}?") for n, paths in enumerate(kinds)]
    file = folder / name
    write_records(file, found, new_manifest("search", model=MODEL | model, config={}))
    return file


def test_write_makes_a_supervision_file_that_can_be_read_back(tmp_path: Path):
    source = search_file(tmp_path, SAVING, IMPROVING, HOPELESS)
    output = tmp_path / "new" / "supervision.jsonl"
    summary = supervise([source], SuperviseConfig(), output).summary

    assert summary["targets"] == 2
    assert [row.optimal_layer_config for row in read_supervision(output)] == [
        (1, 1, 0, 0),
        (2, 1, 1, 0),
    ]


def test_the_manifest_tells_model_settings_inputs_and_summary(tmp_path: Path):
    source = search_file(tmp_path, SAVING)
    output = tmp_path / "supervision.jsonl"
    config = SuperviseConfig(target="largest_margin")
    summary = supervise([source], config, output).summary

    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["schema"] == "drllm.supervision"
    assert manifest["model"] == MODEL
    assert manifest["config"] == config.to_dict()
    assert manifest["inputs"] == {"search.jsonl": sha256(source)}
    assert manifest["summary"] == summary
    assert manifest["rewards"] == ["loglikelihood"]


def test_the_manifest_names_the_rewards_of_the_targets_only(tmp_path: Path):
    found = [
        record(*SAVING, question="a?", reward="letter"),
        record(*SAVING, question="b?", reward="exact"),
        record(*HOPELESS, question="c?", reward="boxed"),
    ]
    source = tmp_path / "search.jsonl"
    write_records(source, found, new_manifest("search", model=MODEL, config={}))
    supervise([source], SuperviseConfig(), tmp_path / "supervision.jsonl")

    manifest = json.loads(manifest_path(tmp_path / "supervision.jsonl").read_text())
    assert manifest["rewards"] == ["exact", "letter"]


def rejected(output: Path) -> list[tuple[str, str, str, str]]:
    """The lines of the file of rejects beside the targets."""
    rows = [row for _, row in read_json_lines(rejected_path(output), RejectedQuestion)]
    return [(row.id, row.task, row.question, row.reason) for row in rows]


def test_every_question_without_a_target_is_written_with_its_reason(tmp_path: Path):
    one = search_file(tmp_path, HOPELESS, SAVING, name="a.jsonl")
    two = tmp_path / "b.jsonl"
    found = [
        record(*LUCKY, question="b?", id="q1", task="other"),
        record(*SAVING, question="A.jsonl  0?", id="q2", task="other"),
    ]
    write_records(two, found, new_manifest("search", model=MODEL, config={}))
    output = tmp_path / "out" / "mine.jsonl"
    supervise([one, two], SuperviseConfig(), output)

    assert rejected(output) == [
        ("a.jsonl 0?", "facts", "a.jsonl 0?", "no valid path"),
        ("q1", "other", "b?", "no path survived the re-test"),
        ("q2", "other", "A.jsonl  0?", "same question twice"),
    ]
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "mine.jsonl",
        "mine.manifest.json",
        "mine.rejected.jsonl",
    ]


def test_where_all_have_a_target_rejects_of_earlier_targets_go(tmp_path: Path):
    output = tmp_path / "supervision.jsonl"
    supervise([search_file(tmp_path, SAVING, LUCKY, name="a.jsonl")], SuperviseConfig(), output)
    assert len(rejected(output)) == 1

    supervise([search_file(tmp_path, SAVING, name="b.jsonl")], SuperviseConfig(), output)

    assert not rejected_path(output).exists()


def test_rejects_are_replaced_with_the_targets(tmp_path: Path):
    source, output = search_file(tmp_path, SAVING, LUCKY), tmp_path / "supervision.jsonl"
    supervise([source], SuperviseConfig(), output)
    supervise([source], SuperviseConfig(target="paper", quotas="facts=1"), output)

    assert [reason for *_, reason in rejected(output)] == ["over the quota"]


def test_targets_are_never_trusted_before_their_rejects_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "supervision.jsonl"
    supervise([search_file(tmp_path, SAVING, name="a.jsonl")], SuperviseConfig(), output)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drllm.supervision.select.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        supervise([search_file(tmp_path, SAVING, LUCKY)], SuperviseConfig(), output)

    # The targets are still those of the first search, and so says their manifest.
    assert list(json.loads(manifest_path(output).read_text())["inputs"]) == ["a.jsonl"]
    assert [row.id for row in read_supervision(output)] == ["a.jsonl 0?"]


def test_a_search_file_is_not_taken_for_the_place_of_the_rejects(tmp_path: Path):
    source = search_file(tmp_path, SAVING, LUCKY, name="out.rejected.jsonl")
    before = source.read_text()

    with pytest.raises(RecordError, match=r"out\.rejected\.jsonl is both read and written"):
        supervise([source], SuperviseConfig(), tmp_path / "out.jsonl")
    assert source.read_text() == before


def test_rejects_that_cannot_be_written_leave_the_old_targets_alone(tmp_path: Path):
    output = tmp_path / "supervision.jsonl"
    supervise([search_file(tmp_path, SAVING, name="a.jsonl")], SuperviseConfig(), output)
    rejected_path(output).mkdir()

    with pytest.raises(RecordError, match=r"rejected\.jsonl: it is a folder"):
        supervise([search_file(tmp_path, LUCKY, SAVING, name="b.jsonl")], SuperviseConfig(), output)
    assert [row.id for row in read_supervision(output)] == ["a.jsonl 0?"]


def test_targets_follow_the_order_of_the_files(tmp_path: Path):
    first = search_file(tmp_path, SAVING, SAVING, name="b.jsonl")
    second = search_file(tmp_path, SAVING, name="a.jsonl")
    output = tmp_path / "supervision.jsonl"
    supervise([first, second], SuperviseConfig(), output)

    assert [row.id for row in read_supervision(output)] == [
        "b.jsonl 0?",
        "b.jsonl 1?",
        "a.jsonl 0?",
    ]


def test_files_of_one_name_in_two_folders_are_both_inputs(tmp_path: Path):
    one = search_file(tmp_path / "one", SAVING, IMPROVING)
    two = search_file(tmp_path / "two", SAVING)
    output = tmp_path / "supervision.jsonl"
    summary = supervise([one, two], SuperviseConfig(), output).summary

    assert (summary["questions"], summary["copies"]) == (2, 1)
    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["inputs"] == {str(one): sha256(one), str(two): sha256(two)}


def test_the_manifest_tells_what_became_of_each_file(tmp_path: Path):
    one = search_file(tmp_path, SAVING, HOPELESS, name="a.jsonl")
    two = search_file(tmp_path, SAVING, SAVING, LUCKY, name="b.jsonl")
    output = tmp_path / "supervision.jsonl"
    supervise([one, two], SuperviseConfig(quotas="facts=2"), output)

    files = json.loads(manifest_path(output).read_text())["files"]
    assert list(files) == ["a.jsonl", "b.jsonl"]
    told = {
        name: (file["questions"], file["targets"], {r: n for r, n in file["rejected"].items() if n})
        for name, file in files.items()
    }
    assert told == {
        "a.jsonl": (2, 1, {"no valid path": 1}),
        "b.jsonl": (3, 1, {"no path survived the re-test": 1, "over the quota": 1}),
    }


def test_a_question_of_two_shards_counts_once(tmp_path: Path):
    found = questions(SAVING, IMPROVING)
    files = [tmp_path / "one" / "search.jsonl", tmp_path / "two" / "search.jsonl"]
    for file, part in zip(files, (found, found[1:]), strict=True):
        write_records(file, part, new_manifest("search", model=MODEL, config={}))
    output = tmp_path / "supervision.jsonl"
    summary = supervise(files, SuperviseConfig(), output).summary

    assert summary["targets"] == 2
    second = json.loads(manifest_path(output).read_text())["files"][str(files[1])]
    assert (second["questions"], second["copies"], second["targets"]) == (0, 1, 0)
    assert sum(second["rejected"].values()) == 0


def test_a_file_given_twice_is_refused(tmp_path: Path):
    source = search_file(tmp_path, SAVING)

    with pytest.raises(RecordError, match="given twice"):
        supervise([source, tmp_path / "." / source.name], SuperviseConfig(), tmp_path / "out.jsonl")


def test_a_search_without_kl_says_how_to_get_it(tmp_path: Path):
    source = search_file(tmp_path, SAVING, IMPROVING)

    with pytest.raises(RecordError, match=r"2 no KL in the record\); search again with --kl"):
        supervise([source], SuperviseConfig(target="least_kl"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_paths_that_save_too_little_say_what_would_help(tmp_path: Path):
    source = search_file(tmp_path, (harming("1111", 0.0), harming("1110", 0.25)))
    config = SuperviseConfig(target="least_kl", min_saving=0.5)

    with pytest.raises(RecordError, match=r"1 no path saves enough\); .* smaller --min-saving"):
        supervise([source], config, tmp_path / "out.jsonl")


def test_kl_is_read_back_from_a_search_file(tmp_path: Path):
    source = search_file(tmp_path, (harming("1111", 0.0), harming("1110", 0.25)))
    output = tmp_path / "out.jsonl"
    supervise([source], SuperviseConfig(target="least_kl"), output)

    (target,) = read_supervision(output)
    assert target.optimal_layer_config == (1, 1, 1, 0)
    assert not target.improving


def test_quotas_that_cannot_be_read_are_refused_before_the_files_are(tmp_path: Path):
    with pytest.raises(ConfigError, match="'facts' is no quota"):
        supervise(
            [tmp_path / "gone.jsonl"], SuperviseConfig(quotas="facts"), tmp_path / "out.jsonl"
        )


def test_a_file_without_a_manifest_is_used_as_a_file_of_ones_own(tmp_path: Path):
    source = search_file(tmp_path, SAVING)
    manifest_path(source).unlink()
    output = tmp_path / "supervision.jsonl"
    supervise([source], SuperviseConfig(), output)

    assert json.loads(manifest_path(output).read_text())["model"] == {"num_layers": 4}


def test_one_set_of_weights_under_two_ids_is_one_model(tmp_path: Path):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, SAVING, name="b.jsonl", id="local/copy", revision=None)

    assert (
        supervise([first, second], SuperviseConfig(), tmp_path / "out.jsonl").summary["targets"]
        == 2
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("fingerprint", "fedcba9876543210"), ("class", "Qwen3ForCausalLM"), ("hidden_size", 64)],
)
def test_files_of_different_base_models_are_refused_naming_both(
    tmp_path: Path, name: str, value: Any
):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, SAVING, name="b.jsonl", **{name: value})
    output = tmp_path / "supervision.jsonl"

    with pytest.raises(RecordError, match=rf"a\.jsonl and .*b\.jsonl are .*{name}.*{value}"):
        supervise([first, second], SuperviseConfig(), output)
    assert not output.exists()


def test_without_fingerprints_the_ids_must_agree(tmp_path: Path):
    files = []
    for name, model in (("a.jsonl", "one/model"), ("b.jsonl", "other/model")):
        file = tmp_path / name
        found = [record(*SAVING, question=name)]
        write_records(file, found, new_manifest("search", model={"id": model}, config={}))
        files.append(file)

    with pytest.raises(RecordError, match="id 'one/model' and 'other/model'"):
        supervise(files, SuperviseConfig(), tmp_path / "supervision.jsonl")


def test_files_of_different_depths_are_refused_even_without_manifests(tmp_path: Path):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, (tried("111", retest=GOOD),), name="b.jsonl")
    for file in (first, second):
        manifest_path(file).unlink()

    with pytest.raises(RecordError, match="num_layers 4 and 3"):
        supervise([first, second], SuperviseConfig(), tmp_path / "supervision.jsonl")


def test_two_depths_in_one_file_are_refused_with_the_line(tmp_path: Path):
    source = search_file(tmp_path, SAVING, (tried("111", retest=GOOD),))

    with pytest.raises(RecordError, match=r"line 2: .* 3 layers, that of line 1 on 4"):
        supervise([source], SuperviseConfig(), tmp_path / "supervision.jsonl")


def test_a_manifest_of_another_depth_than_the_paths_is_refused(tmp_path: Path):
    source = search_file(tmp_path, SAVING, num_layers=30)

    with pytest.raises(RecordError, match=r"paths of 4 layers, but its manifest names .* of 30"):
        supervise([source], SuperviseConfig(), tmp_path / "supervision.jsonl")


def test_the_model_is_known_if_one_of_the_files_tells_it(tmp_path: Path):
    first = search_file(tmp_path, SAVING, name="a.jsonl")
    second = search_file(tmp_path, SAVING, name="b.jsonl")
    manifest_path(first).unlink()
    output = tmp_path / "supervision.jsonl"
    supervise([first, second], SuperviseConfig(), output)

    assert json.loads(manifest_path(output).read_text())["model"] == MODEL


def test_two_questions_under_one_id_are_refused(tmp_path: Path):
    files = []
    for name in ("a.jsonl", "b.jsonl"):
        file = tmp_path / name
        found = [record(*SAVING, question=f"What is {name}?", id="q1")]
        write_records(file, found, new_manifest("search", model=MODEL, config={}))
        files.append(file)

    with pytest.raises(RecordError, match="different questions with id 'q1' of task 'facts'"):
        supervise(files, SuperviseConfig(), tmp_path / "supervision.jsonl")


def test_no_target_at_all_is_an_error_that_names_the_reasons(tmp_path: Path):
    source = search_file(tmp_path, LUCKY, HOPELESS, HOPELESS)
    output = tmp_path / "supervision.jsonl"

    with pytest.raises(
        RecordError, match=r"none of the 3 .* \(2 no valid path, 1 no path survived the re-test\)"
    ):
        supervise([source], SuperviseConfig(), output)
    assert [file.name for file in tmp_path.glob("supervision*")] == []


def test_a_failed_run_leaves_the_old_file_alone(tmp_path: Path):
    output = tmp_path / "supervision.jsonl"
    supervise([search_file(tmp_path, SAVING, name="a.jsonl")], SuperviseConfig(), output)

    with pytest.raises(RecordError):
        supervise([search_file(tmp_path, HOPELESS, name="b.jsonl")], SuperviseConfig(), output)
    assert len(read_supervision(output)) == 1


def test_the_output_may_not_be_an_input(tmp_path: Path):
    source = search_file(tmp_path, SAVING)

    with pytest.raises(RecordError, match="both read and written"):
        supervise([source], SuperviseConfig(), tmp_path / "." / "search.jsonl")


def test_no_search_file_is_an_error():
    with pytest.raises(RecordError, match="no search file is given"):
        supervise([], SuperviseConfig(), Path("supervision.jsonl"))


def test_a_supervision_file_is_not_taken_for_a_search_file(tmp_path: Path):
    output = tmp_path / "supervision.jsonl"
    supervise([search_file(tmp_path, SAVING)], SuperviseConfig(), output)

    with pytest.raises(RecordError, match=r"says 'drllm\.supervision'; expected 'drllm\.search'"):
        supervise([output], SuperviseConfig(), tmp_path / "again.jsonl")
