"""CLIP's tokenizer from the vocabulary that ships here: 49,408 tokens, no look-up in any hub."""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from dmm_core.environment import importing

VOCABULARY = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # how many lines of the file CLIP uses
LENGTH = 77


def _bytes_to_unicode() -> list[str]:
    """The printable stand-in of every byte, in CLIP's order (printable bytes first, then the others)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


@lru_cache(maxsize=1)
def clip_tokenizer():
    """A transformers ``CLIPTokenizer``, which pads with the end token."""
    with importing():
        from transformers import CLIPTokenizer

    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    letters = _bytes_to_unicode()
    words = letters + [c + "</w>" for c in letters] + ["".join(line.split()) for line in lines]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        merges.write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocab), str(merges), pad_token="<|endoftext|>", model_max_length=LENGTH)


def tokenize(prompts: list[str], pad_with_zero: bool = False) -> Tensor:
    """Token ids (B, 77), cut off at 77; CLIP-L pads with the end token, SDXL's second encoder with 0.

    0 is put in afterwards, as ComfyUI does: transformers would take every "!" of a prompt for its padding token.
    """
    tokenizer = clip_tokenizer()
    told = tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    if pad_with_zero:
        ended = (told == tokenizer.eos_token_id).cumsum(1)
        told = told.masked_fill(ended - (told == tokenizer.eos_token_id).long() > 0, 0)
    return told
