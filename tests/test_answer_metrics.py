"""Short answers, by the official rules: the expected values are what the official evaluation gives."""

import random

import pytest

from clip_phi.evaluation.answer_metrics import (
    CONTRACTIONS,
    exact_match,
    normalise,
    pope,
    says_yes,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes.", "yes"),
        ("the Red Bus", "red bus"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("u.s.", "us"),
        ("t-shirt", "t shirt"),
        ("left -right", "left right"),
        ("black/white", "black white"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("it's", "it's"),
        ("a\nb\tc", "b c"),
        ("10:30", "10:30"),
        ("an apple, a pear", "apple pear"),
        ("somebody'd", "somebodyd"),
        ("A", ""),
    ],
)
def test_answers_are_normalised_as_officially(answer, normalised):
    assert normalise(answer) == normalised


def test_all_official_contractions_are_known():
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ows'at"] == CONTRACTIONS["'ow'sat"] == "'ow's'at"


def test_accuracy_is_the_mean_over_leaving_out_each_of_ten_people():
    ten = ["red"] * 2 + ["blue"] * 3 + ["green"] * 5
    found = vqa_accuracy(["red", "blue", "Green.", "pink"], [ten] * 4)
    # Of red's two people each has one who agrees; the other eight find two.
    assert found.tolist() == pytest.approx([(2 * 1 / 3 + 8 * 2 / 3) / 10, (3 * 2 / 3 + 7) / 10, 1, 0])


def test_accuracy_equals_the_official_formula_written_out():
    rng = random.Random(0)
    for _ in range(200):
        people = [rng.choice("xyz") for _ in range(10)]
        left_out = [people[:place] + people[place + 1 :] for place in range(10)]
        expected = sum(min(1, others.count("x") / 3) for others in left_out) / 10
        assert vqa_accuracy(["x"], [people])[0] == pytest.approx(expected)


def test_with_fewer_people_all_others_must_agree():
    assert vqa_accuracy(["yes"] * 3, [["yes"], ["yes", "yes"], ["yes", "no"]]).tolist() == [1, 1, 0.5]


def test_exact_match_takes_any_reference():
    assert exact_match(["the dog", "a cat"], [["dog"], ["dog", "bird"]]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not. Yes.", False),
        ("Yes. No.", True),
        ("", True),
        ("NO", True),  # as its own evaluation reads it
    ],
)
def test_an_answer_is_read_as_pope_reads_it(answer, yes):
    assert says_yes(answer) == yes


def test_pope_counts_hits_misses_and_the_share_of_yes():
    found = pope(["yes", "yes", "no", "no", "yes"], ["yes", "no", "no", "yes", "yes"])
    precision = recall = 2 / 3
    assert found == pytest.approx(
        {"accuracy": 0.6, "precision": precision, "recall": recall, "f1": 2 / 3, "yes_share": 0.6}
    )
    assert pope(["no"], ["yes"])["f1"] == 0


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="labels are yes and no, not 'maybe'"):
        pope(["yes"], ["maybe"])
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        vqa_accuracy(["yes"], [["yes"], ["no"]])
    with pytest.raises(ValueError, match="each question needs at least one"):
        exact_match(["yes"], [[]])
