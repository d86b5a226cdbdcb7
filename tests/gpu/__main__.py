"""Everything on a machine with a GPU, in about six minutes, and what to send back at the end: `make gpu`.

python -m tests.gpu [--device cpu]. It installs nothing. Each part is a process with a limit and a log of its own, in
$OUT or runs/gpu-<time>. Exit status: 0 no part failed, 1 one did, 2 there is no GPU. `--device cpu` rehearses on a CPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "=" * 30
TOTAL_S = 570.0  # of all parts together
LINES = 40
GRACE_S = 8.0  # between the request to end and the kill
WIDTH = 200
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        shown: what of its log belongs into the report, a pattern of lines; the last LINES of them.
        detail: what comes before that, another pattern; the first LINES of them.
        needs: packages without which it is left out.
    """

    name: str
    words: list[str]
    limit_s: float
    shown: str = "."
    detail: str = "^$"
    needs: tuple[str, ...] = ("torch", "transformers")


def parts(device):
    """In order; the sum of their limits is above six minutes, what they should take on a free machine is below."""
    test = [
        "-m", "pytest", "-v", "-ra", "-p", "no:cacheprovider", "--tb=short", "--timeout=100", "--device", device,
        "-o", "faulthandler_timeout=60", "-W", "default",
    ]  # fmt: skip
    cli = ["-c", "from ray_ep.cli import main; main()"]
    works, rounds = ("B,G", "10") if device == "cuda" else ("C", "2")
    bench = [
        *cli, "bench", "layer", "--work", works, "--dtype", "bfloat16", "--rounds", rounds,
        *(["--device", "cuda"] if device == "cuda" else ["--malloc=default", "--peers="]),
    ]  # fmt: skip
    outcome = r"^(FAILED|ERROR|SKIPPED) |(passed|failed|error).* in [\d.]+", r"^E  "
    needs = ("torch", "transformers", "pytest", "pytest_timeout")
    together, train = "tests/gpu/test_together.py", "tests/gpu/test_train.py"
    leave_out = [f"--ignore={path}" for path in (together, train)]
    kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/moe/test_cuda_*.py"))
    return [
        Part("versions", ["-m", "tests.gpu.versions", device], 60, needs=()),
        Part("tests", [*test, "tests/gpu", *kernels, *leave_out], 180, *outcome, needs=needs),
        Part("bench", bench, 100, r"^(?!ray-ep|.*loading)"),
        Part("kernels", ["-m", "tests.gpu.profile", device, works[-1]], 60, r"^(?!USDT)"),
        Part("ranks that share the GPU", [*test, together], 200, *outcome, needs=needs),
        Part("train", [*test, train], 120, *outcome, needs=(*needs, "ray")),
    ]


@dataclass(frozen=True)
class Ended:
    """How a part ended: `verdict` in a few words, and what of its log is shown."""

    part: Part
    verdict: str
    seconds: float
    shown: list[str]

    @property
    def passed(self):
        return self.verdict == "passed" or self.verdict.startswith("left out")


def run_part(part, out, left_s=TOTAL_S, grace_s=GRACE_S):
    """Run it; at its limit, after `left_s`, or at Ctrl-C it is asked to end, with all that it started, then killed."""
    missing = [name for name in part.needs if find_spec(name) is None]
    if missing:
        return Ended(part, f"left out: {', '.join(missing)} missing", 0.0, [])
    limit_s = min(part.limit_s, left_s)
    if limit_s < min(part.limit_s, 10.0):
        return Ended(part, f"not reached within {TOTAL_S:g} s", 0.0, [])
    log = out / f"{part.name.replace(' ', '-')}.log"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": str(WIDTH)}
    began = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *part.words], stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
            verdict = "passed" if not status else f"exit status {status}"
        except subprocess.TimeoutExpired:
            verdict, status = f"over its limit of {limit_s:.0f} s", None
        except KeyboardInterrupt:
            verdict, status = INTERRUPTED, None
        finally:
            end(process, grace_s)
    text = log.read_text(errors="replace").splitlines()
    shown = [line for line in text if re.search(part.detail, line)][:LINES]
    shown += [line for line in text if re.search(part.shown, line)][-LINES:]
    if status is None or (status and not shown):
        shown += ["...", *text[-15:]]
    return Ended(part, verdict, time.monotonic() - began, [line[:WIDTH] for line in shown])


def end(process, grace_s):
    """End a session of processes: by SIGINT, then by SIGKILL."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(grace_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def block(ended):
    """The text to send back."""
    lines = [f"{MARK} send this back {MARK}"]
    for e in ended:
        lines += [f"--- {e.part.name}: {e.verdict}, {e.seconds:.0f} s", *e.shown]
    return "\n".join([*lines, MARK * 2 + "=" * 16])


def main(words):
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args(words).device
    out = Path(os.environ.get("OUT") or ROOT / "runs" / time.strftime("gpu-%Y%m%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    ended, until = [], time.monotonic() + TOTAL_S
    for part in parts(device):
        print(f"{part.name} (at most {part.limit_s:g} s) ...", flush=True)
        ended.append(run_part(part, out, until - time.monotonic()))
        print(f"  {ended[-1].verdict}, {ended[-1].seconds:.0f} s", flush=True)
        if part.name == "versions" and not ended[-1].passed:
            print("\n".join(ended[-1].shown), file=sys.stderr)
            return 2
        if ended[-1].verdict == INTERRUPTED:
            break
    text = block(ended)
    (out / "report.txt").write_text(text + "\n")
    print(f"{text}\nlogs: {out}")
    return 0 if all(e.passed for e in ended) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
