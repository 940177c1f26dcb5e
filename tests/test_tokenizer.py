"""CLIP's tokenizer: padding rules, and training a small vocabulary."""

import json

import numpy as np
import pytest
import torch_checkpoints
from hypothesis import given
from hypothesis import strategies as st

from jaxpercept.checkpoints.tokenizer import load_tokenizer, tokenize, train_tokenizer
from jaxpercept.errors import UserError
from jaxpercept.models.config import CLIPTextConfig

CAPTIONS = [
    "a room with a red cube and two blue spheres on a wooden floor",
    "a striped wall behind three green cylinders, lit from the left",
    "a cone in front of a window, checkered floor",
]


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def tokenizer(request, tmp_path_factory):
    """SD 1.x pads with the end token, SD 2.x with "!"."""
    folder = tmp_path_factory.mktemp("tokenizer")
    size = torch_checkpoints.write_tokenizer(folder, request.param)
    return load_tokenizer(folder), size


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_tokenizer(CAPTIONS, folder, vocab_size=600, model_max_length=24)


def test_empty_prompt_is_two_tokens(tokenizer):
    tokenizer, size = tokenizer
    ids = tokenize(tokenizer, [""], None)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[size - 2, size - 1]])


def test_padding_and_truncation(tokenizer):
    tokenizer, size = tokenizer
    words = tokenizer.get_vocab()
    ids = tokenize(tokenizer, ["a Room", "red " * 50], 8)
    pad = tokenizer.pad_token_id
    np.testing.assert_array_equal(
        ids[0], [size - 2, words["a</w>"], words["room</w>"], size - 1, pad, pad, pad, pad]
    )
    np.testing.assert_array_equal(ids[1], [size - 2, *[words["red</w>"]] * 6, size - 1])
    assert tokenize(tokenizer, ["red " * 50], None).shape == (1, torch_checkpoints.POSITIONS)
    assert tokenize(tokenizer, [], 8).shape[0] == 0
    with pytest.raises(UserError, match="give a max_length"):
        tokenize(tokenizer, ["a", "a room"], None)


def test_missing_or_damaged_tokenizer(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(None)
    with pytest.raises(UserError, match=r"lacks vocab.json, merges.txt"):
        load_tokenizer(tmp_path)
    torch_checkpoints.write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="damaged tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_alone(tokenizer, tmp_path):
    """transformers 5 saves one file."""
    tokenizer, _ = tokenizer
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    again = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(
        tokenize(again, ["a red, Cube"], 12), tokenize(tokenizer, ["a red, Cube"], 12)
    )


def test_trained_settings_agree_with_the_config(trained):
    folder, settings = trained
    config = CLIPTextConfig(hidden_size=32, num_attention_heads=4, **settings)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == config.vocab_size <= 600
    assert tokenizer.bos_token_id == config.bos_token_id == config.vocab_size - 2
    assert tokenizer.eos_token_id == config.eos_token_id == config.vocab_size - 1
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.model_max_length == config.max_position_embeddings == 24
    ids = tokenize(tokenizer, [""], None)
    np.testing.assert_array_equal(ids, [[config.bos_token_id, config.eos_token_id]])


def test_vocabulary_has_clips_layout(trained):
    """256 bytes, 256 bytes at the end of a word, the merges, start and end."""
    folder, settings = trained
    vocab = json.loads((folder / "vocab.json").read_text())
    assert list(vocab.values()) == list(range(settings["vocab_size"]))
    tokens = list(vocab)
    assert all(len(token) == 1 for token in tokens[:256])
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    assert list(dict.fromkeys(m.replace(" ", "") for m in merges)) == tokens[512:-2]


def test_known_words_are_single_tokens(trained):
    tokenizer = load_tokenizer(trained[0])
    assert tokenizer.tokenize("a wooden floor") == ["a</w>", "wooden</w>", "floor</w>"]
    # Two special tokens and one a word or comma.
    assert tokenize(tokenizer, [CAPTIONS[2]], None).shape == (1, 2 + 10)


@given(text=st.text(st.characters(codec="utf-8", categories=("L", "P")), max_size=20))
def test_any_word_survives(trained, text):
    """The bytes are all there: no text has unknown parts, and decoding gives it back."""
    tokenizer = _cached(trained[0])
    text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    pieces = [p for p, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[1:-1]
    tokens = tokenizer.convert_ids_to_tokens(ids[1:-1])
    assert "".join(tokens).replace("</w>", " ").split() == pieces


_tokenizers = {}


def _cached(folder):
    if folder not in _tokenizers:
        _tokenizers[folder] = load_tokenizer(folder)
    return _tokenizers[folder]


def test_captions_round_trip(trained):
    tokenizer = load_tokenizer(trained[0])
    for caption in CAPTIONS:
        ids = tokenize(tokenizer, [caption], 24)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == caption.replace(",", " ,")


def test_training_is_reproducible_and_bounded(trained, tmp_path):
    train_tokenizer(iter(CAPTIONS), tmp_path, vocab_size=600)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()
    settings = train_tokenizer(CAPTIONS, tmp_path, vocab_size=530)
    assert settings["vocab_size"] == 530
    assert len(load_tokenizer(tmp_path)) == 530


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match="vocab_size=513 is too small"):
        train_tokenizer(CAPTIONS, tmp_path, vocab_size=513)
    with pytest.raises(UserError, match="no captions"):
        train_tokenizer([], tmp_path)
