"""The tokenizer of a served model; where bytes are the tokens, one that reads and writes them."""

from __future__ import annotations

from typing import Any


def bytes_tokenizer() -> Any:
    """Token = byte; 0, which ends a document, is no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = {b: c for b in range(256) for c in [_letter(b)]}
    inner = Tokenizer(models.BPE(vocab={c: b for b, c in letters.items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    assert set(letters.values()) == set(ByteLevel.alphabet())
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=inner)


def _letter(byte: int) -> str:
    """The letter that byte-level tokenizers write for a byte (GPT-2): itself where it prints, else one from 256 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte if byte in printing else 256 + [b for b in range(256) if b not in printing].index(byte))
