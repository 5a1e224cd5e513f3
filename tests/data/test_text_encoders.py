"""Text encoders: cleaning, cutting, masks, and a T5 that is loaded as published ones are."""

import importlib.util
from pathlib import Path

import pytest
import torch

from data.text_encoders import T5, check_encoded, clean, open_text_encoder
from tests.text_encoders import VOCABULARY, WIDTH, save_t5

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5:
    return T5(str(folder), length=6)


def test_prompts_are_cleaned() -> None:
    assert clean("  A Dog&amp;amp;Cat\n in\tthe SUN ") == "a dog&cat in the sun"
    assert clean(clean("Tom &lt;3")) == clean("Tom &lt;3") == "tom <3"


def test_text_is_the_last_hidden_state_with_the_mask_and_pads_keep_their_values(encoder: T5) -> None:
    from transformers import T5EncoderModel

    out = encoder.encode(["A Dog", "the cat sleeps in the sun"])
    ids = torch.tensor([[VOCABULARY.index(w) for w in "a dog </s> <pad> <pad> <pad>".split()]])
    model = T5EncoderModel.from_pretrained(encoder.name, subfolder="text_encoder").eval()
    with torch.no_grad():
        expected = model(ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(out["text"][:1], expected)
    assert out["text_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6] and out["text_mask"].dtype == torch.float32
    assert out["text"].shape == (2, 6, WIDTH) and bool((out["text"][0, 3:] != 0).any())


def test_an_empty_prompt_is_the_end_alone_and_rows_do_not_depend_on_each_other(encoder: T5) -> None:
    null = encoder.encode([""])
    assert null["text_mask"].tolist() == [[1, 0, 0, 0, 0, 0]]
    many = encoder.encode(["a dog", *["the cat"] * 9, ""])
    torch.testing.assert_close(many["text"][10:], null["text"], rtol=1e-5, atol=1e-6)


def test_a_prompt_that_is_cut_says_where(encoder: T5) -> None:
    assert encoder.read_part("the cat sleeps in a") is None
    assert encoder.read_part("The  cat sleeps in the sun") == "the cat sleeps in the"
    cut, whole = encoder.encode(["the cat sleeps in the sun", "the cat sleeps in the"])["text"]
    torch.testing.assert_close(cut, whole)


def test_descriptions_tell_weights_apart(encoder: T5, tmp_path: Path) -> None:
    other = T5(str(save_t5(tmp_path, seed=1)), length=6).describe()
    own = encoder.describe()
    assert own["sha256"] != other["sha256"] and (own["width"], own["length"]) == (WIDTH, 6)
    assert T5(encoder.name, length=6).describe() == own


def test_encoders_open_by_name(folder: Path) -> None:
    assert open_text_encoder("words", 8).name == "words" and open_text_encoder(str(folder), 5).length == 5
    with pytest.raises(ValueError, match="words makes 8 tokens, and the network takes 120; give the one"):
        open_text_encoder("words", 120)


def test_what_cannot_be_loaded_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cannot load text_encoder and tokenizer of '.*none'"):
        open_text_encoder(str(tmp_path / "none"), 6)
    from safetensors.torch import load_file, save_file

    broken = save_t5(tmp_path / "broken") / "text_encoder" / "model.safetensors"
    weights = load_file(broken)
    save_file({k: v for k, v in weights.items() if "final_layer_norm" not in k}, broken, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights in .*broken/text_encoder lack encoder.final_layer_norm.weight"):
        open_text_encoder(str(tmp_path / "broken"), 6)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"T5 needs the package transformers; pip install '\.\[text\]'"):
        open_text_encoder(str(folder), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 6, 5)}, "text is 5 numbers wide, and the network takes 4"),
        ({"text": torch.zeros(2, 7, 4)}, "text has 7 tokens, and the network takes 6"),
        ({"text_mask": torch.ones(2, 5)}, r"text_mask is \(2, 5\), and the text \(2, 6, 4\): it needs \(2, 6\)"),
        ({"text": torch.full((2, 6, 4), torch.nan)}, "NaN or infinity"),
        ({"text_mask": torch.full((2, 6), 0.5)}, "must be 1 at tokens and 0 elsewhere"),
    ],
)
def test_encoded_text_of_another_shape_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {"text": torch.zeros(2, 6, 4), "text_mask": torch.ones(2, 6)}
    check_encoded(good, 4, 6)
    with pytest.raises(ValueError, match=message):
        check_encoded({**good, **change}, 4, 6)
