"""CLIP's tokenizer: reading it, applying it, and training a small one for a small model."""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from jaxpercept.checkpoints.values import in_short
from jaxpercept.checkpoints.weights import atomic_write, write_json
from jaxpercept.errors import UserError
from jaxpercept.models.config import CLIPTextConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Tokenize = Callable[[Sequence[str]], Int32[np.ndarray, "n l"]]
"""Texts -> ids, padded to one length."""
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
_MAX_LENGTH = 2**16
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def missing_tokenizer_files(folder: Path) -> list[str]:
    """Names of the files without which the folder is no CLIP tokenizer; [] if it is one."""
    if (folder / "tokenizer.json").is_file():
        return []
    return [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]


def load_tokenizer(folder: str | Path | None) -> Any:
    """The tokenizer in a folder, as transformers' `CLIPTokenizer`, whatever class the files name.

    Raises:
      UserError: no tokenizer there, or a damaged one.
    """
    if folder is None:
        raise UserError("The checkpoint has no tokenizer; add the folder of its base model.")
    folder = Path(folder)
    if missing := missing_tokenizer_files(folder):
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; copy the tokenizer of the base model there."
        )
    from transformers import CLIPTokenizer  # imported here: it takes seconds

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        longest = tokenizer.model_max_length
        if type(longest) not in (int, float) or not longest >= 2:
            raise ValueError(f"its model_max_length is {longest!r}")
    except Exception as error:  # the Rust library raises Exception itself on a damaged vocabulary
        reason = in_short((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"{folder} holds a damaged tokenizer ({reason}); download it again."
        ) from None
    return tokenizer


def padded_tokenizer(folder: str | Path | None, config: CLIPTextConfig) -> Tokenize:
    """The tokenizer in a folder as a picklable function: texts -> ids of the text tower's length.

    Raises:
      UserError: no tokenizer there, a damaged one, or not that of the text tower.
    """
    tokenizer = load_tokenizer(folder)
    tokens = functools.partial(
        tokenize, tokenizer, max_length=text_length(tokenizer, config), vocabulary=config.vocab_size
    )
    tokens([""])  # the last entries of a vocabulary are its start and its end
    return tokens


def text_length(tokenizer: "CLIPTokenizer | Any", config: CLIPTextConfig) -> int:
    """Tokens of a padded text."""
    return min(tokenizer.model_max_length, config.max_position_embeddings)


def tokenize(
    tokenizer: "CLIPTokenizer | Any",
    texts: Sequence[str],
    max_length: int | None,
    vocabulary: int | None = None,
) -> Int32[np.ndarray, "n l"]:
    """Token ids with start and end token, truncated to what the tokenizer says it can take.

    Args:
      max_length: pad or truncate to this length; None leaves texts unpadded, as GenPercept and
        Marigold do for the empty prompt, which then is two tokens.
      vocabulary: how many tokens the text tower knows; None: whatever comes.

    Raises:
      UserError: `max_length` is None and the texts have different lengths, or a token is not of the
        vocabulary.
    """
    if not texts:
        return np.zeros((0, max_length or 0), np.int32)
    # transformers gives 10^30 where the files name no length.
    length = min(tokenizer.model_max_length, _MAX_LENGTH) if max_length is None else max_length
    ids = tokenizer(
        list(texts),
        padding=False if max_length is None else "max_length",
        truncation=True,
        max_length=length,
    )["input_ids"]
    if len({len(row) for row in ids}) > 1:
        raise UserError("The prompts differ in length when tokenised; give a max_length to pad to.")
    ids = np.asarray(ids).astype(np.int32)
    if vocabulary is not None and (not ids.size or ids.min() < 0 or ids.max() >= vocabulary):
        raise UserError(
            f"{tokenizer.name_or_path} gives tokens that the text encoder does not know (it has "
            f"{vocabulary}): use the tokenizer of the same model."
        )
    return ids


def train_tokenizer(
    captions: Iterable[str],
    folder: str | Path,
    vocab_size: int = 2048,
    model_max_length: int = 24,
) -> dict[str, int]:
    """Trains a byte-pair vocabulary in CLIP's format and writes it into a folder.

    The vocabulary is laid out as OpenAI's: the 256 bytes, the same at the end of a word, one token
    a merge, start and end token. It covers every text, whatever the captions hold. The same
    captions give the same files.

    Args:
      captions: the texts to be short in tokens.
      vocab_size: upper bound; fewer where the captions have nothing more to merge.
      model_max_length: positions of the text encoder.

    Returns:
      The settings that a `CLIPTextConfig` for this tokenizer needs: vocab_size,
      max_position_embeddings, bos_token_id, eos_token_id, pad_token_id.

    Raises:
      UserError: vocab_size has no room for the bytes, or there are no captions.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = letters + [letter + WORD_END for letter in letters]
    if vocab_size < len(base) + 2:
        raise UserError(
            f"vocab_size={vocab_size} is too small: bytes and special tokens take {len(base) + 2}."
        )
    trained = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    clip = CLIPTokenizer().backend_tokenizer  # how it cleans and cuts text into words
    trained.normalizer, trained.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=base,  # fixed ids: ties between merges are broken by them
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)

    vocab = {token: i for i, token in enumerate(base)}
    merges = []
    for left, right in json.loads(trained.to_str())["model"]["merges"]:
        if len(vocab) == vocab_size - 2:
            break
        merges.append(f"{left} {right}")
        vocab.setdefault(left + right, len(vocab))
    if not merges:
        raise UserError("There are no captions to train a tokenizer on; give some text.")
    for token in (BOS, EOS):
        vocab[token] = len(vocab)

    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    with atomic_write(folder / "merges.txt") as file:
        file.write("\n".join(["#version: 0.2", *merges, ""]).encode())
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": model_max_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
    )
    return {
        "vocab_size": len(vocab),
        "max_position_embeddings": model_max_length,
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": vocab[EOS],
    }
