"""A run on fake ranks that steps until somebody ends it, with its real control beside it."""

import threading
import time
from contextlib import contextmanager
from datetime import datetime

import grpc

from ray_ep.control.address import target_of
from ray_ep.control.client import Client, mutation
from ray_ep.control.server import Control
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.requests import Request, RequestKind
from ray_ep.driver.run.claim import Claim
from tests.driver.fakes import driven

RAY_TOKEN = "ray" * 16
STEP_S = 0.01
"""That a step of the fake ranks takes at least."""
LIMIT_S = 120.0
"""For what must come: the first placement that is planned on a machine has the planner compiled, between two steps."""


class Served:
    """The run, in a thread, and what was said of it."""

    def __init__(self, path, overrides, size):
        self.controls = []

        def control(cfg, run, requests, tell):
            self.controls.append(Control(cfg.control, run, requests, tell, lambda: RAY_TOKEN))
            return self.controls[0]

        own = ["optim.steps=1000000", "eval.every=0", "topology.measure=false", *overrides]
        self.it = driven(path, *own, size=size, look=lambda: time.sleep(STEP_S), control=control)
        self.run, self.ranks, self.requests, self.driver = self.it.run, self.it.ranks, self.it.requests, self.it.driver
        self.path, self.error, self.status = path, None, None

    def work(self):
        try:
            with self.driver.told():
                self.driver.form()
                self.status = self.driver.run()
        except BaseException as e:
            self.error = e

    def target(self):
        return target_of(str(self.path))

    def client(self):
        return Client(self.target())

    def call(self, request, limit_s=LIMIT_S):
        with self.client() as client:
            return client.call(request, limit_s)

    def status_now(self):
        return self.call(pb.StatusRequest()).status

    def until(self, condition, what, limit_s=LIMIT_S):
        limit = time.monotonic() + limit_s
        while not (answer := condition()):
            assert time.monotonic() < limit, what
            time.sleep(0.01)
        return answer

    def said(self, kind):
        return [e["message"] for e in self.run.events() if e["kind"] == kind]

    def alive(self):
        """Steps follow one another."""
        before = self.driver.done
        self.until(lambda: self.driver.done > before or self.error, "a step")
        assert self.error is None, self.error
        return True


@contextmanager
def served(path, *overrides, size=2):
    """Inside: the run steps, and its control listens or has said why not."""
    made = Served(path, overrides, size)
    claim = Claim(path, datetime(2026, 7, 1))
    thread = threading.Thread(target=made.work, daemon=True)
    with made.controls[0], made.it.publisher:
        thread.start()
        try:
            made.until(lambda: made.said("control") or made.error or not made.controls[0].cfg.enabled, "the control")
            assert made.error is None, made.error
            yield made
        finally:
            made.requests.put(Request(RequestKind.STOP, "the test"))
            thread.join(LIMIT_S)
            claim.release()
    assert not thread.is_alive()


def code_of(call):
    """Name of the status code with which a raw call ends."""
    try:
        call()
    except grpc.RpcError as e:
        return e.code().name
    return "OK"


def raw(target, method, message=b"", metadata=None, limit_s=LIMIT_S, channel=None):
    """A call as a stranger makes it: bytes to a method, with metadata of its own."""
    made = channel or grpc.insecure_channel(target.address)
    try:
        return made.unary_unary(f"/ray_ep.control.v1.ControlService/{method}")(message, limit_s, metadata=metadata)
    finally:
        made.close()


def shows(token):
    return (("authorization", f"Bearer {token}"),)


def change(kind, **fields):
    """A message of a change, under an id of its own."""
    return kind(mutation=mutation(fields.pop("epoch", None), fields.pop("version", None)), **fields)
