import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.errors import ConfigError
from drllm.records import SupervisionRecord
from drllm.supervision.quotas import over_quota, read_quotas


def target(letter: str) -> SupervisionRecord:
    """A target from a letter: it is the task, a capital improves."""
    given = {"question": "?", "optimal_layer_config": (1, 1), "answer": "!"}
    return SupervisionRecord(**given, task=letter.lower(), improving=letter.isupper())


def left(text: str, quotas: dict[str, int], share: float | None = None) -> str:
    """What stays of a target a letter, in order; what goes is a dot."""
    gone = over_quota([*map(target, text)], quotas, share)
    return "".join("." if place in gone else letter for place, letter in enumerate(text))


def test_quotas_are_read_with_or_without_spaces():
    assert read_quotas("arc_easy=400,dart-1=200") == {"arc_easy": 400, "dart-1": 200}
    assert read_quotas(" arc_easy = 400 , dart-1=200 ") == {"arc_easy": 400, "dart-1": 200}
    assert read_quotas(None) == {}


@pytest.mark.parametrize(
    "text", ["", "arc_easy", "arc_easy=", "=3", "a=0", "a=-1", "a=1.5", "a=x", "a=1,"]
)
def test_what_is_no_quota_is_refused_with_the_form_that_is(text):
    with pytest.raises(ConfigError, match=r"is no quota; give TASK=COUNT"):
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
    gone = over_quota(kept, {"a": quota}, share)
    assert set(range(len(kept))) - gone == published(improving, quota, share)
