"""Writes the records of sampled tokens into a run's folder `provenance/`: whole Parquet files, bounded on disk.

A listener of the run: it works in the publisher's thread, so no step waits for it. Which tokens are sampled, and what
is recorded of them, is the ranks' affair.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from pyarrow import parquet

from ray_ep.config.sections.observing import ProvenanceConfig
from ray_ep.driver.records import Event, StepRecord
from ray_ep.observe.provenance.table import SCHEMA, Decode, tables_of
from ray_ep.rank.recorded import StepProvenance

FOLDER = "provenance"
"""Where the records are in a run directory."""
CLOSE_S = 60.0
"""Seconds after which a file is closed: a process that is killed loses so many of them at most."""
CLOSE_BYTES = 32 << 20
"""Bytes in memory after which it is closed; a file has a tenth of them or so."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One file: the records of steps `first` to `last`; no other file has these steps."""

    first: int
    last: int
    path: Path


def parts_of(run_dir: Path) -> list[Part]:
    """The whole files of a run, by steps, none of which is in two of them."""
    found: dict[int, Part] = {}
    with suppress(OSError):
        for path in (run_dir / FOLDER).iterdir():
            if m := re.fullmatch(r"steps-(\d+)-(\d+)\.parquet", path.name):
                part = Part(int(m[1]), int(m[2]), path)
                # A process that was killed while it cut a file short left the whole one, too.
                found[part.first] = min(part, found.get(part.first, part))
    return sorted(found.values())


class ProvenanceFiles:
    """Keeps the records of a run: a listener of the driver, and a context manager that closes the last file.

    Args:
        decoder: makes what turns ids of tokens into text; called when there is something to write.
        tell: publishes an event.
        clock: seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        provenance: ProvenanceConfig,
        decoder: Callable[[], Decode],
        tell: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_dir, self._limit_mb, self._decoder, self._tell, self._clock = (
            run_dir, provenance.disk_mb, decoder, tell, clock,
        )  # fmt: skip
        self._decode: Decode | None = None
        self._waiting: list[tuple[int, StepProvenance]] = []
        self._bytes, self._since = 0, 0.0  # of what waits
        self._last = max((part.last for part in parts_of(run_dir)), default=0)  # step that there are records of
        self._removed, self._failed = 0, False

    def __enter__(self) -> ProvenanceFiles:
        """Nothing is written before there is something to write."""
        return self

    def __exit__(self, *error: object) -> None:
        """All records are on disk, as far as there is room."""
        self.close()

    def start(self, event: Event) -> None:
        """The run begins; half a file that a killed process left is taken away, and one that it has cut short."""
        whole = [part.path for part in parts_of(self._run_dir)]
        for path in (self._run_dir / FOLDER).glob("*"):
            if path.suffix == ".part" or (path.match("steps-*.parquet") and path not in whole):
                with suppress(OSError):
                    path.unlink()

    def step(self, record: StepRecord) -> None:
        """Keep what was recorded of a step; one that was made again replaces its records, and those of later steps."""
        if record.step <= self._last:
            self._forget(record.step)
        if record.provenance is not None:
            if not self._waiting:
                self._since = self._clock()
            self._waiting.append((record.step, record.provenance))
            self._bytes += sum(p.experts.nbytes * 3 + p.context.nbytes for p in record.provenance.parts)
            self._last = record.step
        if self._bytes >= min(CLOSE_BYTES, self._limit_mb << 18) or self._clock() - self._since >= CLOSE_S:
            self.close()

    def event(self, event: Event) -> None:
        """After a checkpoint its steps are not made again: their records go to disk."""
        if event.kind == "checkpoint":
            self.close()

    def close(self) -> None:
        """Write what waits as one file, and make room for it; a full disk is told once, and the run goes on."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            return
        try:
            self._decode = self._decode or self._decoder()
            self._write(waiting[0][0], waiting[-1][0], tables_of(waiting, self._decode))
            self._make_room()
            self._failed = False
        except Exception as e:  # of any kind (a tokenizer that is gone, too): it is no reason to end a run
            if not self._failed:
                self._failed = True
                where, why = self._run_dir / FOLDER, getattr(e, "strerror", None) or e
                words = f"{where} cannot be written: {why}: records of sampled tokens are lost; the run goes on"
                self._tell(Event("provenance", words))

    def _write(self, first: int, last: int, tables: Iterable[pa.Table]) -> None:
        folder = self._run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"steps-{first:08d}-{last:08d}.parquet"
        half = folder / f".{path.stem}.part"  # hidden: a reader of the whole folder, such as pandas, passes it over
        try:
            with parquet.ParquetWriter(half, SCHEMA, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
            half.replace(path)  # nobody reads half of it
        except BaseException:
            with suppress(OSError):
                half.unlink()
            raise

    def _forget(self, step: int) -> None:
        """Records of `step` and later ones are of no worth any more: these steps are made again."""
        self._waiting = [(s, p) for s, p in self._waiting if s < step]
        for part in parts_of(self._run_dir):
            if part.last < step:
                continue
            if part.first < step:  # what cannot be kept of it is lost, so that no step is there twice
                with suppress(OSError, pa.ArrowException):
                    table = parquet.read_table(part.path)
                    self._write(part.first, step - 1, [table.filter(pc.field("step") < step)])
            with suppress(OSError):
                part.path.unlink()
        self._last = step - 1

    def _make_room(self) -> None:
        """The oldest files go while all together are larger than allowed."""
        parts = parts_of(self._run_dir)
        sizes = [_size(part.path) for part in parts]
        total, limit, gone = sum(sizes), self._limit_mb << 20, 0
        while total > limit and gone < len(parts):
            parts[gone].path.unlink(missing_ok=True)
            total -= sizes[gone]
            gone += 1
        for number in range(self._removed + 1, self._removed + gone + 1):
            if str(number).strip("0") == "1":  # the 1st, 10th, 100th: not once a minute for days
                self._tell(self._about_room(number, parts, sizes, gone))
        self._removed += gone

    def _about_room(self, number: int, parts: list[Part], sizes: list[int], gone: int) -> Event:
        key, last = f"provenance.disk_mb={self._limit_mb}", parts[gone - 1].last
        fields: dict[str, Any] = {"removed": number, "last_step": last, "disk_mb": self._limit_mb}
        if gone == len(parts):
            words = f"{key} is less than one file of records takes ({sizes[-1] / 2**20:.1f} MiB): nothing is kept; "
            return Event("provenance", words + "give more, or a smaller provenance.sample", fields)
        return Event(
            "provenance", f"{key} is full: records of steps up to {last} were removed, the oldest first", fields
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
