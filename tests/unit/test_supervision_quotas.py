from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.errors import ConfigError
from drllm.records import SupervisionRecord
from drllm.supervision.quotas import over_quota, read_quotas


def target(task: str, *, improving: bool) -> SupervisionRecord:
    return SupervisionRecord(
        question="?",
        optimal_layer_config=(1, 1),
        answer="!",
        prompt="?",
        id="id",
        task=task,
        executions=2.0,
        improving=improving,
    )


def rows(text: str) -> list[SupervisionRecord]:
    """Targets from letters: the letter is the task, a capital improves."""
    return [target(letter.lower(), improving=letter.isupper()) for letter in text]


def left(text: str, quotas: dict[str, int], share: float | None = None) -> str:
    """What stays, in order; what goes is a dot."""
    gone = over_quota(rows(text), quotas, share)
    return "".join("." if place in gone else letter for place, letter in enumerate(text))


# --- reading -----------------------------------------------------------------------------------


def test_quotas_are_read_with_or_without_spaces():
    assert read_quotas("arc_easy=400,dart-1=200") == {"arc_easy": 400, "dart-1": 200}
    assert read_quotas(" arc_easy = 400 , dart-1=200 ") == {"arc_easy": 400, "dart-1": 200}


def test_no_quotas_are_no_quotas():
    assert read_quotas(None) == {}


@pytest.mark.parametrize(
    "text", ["", "arc_easy", "arc_easy=", "=3", "a=0", "a=-1", "a=1.5", "a=x", "a=1,"]
)
def test_what_is_no_quota_is_refused_with_the_form_that_is(text: str):
    with pytest.raises(ConfigError, match=r"is no quota; give TASK=COUNT"):
        read_quotas(text)


def test_a_task_named_twice_is_refused():
    with pytest.raises(ConfigError, match="names task 'a' twice"):
        read_quotas("a=1,b=2,a=3")


# --- without a share ---------------------------------------------------------------------------


def test_a_quota_keeps_the_first_targets_of_its_task():
    assert left("abaabb", {"a": 2, "b": 1}) == "aba..."


def test_a_task_without_a_quota_keeps_all():
    assert left("abab", {"a": 1}) == "ab.b"


def test_a_quota_that_is_not_reached_costs_nothing():
    assert left("aab", {"a": 5, "b": 5}) == "aab"


def test_without_quotas_nothing_goes():
    assert left("aAb", {}) == "aAb"


# --- with a share ------------------------------------------------------------------------------


def test_a_later_improving_target_takes_the_place_of_the_first_that_does_not_improve():
    assert left("aaaa" + "AaA", {"a": 4}, 0.25) == ".aaa" + "A.."


def test_as_many_places_are_taken_as_the_share_wants():
    assert left("aAaa" + "aAAA", {"a": 4}, 0.75) == ".A.a" + ".AA."


def test_a_share_that_the_first_targets_have_takes_no_place():
    assert left("aAAA" + "AA", {"a": 4}, 0.5) == "aAAA" + ".."


def test_a_task_that_runs_out_of_improving_targets_stays_full_and_below_the_share():
    assert left("aaaa" + "aA", {"a": 4}, 0.75) == ".aaa" + ".A"


def test_each_task_has_the_share_of_its_own_quota():
    assert left("aabb" + "ABBA", {"a": 2, "b": 2}, 0.5) == ".a.b" + "AB.."


def test_a_task_below_its_quota_is_left_alone():
    assert left("aaA", {"a": 4}, 0.75) == "aaA"


def test_a_task_without_a_quota_is_thinned_by_itself():
    assert left("aAbbbB", {"a": 2}, 0.5) == "aAb..B"


def test_without_quotas_all_tasks_together_have_the_share():
    assert left("aaBB", {}, 0.5) == "aaBB"
    assert left("aaaBB", {}, 0.5) == "aa.BB"


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
def test_quota_and_share_keep_what_going_one_by_one_would(
    improving: list[bool], quota: int, share: float
):
    kept = [target("a", improving=better) for better in improving]
    gone = over_quota(kept, {"a": quota}, share)

    assert set(range(len(kept))) - gone == published(improving, quota, share)
