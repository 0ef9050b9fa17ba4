"""Names are deterministic, short enough, and do not collide."""

from hypothesis import given
from hypothesis import strategies as st

from tuneserve import names

_NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,100}[a-z0-9])?", fullmatch=True)


@given(_NAMES)
def test_a_name_fits_into_a_label(name: str) -> None:
    cut = names.limited(name)
    assert 0 < len(cut) <= names.NAME_LIMIT
    assert cut[-1].isalnum()


@given(_NAMES)
def test_a_short_name_stays(name: str) -> None:
    if len(name) <= names.NAME_LIMIT:
        assert names.limited(name) == name


@given(st.lists(_NAMES, min_size=2, max_size=2, unique=True))
def test_two_names_stay_two(pair: list[str]) -> None:
    assert names.limited(pair[0]) != names.limited(pair[1])


def test_long_names_that_begin_alike_stay_apart() -> None:
    one, other = ("a" * 60 + suffix for suffix in ("-train-0123456789", "-merge-0123456789"))
    assert names.limited(one) != names.limited(other)
    assert names.limited(one).startswith("a" * 50)


def test_children_of_a_finetune() -> None:
    assert names.artifacts_claim("sentiment") == "sentiment-artifacts"
    assert names.stage_job(finetune="sentiment", stage="train", hash="0123456789abcdef") == "sentiment-train-0123456789"
    labels = names.finetune_labels(finetune="sentiment", component="evaluate", stage="evaluate-base", hash="0a")
    assert labels == {
        "app.kubernetes.io/managed-by": "tuneserve",
        "app.kubernetes.io/name": "finetune",
        "app.kubernetes.io/component": "evaluate",
        "tuneserve.dev/finetune": "sentiment",
        "tuneserve.dev/stage": "evaluate-base",
        "tuneserve.dev/hash": "0a",
    }
    assert names.finetune_selector("sentiment").items() <= labels.items()


def test_a_selector_as_text_is_sorted() -> None:
    assert names.selector_text({"b": "2", "a": "1"}) == "a=1,b=2"


def test_the_controller_of_an_object() -> None:
    owner = {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "FineTune", "metadata": {"name": "x", "uid": "u"}}
    reference = names.owner_reference(owner)
    other = {"kind": "ConfigMap", "name": "y", "uid": "v"}
    assert names.controller_of({"metadata": {"ownerReferences": [other, reference]}}) == reference
    assert names.controller_of({"metadata": {"ownerReferences": [other]}}) is None
    assert names.controller_of({"metadata": {}}) is None
