"""Faults that a test scripts: which rank fails, in which call, how. Each is written down as it happens, and counted.

In rank actors, of this process (`arm`) or of a command (`Place.train(faults=...)`), and on any object (`on`).
Not here: what must follow from a fault. Imports the standard library; ray and ray_ep where actors are armed.
"""

import importlib
import itertools
import json
import os
import pkgutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

STEP = "train_step"
MOVE = "ray_ep.moe.migrate:Shipment.exchange"  # once all ranks have agreed to move


@dataclass(frozen=True)
class Fault:
    """What happens to `rank` (None: to each) before its `call`-th call, from 1, of `at`.

    `at` is a method of `RankActor` or of the object given to `on`, or `module:Class.method` in a rank's process.
    """

    what: str
    rank: int | None
    at: str
    call: int = 1
    value: str | float = ""


@dataclass
class Faults:
    """A script, and the file in which each fault leaves a line before it happens. Methods that add one return self."""

    file: Path
    script: list[Fault] = field(default_factory=list)
    _undo: list = field(default_factory=list)

    def kill(self, rank, at=STEP, call=1):
        """SIGKILL of the rank's process."""
        return self._add(Fault("kill", rank, at, call))

    def stop(self, rank, at=STEP, call=1):
        """SIGSTOP of the rank's process: it lives, and answers nothing."""
        return self._add(Fault("stop", rank, at, call))

    def raise_in(self, rank, at=STEP, call=1, words="a scripted fault"):
        """ValueError(words)."""
        return self._add(Fault("raise", rank, at, call, words))

    def slow(self, seconds, at=STEP, call=1, rank=None):
        """This call and all later ones begin with a sleep."""
        return self._add(Fault("slow", rank, at, call, seconds))

    def on(self, thing, rank):
        """The same object (a group, say), whose methods follow the script of a rank."""
        for name, faults in by_place(self.script).items():
            if hasattr(thing, name):
                setattr(thing, name, followed(getattr(thing, name), faults, lambda _: rank, str(self.file)))
        return thing

    def arm(self):
        """Have the rank actors that this process makes from now on follow the script, until `disarm`."""
        self._undo.append(arm(self.script, str(self.file)))
        return self

    def disarm(self):
        """Actors are made as ever."""
        while self._undo:
            self._undo.pop()()

    def save(self):
        """Path of the script, for `python -m tests.faults SCRIPT train ...`."""
        path = self.file.with_suffix(".script")
        path.write_text(json.dumps([str(self.file), [asdict(f) for f in self.script]]))
        return str(path)

    def lines(self):
        """[{what, rank, at, call, pid}] of all that happened so far; `what` is `made` where a rank's actor was made."""
        return [json.loads(x) for x in self.file.read_text().splitlines()] if self.file.exists() else []

    def pid(self, rank):
        """Process of the rank that was made last."""
        return [x["pid"] for x in self.lines() if (x["what"], x["rank"]) == ("made", rank)][-1]

    def happened(self, what=None):
        """How many faults there were, of one kind or of any."""
        return sum(x["what"] == what if what else x["what"] != "made" for x in self.lines())

    def check(self):
        """Every fault of the script has happened; all but slowness exactly once a rank."""
        for f in self.script:
            same = [x for x in self.lines() if (x["what"], x["at"]) == (f.what, f.at) and f.rank in (None, x["rank"])]
            same = [x for x in same if f.what == "slow" or x["call"] == f.call]
            once = len(same) == len({x["rank"] for x in same}) or f.what == "slow"
            assert same, f"{f} has not happened"
            assert once, f"{f} has happened {len(same)} times"

    def _add(self, fault):
        self.script.append(fault)
        return self


def by_place(script):
    """{place: its faults}."""
    by = sorted(script, key=lambda f: f.at)
    return {at: list(faults) for at, faults in itertools.groupby(by, key=lambda f: f.at)}


def followed(function, faults, rank_of, file):
    """The function with faults before some of its calls; rank_of(arguments) says whose call it is."""
    calls = [0]

    def with_faults(*args, **kwargs):
        calls[0] += 1
        rank = rank_of(args)
        for fault in faults:
            now = calls[0] == fault.call or (fault.what == "slow" and calls[0] > fault.call)
            if now and fault.rank in (None, rank):
                happen(fault, calls[0], rank, file)
        return function(*args, **kwargs)

    return with_faults


def happen(fault, number, rank, file):
    """Write it down, then do it."""
    note(file, what=fault.what, rank=rank, at=fault.at, call=number)
    if fault.what == "raise":
        raise ValueError(fault.value)
    if fault.what == "slow":
        time.sleep(fault.value)
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault.what])


def note(file, **words):
    """A line, whole however the process ends next."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (json.dumps({**words, "pid": os.getpid()}) + "\n").encode())
    os.close(descriptor)


def arm(script, file):
    """Have rank actors that this process makes follow it; returns what undoes that.

    Ray sends the class as it is to the process of an actor: the script reaches ranks on any cluster, with nothing set.
    """
    from ray import cloudpickle

    from ray_ep.rank.actor import RankActor

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    meta = RankActor.__ray_metadata__
    actor, places = meta.modified_class, by_place(script)

    def init(self, rank, *args, **kwargs):
        note(file, what="made", rank=rank, at="__init__", call=1)
        for place, faults in places.items():
            if ":" in place:
                path, _, name = place.rpartition(".")
                owner = pkgutil.resolve_name(path)
                setattr(owner, name, followed(getattr(owner, name), faults, lambda _: rank, file))
        begin(self, rank, *args, **kwargs)

    begin = followed(actor.__init__, places.get("__init__", []), lambda args: args[1], file)
    methods = {at for at in places if ":" not in at and at != "__init__"}
    changed = {at: followed(getattr(actor, at), places[at], lambda args: args[0].rank, file) for at in methods}
    changed["__init__"] = init
    before = {name: vars(actor).get(name) for name in changed}
    for name, function in changed.items():
        setattr(actor, name, function)
    meta.last_export_cluster_and_job = None  # sent again

    def undo():
        for name, function in before.items():
            setattr(actor, name, function) if function else delattr(actor, name)
        meta.last_export_cluster_and_job = None

    return undo


if __name__ == "__main__":
    path, sys.argv = sys.argv[1], ["ray-ep", *sys.argv[2:]]
    log, faults = json.loads(Path(path).read_text())
    arm([Fault(**f) for f in faults], log)
    importlib.import_module("ray_ep.cli").main()
