"""Ranks and recalls on planted answers."""

import numpy as np
import pytest

from packlight.data import Dataset, Sample, prompted
from packlight.errors import DataError
from packlight.retrieval import class_ranks, class_vectors, first_right, recall, retrieval_ranks, right_pairs
from packlight.scoring import dual_quality, dual_rate


def test_first_right_counts_wrong_answers_before_it_and_ties_against_it():
    scores = np.array([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    right = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=bool)
    assert first_right(scores, right).tolist() == [0, 2, 1]


def test_a_model_that_gives_one_vector_for_all_finds_nothing():
    same = np.ones((5, 4))
    right, _, _ = right_pairs([(f"t{i}",) for i in range(5)])
    to_image, to_text = retrieval_ranks(same, same, right)
    assert to_image.tolist() == to_text.tolist() == [4] * 5


def test_several_captions_and_the_same_words_for_two_pictures():
    right, first, owner = right_pairs([("a frog", "green"), ("a frog", "slow"), ("green",)])
    assert first.tolist() == [0, 1, 3] and owner.tolist() == [0, 0, 1]  # a frog, green, slow
    assert right.tolist() == [[True, True, False], [True, False, True], [False, True, False]]


def test_a_series_under_one_title_is_one_query():
    """Ninety pictures with the same words that fail must not outweigh ten that are found."""
    words = [("card",)] * 90 + [(f"t{i}",) for i in range(10)]
    right, first, owner = right_pairs(words)
    assert first.tolist() == owner.tolist() == [0, *range(90, 100)]
    images = np.eye(100)
    asked = images[first].copy()
    asked[0] = -images[:90].sum(0)  # the series is found last
    to_image, to_text = retrieval_ranks(images, asked, right)
    assert to_image.tolist() == [10, *[0] * 10] and recall(to_image, 1) == pytest.approx(10 / 11)
    assert to_text[90:].tolist() == [0] * 10


def test_no_right_answer_and_nan_are_refused():
    with pytest.raises(DataError, match="right"):
        first_right(np.zeros((1, 2)), np.zeros((1, 2), dtype=bool))
    with pytest.raises(DataError, match="NaN"):
        first_right(np.full((1, 2), np.nan), np.ones((1, 2), dtype=bool))


def test_class_vectors_are_the_mean_of_unit_prompts():
    (found,) = class_vectors([np.array([[2.0, 0.0], [0.0, 5.0]])])
    assert found == pytest.approx([0.5**0.5, 0.5**0.5])
    ranks = class_ranks(np.array([[1.0, 0.1], [0.1, 1.0]]), np.eye(2), np.array([0, 0]))
    assert ranks.tolist() == [0, 1] and recall(ranks, 1) == 0.5 and recall(ranks, 5) == 1.0


def dataset(n, label=None):
    return Dataset("planted", tuple(
        Sample(f"s{i}", None, f"t{i}", 0.0, f"{i}", (f"t{i}", f"u{i}"), label and label[i % len(label)], "image") for i in range(n)
    ))  # fmt: skip


def vectors(n, wrong=()):
    """Answers of n pictures with two texts each; the texts of `wrong` pictures point at the picture after."""
    base = np.eye(n)
    return [[base[i].tolist(), *[base[(i + (i in wrong)) % n].tolist()] * 2] for i in range(n)]


def test_quality_of_a_planted_model():
    n = 40
    found, rows = dual_quality(dataset(n), vectors(n), vectors(n, wrong={3, 7}))
    assert (found.name, found.n, found.before) == ("1 - R@10", n, 0.0)
    # A wrong text's right picture ties with all but the first, so it ranks last.
    assert found.after == found.difference == pytest.approx(2 / n)
    assert found.low <= found.difference <= found.high and found.low == 0.0
    before, after, low, high = found.details["text to image recall@1"]
    assert (before, after) == (1.0, 1 - 2 / n) and low < after - before < high == 0.0
    # Picture 3 lost its texts; pictures 4 and 8 tie with the strangers' texts, so they lose the first place too.
    assert found.details["image to text recall@1"][1] == pytest.approx(1 - 4 / n)
    assert [r["reference"] for r in rows[:2]] == ["t3", "u3"] and rows[0]["ranks"] == [0, n - 1]
    assert rows[0]["after"] == "t4" and rows[0]["before"] == "t3"
    same, _ = dual_quality(dataset(n), vectors(n, {1}), vectors(n, {1}))
    assert same.difference == same.low == same.high == 0.0 and same.token_agreement == same.identical == 1.0


def test_labels_are_ranked_among_the_classes_that_occur():
    labelled = prompted(dataset(6, ("cat", "dog", "cow")), ("a {}.", "the {}"))
    assert labelled.by_label and labelled.samples[1].texts == ("a dog.", "the dog")
    classes = np.eye(3)
    answers = [[classes[i % 3].tolist(), classes[i % 3].tolist(), classes[i % 3].tolist()] for i in range(6)]
    answers[4][0] = classes[0].tolist()  # one dog looks like a cat
    found = dual_rate(labelled, answers)
    assert found["metric"] == "top-1 error" and found["value"] == pytest.approx(1 / 6)
    assert found["details"] == {"top-1": pytest.approx(5 / 6), "top-5": 1.0}


def test_top_1_and_top_5_have_paired_intervals():
    labelled = prompted(dataset(30, tuple("abcdefgh")), ("a {}.",))
    classes = np.eye(8)
    right = [[classes[i % 8].tolist(), classes[i % 8].tolist()] for i in range(30)]
    wrong = [[classes[(i + (i < 3)) % 8].tolist(), r[1]] for i, r in enumerate(right)]
    found, rows = dual_quality(labelled, right, wrong)
    assert found.name == "top-1 error" and found.difference == pytest.approx(0.1) and rows[0]["reference"] in "abc"
    for name in ("top-1", "top-5"):  # what points at another class ties with all but that one
        before, after, low, high = found.details[name]
        assert (before, after) == (1.0, pytest.approx(0.9)) and -0.25 < low < -0.1 < high <= 0.0
    assert found.details["top-1"][2] == pytest.approx(-found.high, abs=0.02)
    same, _ = dual_quality(labelled, wrong, wrong)
    assert same.details["top-5"][2:] == [0.0, 0.0]


def test_templates_and_bare_pictures_are_refused_where_they_do_not_fit():
    with pytest.raises(DataError, match="once"):
        prompted(dataset(2, ("cat", "dog")), ("a photo",))
    with pytest.raises(DataError, match="label"):
        prompted(dataset(2), ("a {}",))
    bare = Dataset("bare", (Sample("s", None, None, 0.0, "x", (), None, "image"),))
    with pytest.raises(DataError, match="neither"):
        dual_rate(bare, [[[1.0]]])


def test_templates_for_the_evaluation_leave_captions_that_only_calibrate_alone():
    captions = Dataset("there", tuple(Sample(f"s{i}", None, "a", 0.0, f"{i}", ("a",), None, "image") for i in range(2)))
    assert prompted(captions, ("a picture of {}.",), needed=False) == captions
    with pytest.raises(DataError, match="templates need labels"):
        prompted(captions, ("a picture of {}.",))
