"""`GeneratingRanks` without Ray: one generator of this process, asked as the actors are."""

import threading
from contextlib import nullcontext

from ray_ep.collective import SoloGroup
from ray_ep.errors import LostError
from ray_ep.rank.generate.actor import News
from tests.rank.generate.answering import generator_of


class LocalRanks:
    """What an engine and the harness need of the ranks."""

    actors = [None]

    def __init__(self, path, model, *overrides):
        self.generator, _ = generator_of(SoloGroup(), path, model, *overrides)
        self.generator.tell = self._tell
        self.deltas, self.lost, self.told = [], "", threading.Condition()

    def _tell(self, deltas):
        with self.told:
            self.deltas += deltas
            self.told.notify_all()

    def open(self):
        return self.generator.open(), self.generator.note

    def close(self, hard):
        self.generator.close(hard)

    def submit(self, rank, requests, cancel=()):
        self.generator.submit(requests, cancel)

    def move(self, placement, buffer_mb):
        return [self.generator.move(placement, buffer_mb)]

    def score(self, rows):
        return self.generator.score(rows)

    def in_background(self):
        return nullcontext()

    def news(self, wait_s):
        with self.told:
            self.told.wait_for(lambda: bool(self.deltas), wait_s)
            deltas, self.deltas = self.deltas, []
        return [(0, News(deltas, self.generator.status(), self.generator.failed))]

    def alive(self):
        return not self.lost

    def beat(self):
        if self.lost:
            raise LostError(0, self.lost, (0,))
