"""Words as ones and zeros: which word, and where."""

import pytest
import torch

from data.words import LENGTH, WORDS, Words


def test_a_token_is_its_word_and_its_place() -> None:
    encoder = Words()
    out = encoder.encode(["a small seven moving right", "", "Seven"])
    assert out["text"].shape == (3, LENGTH, encoder.width) and out["text"].dtype == torch.float32
    assert out["text_mask"].sum(dim=1).tolist() == [6, 1, 2]
    words, places = out["text"].split([len(WORDS), LENGTH], dim=-1)
    read = [WORDS[i] for i in words[0, :6].argmax(dim=-1)]
    assert read == ["a", "small", "seven", "moving", "right", "</s>"]
    assert torch.equal(places[0, :6], torch.eye(LENGTH)[:6]) and torch.equal(words.sum(-1), out["text_mask"])
    assert not out["text"][0, 6:].any() and WORDS[int(words[2, 0].argmax())] == "seven"


def test_captions_that_are_too_long_are_cut_and_say_where() -> None:
    encoder, long = Words(), "a a a a a a one two three"
    assert encoder.read_part(long) == "a a a a a a one" and encoder.read_part("a small one on the right") is None
    cut, whole = encoder.encode([long, "a a a a a a one"])["text"]
    assert torch.equal(cut, whole)


def test_unknown_words_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown word 'purple'; known: zero one .* bottom$"):
        Words().encode(["a purple one"])


def test_the_description_has_the_size_and_a_digest() -> None:
    own = Words().describe()
    assert own["name"] == "words" and own["width"] == len(WORDS) + LENGTH and len(str(own["sha256"])) == 64
