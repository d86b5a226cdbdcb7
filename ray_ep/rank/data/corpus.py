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
from ray_ep.rank.data.batch import Batch
from ray_ep.rank.data.chat import ChatTemplate
from ray_ep.rank.data.documents import open_source
from ray_ep.rank.data.packing import Rows, laid, rows_of_step
from ray_ep.rank.data.tokenizer import load_tokenizer

# A tokenizer takes 170 times the memory of what it gets at once (measured), so it gets 1 MB of whole lines.
_PIECE = re.compile(r".{1,1000000}(?:\n|\Z)|.{1,1000000}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents in reading order, each ended by byte 0, or by the tokenizer's eos token if it has one.

    Attributes:
        rows, held_out_rows: with data.pack=documents or off, the documents laid into rows; `train` and `held_out` are
            their tokens then. None: rows are windows that are cut anywhere.
    """

    train: np.ndarray  # [N] uint8 for bytes, else uint16 or uint32, whichever holds the vocabulary
    held_out: np.ndarray  # [M] of the same dtype; empty only if data.held_out=0, else at least one sequence
    vocab_size: int  # 256 for bytes, else one more than the tokenizer's highest id
    documents: int
    source: str  # one line for people
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # [D] first token of each in `train`
    rows: Rows | None = None
    held_out_rows: Rows | None = None

    def batch(self, seed: int, step: int, sequences: int, length: int) -> Batch:
        """The global batch of a step: a pure function of its arguments."""
        if self.rows is not None:
            return self.rows.batch(rows_of_step(len(self.rows), seed, step, sequences), length)
        starts = window_starts(len(self.train), seed, step, sequences, length)
        return _shifted(_windows(self.train, starts, length), starts[:, None] + np.arange(length))

    def held_out_batch(self, sequences: int, length: int) -> Batch:
        """The same rows of the held-out split at every call, `sequences` or as many as there are."""
        if self.held_out_rows is not None:
            return self.held_out_rows.batch(np.arange(min(sequences, len(self.held_out_rows))), length)
        ids = held_out_batch(self.held_out, sequences, length)
        return _shifted(ids, np.broadcast_to(np.arange(length), (len(ids), length)))


def load_corpus(cfg: DataConfig, length: int, seed: int = 0) -> Corpus:
    """Read, tokenize and split the text of a run; ``length`` is batch.length (a window has one token more).

    A document is held out by a hash of its text and ``seed`` (the same on every rank and on resuming), so equal
    documents fall on the same side. Where that leaves a side without a sequence, the last tokens are held out instead.

    Raises:
        DataError: files missing or unreadable, no text, less than one sequence, a tokenizer or dataset that fails.
    """
    encode, vocab_size = _tokenizer(cfg)
    source = open_source(cfg)
    origin, whole = source.origin, cfg.format == "chat" or cfg.pack in ("documents", "off")
    read = _Read()
    for number, document in enumerate(_limit(source.documents, cfg.max_bytes, cfg.format == "chat"), 1):
        tokens, counted = encode(document, f"{origin}, document {number}")
        read.add(tokens, counted, _is_held_out(document, cfg.held_out, seed), len(document))
    if not read.tokens:
        raise DataError(f"{origin}: no text there; data.files or data.dataset must name a non-empty document")
    words = f"{read.size:,} bytes of {origin} ({source.counted(len(read.held))})"
    if whole:
        return _whole_documents(cfg, read, length, vocab_size, words)
    train, held_out, starts = _split(read.tokens, read.held, cfg.held_out, length)
    if len(train) <= length:
        raise DataError(
            f"{origin}: {len(train) + len(held_out)} tokens (data.max_bytes={cfg.max_bytes}); one sequence needs "
            f"{length + 1} (batch.length + 1), and the held-out split as many (data.held_out={cfg.held_out}; 0: none)"
        )
    return Corpus(train, held_out, vocab_size, len(read.held), words, starts)


@dataclass(slots=True)
class _Read:
    """Documents as they were read."""

    tokens: list[np.ndarray] = field(default_factory=list)
    counted: list[np.ndarray] = field(default_factory=list)  # which tokens count when they are predicted
    held: list[bool] = field(default_factory=list)  # out, for evaluation
    size: int = 0  # bytes

    def add(self, tokens: np.ndarray, counted: np.ndarray | None, held: bool, size: int) -> None:
        """One more; counted None: all tokens count."""
        self.tokens.append(tokens)
        self.counted.append(np.ones(len(tokens), np.bool_) if counted is None else counted)
        self.held.append(held)
        self.size += size


def _whole_documents(cfg: DataConfig, read: _Read, length: int, vocab_size: int, words: str) -> Corpus:
    """The corpus of documents laid into rows. A long text goes on in the next row, a long conversation ends."""
    ends = cfg.format == "chat"
    pieces: list[tuple[np.ndarray, np.ndarray, bool]] = []
    for tokens, counted, held in zip(read.tokens, read.counted, read.held, strict=True):
        last = 1 if ends else max(len(tokens) - 1, 1)
        for start in range(0, last, length):  # one token twice: the last one predicts nothing
            end = start + length + 1
            pieces.append((tokens[start:end], counted[start:end], held))
    if cfg.held_out and len({held for *_, held in pieces}) < 2 and len(pieces) > 1:
        cut = len(pieces) - max(1, round(cfg.held_out * len(pieces)))
        pieces = [(t, c, i >= cut) for i, (t, c, _) in enumerate(pieces)]
    splits = []
    for side in (False, True):
        mine = [(t, c) for t, c, held in pieces if held is side]
        splits.append(laid([t for t, _ in mine], [c for _, c in mine], length, cfg.pack != "off"))
    train, held_out = splits
    cut_short = sum(len(t) > length + 1 for t in read.tokens) if ends else 0
    if cut_short:
        words += f", {cut_short:,} of them cut at batch.length={length}"
    if not len(train):
        raise DataError(f"{words}: no token that counts within batch.length={length}: give a longer one, or other data")
    out = held_out if cfg.held_out else None
    starts = train.starts[:-1]
    return Corpus(train.tokens, held_out.tokens, vocab_size, len(read.held), words, starts, train, out)


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


def _shifted(windows: np.ndarray, offsets: np.ndarray) -> Batch:
    """Each token of windows [B, T + 1] predicts the next one."""
    return Batch(windows[:, :-1], windows[:, 1:], offsets)


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


def _tokenizer(cfg: DataConfig) -> tuple[Callable[[bytes, str], tuple[np.ndarray, np.ndarray | None]], int]:
    """(a document and its place -> its tokens and its separator, and which of them count, vocabulary size)."""
    if cfg.tokenizer == "bytes":
        return lambda document, where: (np.frombuffer(document + b"\0", np.uint8), None), 256
    tokenizer, vocab_size = load_tokenizer(cfg.tokenizer)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    if cfg.format == "chat":
        template = ChatTemplate(tokenizer, cfg.tokenizer)

        def converse(document: bytes, where: str) -> tuple[np.ndarray, np.ndarray | None]:
            ids, said = template.encode(document, where)
            return ids.astype(dtype), said

        return converse, vocab_size
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype)

    def encode(document: bytes, where: str) -> tuple[np.ndarray, np.ndarray | None]:
        pieces = (tokenizer(p, add_special_tokens=False, verbose=False) for p in _PIECE.findall(document.decode()))
        return np.concatenate([*(np.array(p["input_ids"], dtype) for p in pieces), end]), None

    return encode, vocab_size


def _limit(documents: Iterable[bytes], max_bytes: int, uncut: bool) -> Iterator[bytes]:
    """The documents with text in them, as many whole ones as fit; a first one that does not is cut, unless `uncut`."""
    total = 0
    for document in filter(bytes.strip, documents):
        if max_bytes and total + len(document) > max_bytes:
            if total or uncut:
                return
            document = document[:max_bytes].decode("utf-8", "ignore").encode()
        total += len(document)
        yield document
