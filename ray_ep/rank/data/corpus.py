"""Training text -> tokens, and the windows of tokens that make up a batch.

Tokenizes the documents that documents.py reads, and holds some of them out.
Knows nothing of ranks, devices or torch: who gets which window is the caller's affair.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ray_ep.config.schema import DataConfig
from ray_ep.errors import DataError
from ray_ep.rank.data.documents import open_source
from ray_ep.rank.data.tokenizer import load_tokenizer

# A tokenizer takes 170 times the memory of what it gets at once (measured), so it gets 1 MB of whole lines.
_PIECE = re.compile(r".{1,1000000}(?:\n|\Z)|.{1,1000000}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents in reading order, each ended by byte 0, or by the tokenizer's eos token if it has one."""

    train: np.ndarray  # [N] uint8 for bytes, else uint16 or uint32, whichever holds the vocabulary
    held_out: np.ndarray  # [M] of the same dtype; empty only if data.held_out=0, else at least one sequence
    vocab_size: int  # 256 for bytes, else one more than the tokenizer's highest id
    documents: int
    source: str  # one line for people
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # [D] first token of each in `train`


def load_corpus(cfg: DataConfig, length: int, seed: int = 0) -> Corpus:
    """Read, tokenize and split the text of a run; ``length`` is batch.length (a window has one token more).

    A document is held out by a hash of its text and ``seed`` (the same on every rank and on resuming), so equal
    documents fall on the same side. Where that leaves a side without a sequence, the last tokens are held out instead.

    Raises:
        DataError: files missing or unreadable, no text, less than one sequence, a tokenizer or dataset that fails.
    """
    encode, vocab_size = _tokenizer(cfg.tokenizer)
    source = open_source(cfg)
    origin = source.origin
    tokens, held, size = [], [], 0
    for document in _limit(source.documents, cfg.max_bytes):
        tokens.append(encode(document))
        held.append(_is_held_out(document, cfg.held_out, seed))
        size += len(document)
    if not tokens:
        raise DataError(f"{origin}: no text there; data.files or data.dataset must name a non-empty document")
    train, held_out, starts = _split(tokens, held, cfg.held_out, length)
    if len(train) <= length:
        raise DataError(
            f"{origin}: {len(train) + len(held_out)} tokens (data.max_bytes={cfg.max_bytes}); one sequence needs "
            f"{length + 1} (batch.length + 1), and the held-out split as many (data.held_out={cfg.held_out}; 0: none)"
        )
    words = f"{size:,} bytes of {origin} ({source.counted(len(held))})"
    return Corpus(train, held_out, vocab_size, len(held), words, starts)


def global_batch(tokens: np.ndarray, seed: int, step: int, sequences: int, length: int) -> np.ndarray:
    """Windows at random offsets, [sequences, length + 1] int64: a pure function of its arguments.

    ``tokens`` [N] must hold at least length + 1 tokens, as `load_corpus` makes sure.
    """
    return _windows(tokens, window_starts(len(tokens), seed, step, sequences, length), length)


def window_starts(tokens: int, seed: int, step: int, sequences: int, length: int) -> np.ndarray:
    """Where the windows of `global_batch` begin among so many tokens: int64 [sequences]."""
    return np.random.default_rng((seed, step)).integers(0, tokens - length, size=sequences)


def held_out_batch(tokens: np.ndarray, sequences: int, length: int) -> np.ndarray:
    """The same evenly spaced windows at every call, [n, length + 1] int64.

    n is ``sequences``, or as many as fit in ``tokens`` [M] without predicting a token twice (0 if none fits).
    """
    count = max(0, min(sequences, (len(tokens) - 1) // length))
    return _windows(tokens, np.arange(count) * (len(tokens) - length - 1) // max(count - 1, 1), length)


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def _is_held_out(document: bytes, share: float, seed: int) -> bool:
    digest = hashlib.blake2b(document, digest_size=8, key=str(seed).encode())
    return int(digest.hexdigest(), 16) < share * 2**64


def _split(
    tokens: list[np.ndarray], held: list[bool], share: float, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(train, held out, starts of documents in train).

    By document, or the tail of all tokens where that leaves a side without a sequence.
    """
    everything, sizes = np.concatenate(tokens), np.array([len(t) for t in tokens])
    mask = np.repeat(held, sizes)
    if share == 0 or min(mask.sum(), (~mask).sum()) > length:
        return everything[~mask], everything[mask], _starts(sizes[~np.array(held)])
    cut = max(0, len(everything) - max(length + 1, int(share * len(everything))))
    return everything[:cut], everything[cut:], _starts(sizes)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


def _tokenizer(name: str) -> tuple[Callable[[bytes], np.ndarray], int]:
    """(a document in UTF-8 -> its tokens and its separator, vocabulary size)."""
    if name == "bytes":
        return lambda document: np.frombuffer(document + b"\0", np.uint8), 256
    tokenizer, vocab_size = load_tokenizer(name)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype)

    def encode(document: bytes) -> np.ndarray:
        pieces = (tokenizer(p, add_special_tokens=False, verbose=False) for p in _PIECE.findall(document.decode()))
        return np.concatenate([*(np.array(p["input_ids"], dtype) for p in pieces), end])

    return encode, vocab_size


def _limit(documents: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """The documents with text in them, as many whole ones as fit; a first one that does not fit is cut."""
    total = 0
    for document in filter(bytes.strip, documents):
        if max_bytes and total + len(document) > max_bytes:
            if total:
                return
            document = document[:max_bytes].decode("utf-8", "ignore").encode()
        total += len(document)
        yield document
