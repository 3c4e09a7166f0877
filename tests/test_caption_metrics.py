"""Caption metrics: the reference implementation's own figures. test_oracle.py runs that implementation itself."""

import numpy as np
import pytest
from helpers import CAPTIONS, EXPECTED, REFERENCES

from clip_phi.evaluation.caption_metrics import CaptionScorer, tokenise

# The public example of nlg-eval, with what coco-caption gives for it.


def test_the_public_example_gets_the_figures_of_the_reference_implementation():
    scores = CaptionScorer(REFERENCES)(CAPTIONS).corpus
    assert {name: scores[name] for name in EXPECTED} == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # as PTBTokenizer 3.4.1 of Stanford CoreNLP and coco-caption's list of punctuation have it
        ("A man's dog isn't here, it's 5 o'clock.", "a man 's dog is n't here it 's 5 o'clock"),
        ("The U.S. flag... and St. Louis, Mr. Smith's co-op", "the u.s. flag and st. louis mr. smith 's co-op"),
        ("cannot gonna wanna gimme lemme gotta", "can not gon na wan na gim me lem me got ta"),
        ("\"Hello\" said 'the man' (in [a] {box})", "hello said the man -lrb- in -lsb- a -rsb- -lcb- box -rcb- -rrb-"),
        ("50% off $3.50 at 10:30 a.m. & 1/2 price", "50 % off $ 3.50 at 10:30 a.m. & 1/2 price"),
        ("a/b and/or w/ black-and-white", "a/b and/or w / black-and-white"),
        ("He said--no; it's the '90s", "he said no it 's the '90s"),
        ("I can't won't don't y'all 'em 'tis d'you", "i ca n't wo n't do n't y' all 'em 't is d'you"),
        ("cat ,dog .bird !what ?yes", "cat dog bird what yes"),
        ("two   spaces\ttab", "two spaces tab"),
        ("café naïve “quoted” it’s – dash — em…", "café naïve quoted it 's dash em"),
        ("rock'n'roll rock 'n' roll", "rock 'n' roll rock 'n' roll"),
        ("<unk> a&b AT&T  a+b=c ~ ^ | \\ _", "<unk> a & b at&t a + b = c ~ ^ | \\ _"),
        ("1,000 1.5 .5 5. -5 +5 5-6", "1,000 1.5 .5 5 -5 +5 5-6"),
        ("no. 5 number no. p.m. washington d.c.", "no. 5 number no p.m. washington d.c."),
        ("hi!! what?! 5-year-old 747's 3rd @home #1", "hi !! what ?! 5-year-old 747 's 3rd @home # 1"),
    ],
)
def test_captions_are_split_into_the_words_of_the_reference_tokenizer(caption, words):
    assert tokenise(caption) == words.split()


def test_a_caption_equal_to_a_reference_is_best_and_one_without_words_is_worthless():
    references = [["a red ring"], ["two blue stars on a table", "blue stars"], ["a black cross"]]
    scorer = CaptionScorer(references)
    best = scorer([captions[0] for captions in references])
    assert best.corpus["BLEU-3"] == pytest.approx(1) and best.corpus["ROUGE-L"] == 1
    assert best.each["CIDEr-D"][0] == pytest.approx(7.5)  # it has no four words, so one of four orders is missing
    for nothing in ("", "...", "!"):
        worst = scorer([nothing] * 3)
        assert worst.corpus["ROUGE-L"] == worst.corpus["CIDEr-D"] == 0 and worst.corpus["BLEU-1"] < 1e-9


def test_long_captions_are_punished_by_cider_d_and_not_by_the_unclipped_form():
    references = [["a dog"], ["a cat on a mat"], ["the sea"]]
    score = CaptionScorer(references)
    once, often = score(["a dog", "x", "x"]), score(["a dog " * 9, "x", "x"])
    assert often.each["CIDEr-D"][0] < 0.1 * once.each["CIDEr-D"][0]
    assert often.each["CIDEr-unclipped"][0] > 0.5 * once.each["CIDEr-unclipped"][0]


def test_a_set_of_one_image_has_no_rare_words():
    assert CaptionScorer([["a dog"]])(["a dog"]).each["CIDEr-D"].tolist() == [0.0]


def test_the_mean_over_the_images_is_the_score():
    scores = CaptionScorer(REFERENCES)(CAPTIONS)
    for name, each in scores.each.items():
        assert each.shape == (2,) and np.mean(each) == scores.corpus[name]


def test_missing_references_and_another_number_of_captions_are_named():
    with pytest.raises(ValueError, match="each image needs at least one"):
        CaptionScorer([["a"], []])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        CaptionScorer(REFERENCES)(CAPTIONS[:1])
