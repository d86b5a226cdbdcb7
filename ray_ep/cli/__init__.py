"""The `ray-ep` command: verbs, exit status, messages. Thin shells around ray_ep's public functions.

Imports torch and Ray only inside a verb, so `ray-ep --help` answers at once.
Exit status: 0 done, 1 failed while running, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import TYPE_CHECKING

import click

import ray_ep
from ray_ep.cli.bench_options import bench_options
from ray_ep.cli.bench_placement import bench_placement
from ray_ep.cli.bench_train import bench_train
from ray_ep.cli.chaos import chaos
from ray_ep.cli.control.top import top
from ray_ep.cli.control.verbs import VERBS
from ray_ep.cli.dashboards import dashboards
from ray_ep.cli.evaluate import evaluate
from ray_ep.cli.generate import generate
from ray_ep.cli.loading import loading
from ray_ep.cli.plan.command import plan
from ray_ep.cli.probe import probe
from ray_ep.cli.serve import serve
from ray_ep.cli.simulate.command import simulate
from ray_ep.cli.trace import trace

if TYPE_CHECKING:
    from ray_ep.bench.layer import LayerCase

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses of `ray-ep`: 130 is what a shell reports after SIGINT."""


class Cli(click.Group):
    """Turns the package's errors into one-screen messages and exit status."""

    def invoke(self, ctx: click.Context) -> object:
        from ray_ep.errors import BadInput, RayEPError
        from ray_ep.observe.phases import Phases

        self.phases = Phases()
        try:
            with self.phases:
                return super().invoke(ctx)
        except RayEPError as e:
            for line in (e, *getattr(e, "__notes__", ())):  # a note says what is lost, and how to go on
                click.echo(f"ray-ep: {line}", err=True)
            sys.exit(BAD_INPUT if isinstance(e, BadInput) else FAILED)
        except OSError as e:
            if e.errno != errno.ENAMETOOLONG:  # every question about such a path raises it, whoever asks
                raise
            click.echo(f"ray-ep: {str(e.filename)[:80]!r}...: {e.strerror}", err=True)
            sys.exit(BAD_INPUT)
        except KeyboardInterrupt:
            click.echo("ray-ep: interrupted", err=True)
            sys.exit(INTERRUPTED)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in ("plan", "simulate"):  # they say nothing before they are done
            self.phases(f"{name}: loading and computing")
        return name, command, rest


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ray_ep.__version__, prog_name="ray-ep")
def main() -> None:
    """Mixture-of-Experts models with expert parallelism on a Ray cluster.

    \b
    Start here:
      ray-ep train                          a small MoE on this machine, in a minute or two
      ray-ep train optim.steps=500          the same, longer
      ray-ep export runs/NAME OUT           the trained model as a transformers checkpoint
      ray-ep generate OUT --prompt TEXT     answers from it, or from any MoE checkpoint of transformers
      ray-ep eval OUT FILE                  its perplexity on the documents of a file
      ray-ep serve OUT                      the exported model over HTTP, as OpenAI's API has it
      ray-ep plan runs/NAME                 would other places for the experts be faster, and what would moving cost
      ray-ep simulate runs/NAME --nodes 2,4,8   how many GPUs of which kind: clusters that do not exist
      ray-ep probe cluster.ranks=4          how fast the links between ranks are
      ray-ep status runs/NAME               what a running job is at; `ray-ep top` shows it live
      ray-ep placement runs/NAME            which expert sits where in it; predict another placement, or move to one
      ray-ep rebalance runs/NAME            have it consider other places now
      ray-ep scale runs/NAME 4              have it go on with 4 ranks
      ray-ep drain runs/NAME NODE           have it leave a node
      ray-ep pause | resume | checkpoint | stop runs/NAME
      ray-ep dashboards install             graphs of runs in Ray's dashboard and Grafana
      ray-ep trace runs/NAME --step 100     which expert on which rank computed for which token
      ray-ep chaos --minutes 2              kill ranks and nodes of a run on purpose, and count what is lost

    Exit status: 0 done, 1 failed while running, 2 bad input, 130 interrupted.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep Ray's notice about it off the screen


main.add_command(chaos)
main.add_command(dashboards)
main.add_command(evaluate)
main.add_command(generate)
main.add_command(plan)
main.add_command(probe)
main.add_command(serve)
main.add_command(simulate)
main.add_command(trace)
main.add_command(top)
for verb in VERBS:
    main.add_command(verb)


@main.command()
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="Print the last step's figures as one JSON line.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def train(config: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Train a MoE model with expert parallelism.

    With no arguments: starts a local Ray (or joins the one RAY_ADDRESS names), makes 2 CPU ranks, and trains a small
    Qwen3-MoE on the Python standard library's source text. The run directory, with report.html, is printed at the end.

    \b
    Overrides are dotted keys of the configuration (docs/configuration.md), such as:
      ray-ep train cluster.ranks=4 cluster.cpus_per_rank=0.5
      ray-ep train model.type=mixtral model.overrides='{hidden_size: 128, intermediate_size: 256, num_hidden_layers: 4}'
      ray-ep train model.path=/models/my-moe data.files='[corpus/*.jsonl]' data.tokenizer=/models/my-moe
      ray-ep train resume=auto              goes on with the newest run, as it was
    """
    cfg = ray_ep.load_config(config, overrides)
    loading("train", mark="" if cfg.router.force == "none" else f"[router.force={cfg.router.force}] ")
    run = ray_ep.train(cfg)
    last = (run.metrics() or [{}])[-1]
    if as_json:
        click.echo(run.mark + json.dumps({"run": str(run.dir), "status": run.status, **last}))
    else:
        click.echo(f"{run.mark}{run.status}: {run.dir}/report.html")
    sys.exit(DONE if run.status == "done" else INTERRUPTED)


@main.command()
@click.argument("run", type=str)
@click.argument("out", type=click.Path(), metavar="DIR")
@click.option("--step", type=int, help="Which checkpoint; the newest if not given.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights; the run's own if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON line.")
def export(run: str, out: str, step: int | None, dtype: str | None, as_json: bool) -> None:
    """Write a RUN's checkpoint into DIR as a plain transformers checkpoint.

    RUN is a run directory, a directory of checkpoints or its URL, or one step-N of them. DIR must be new or empty;
    AutoModelForCausalLM.from_pretrained(DIR) then is the trained model. Tokenizer, chat template and generation
    settings are copied from data.tokenizer and model.path of the run.
    """
    loading("export", "torch and transformers")
    done = ray_ep.export(run, out, step, dtype)
    if as_json:
        click.echo(json.dumps(done))
    else:
        size = f"{done['tensors']} tensors, {done['bytes'] / 1e6:.1f} MB"
        rest = f"an adapter of {done['base']}" if "base" in done else f"tokenizer: {done['tokenizer']}"
        click.echo(f"step {done['step']}: {size} in {out}; {rest}")


@main.group()
def bench() -> None:
    """Measure: side by side in one run, with ratios."""


bench.add_command(bench_options)
bench.add_command(bench_placement)
bench.add_command(bench_train)


@bench.command("layer")
@click.option("--work", "works", default="A", show_default=True, help="A, B, C, G or several, such as A,B.")
@click.option("--dtype", "dtypes", default="float32,bfloat16", show_default=True, help="One or several.")
@click.option("--pass", "passes", default="forward,both", show_default=True, help="forward, both (with backward).")
@click.option("--ranks", help="One or several, such as 2,4; 2 if not given, on a GPU 1.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where ranks compute."
)
@click.option("--malloc", default="default,tuned", show_default=True, help="glibc as it comes, or keeping memory.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Interleaved rounds to count.")
@click.option("--peers", help="Peers to compare with, such as transformers; all that are installed if not given.")
@click.option("--routing", help="Impose routings, one or several such as zipf,80:4; `all` for all: see above.")
@click.option(
    "--llep",
    type=click.Path(),
    metavar="DIR",
    help="With --routing: compare with LLEP; DIR: a git clone of github.com/SalesforceAIResearch/LeastLoadedEP.",
)
@click.option("--brief", is_flag=True, help="With --routing: fewer contenders, without what only explains; see above.")
@click.option("--memory", is_flag=True, help="Also peak memory of each, in processes of its own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a row.")
def bench_layer(
    device: str,
    peers: str | None,
    memory: bool,
    as_json: bool,
    rounds: int,
    routing: str | None,
    llep: str | None,
    brief: bool,
    **lists: str | None,
) -> None:
    """The MoE layer against its peers and against the GEMM floor.

    With --device cuda: one rank, against plain transformers and as shares of what that GPU was measured to do at most.

    \b
    Works (tokens of a rank, hidden, ffn, experts, top_k):
      A  2048, 512, 1024, 16, 2     B  4096, 1024, 512, 64, 8     C  16, 512, 1024, 16, 2 (decode)
      G  16384, 2048, 768, 128, 8 (a GPU's)

    With --routing, how much of its balanced speed the layer keeps, with balance inside the step and without: balanced,
    zipf, RATIO:HOT (that share of the tokens picks among the first HOT experts), hot-rank, spread, ragged, zero,
    rotating, burst. With --llep DIR also LLEP's tokens/s and ours over them. --brief leaves out the layer without
    balance, LLEP's own balanced ideal and our layer on LLEP's experts.
    """
    loading("bench layer", "torch and transformers")
    from ray_ep.bench.layer import run
    from ray_ep.bench.table import cases, line, title
    from ray_ep.errors import BadInput

    chosen = None if peers is None else [p for p in peers.split(",") if p]
    lists["ranks"] = lists["ranks"] or ("1" if device == "cuda" else "2")
    rows = cases(rounds, **{k: v.split(",") for k, v in lists.items() if v is not None})
    if brief and routing is None:
        raise BadInput("bench layer --brief: it leaves out what --routing=... would compare: give one")
    if llep is not None and (device == "cuda" or routing is None):
        raise BadInput(
            "bench layer --llep: it is compared on imposed routings on CPUs: --routing=zipf,80:4, no --device"
        )
    if device == "cuda":
        if routing is not None or peers or memory or any(row.ranks != 1 for row in rows):
            raise BadInput(
                "bench layer --device cuda: it measures one rank beside plain transformers, with its peak memory: "
                "--ranks=1; no --routing, --peers, --memory"
            )
        _bench_on_device(rows, as_json)
        return
    if routing is not None:
        _bench_skew(rows, routing, llep, brief, as_json)
        return
    if not as_json:
        click.echo(title())
    for case in rows:
        result = run(case, chosen, memory)
        click.echo(json.dumps(result.to_dict()) if as_json else line(result))


@bench.command("step")
@click.argument("overrides", nargs=-1)
@click.option("--warm", type=click.IntRange(0), default=50, show_default=True, help="Steps before.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True, help="Rounds of 3 steps of each kind.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a row.")
def bench_step(overrides: tuple[str, ...], warm: int, rounds: int, as_json: bool) -> None:
    """Whole training steps in turn: balanced routing imposed, without and with balance inside the step.

    OVERRIDES are a run's, such as router.aux_coefficient=0 (then routing becomes skewed) or cluster.ranks=4.
    """
    loading("bench step", "torch and transformers")
    from ray_ep.bench.step import TITLE, run_step
    from ray_ep.config import load_config

    rows = run_step(load_config(None, overrides), warm, rounds)
    if not as_json:
        click.echo(TITLE)
    for row in rows:
        click.echo(json.dumps(row.to_dict()) if as_json else row.line())


def _bench_skew(rows: list[LayerCase], routing: str, llep: str | None, brief: bool, as_json: bool) -> None:
    from ray_ep.bench.llep import check_llep
    from ray_ep.bench.routing import ROUTINGS, check_routing
    from ray_ep.bench.skew import run_skew, title

    names = list(ROUTINGS) if routing == "all" else routing.split(",")
    for name in names:
        check_routing(name)
    if llep is not None:
        check_llep(llep, rows)
    if not as_json:
        click.echo(title(llep is not None))
    for case in rows:
        for result in run_skew(case, names, llep, brief):
            click.echo(json.dumps(result.to_dict()) if as_json else result.line())


def _bench_on_device(rows: list[LayerCase], as_json: bool) -> None:
    from ray_ep.bench.device import TITLE, Ceilings, measure_ceilings, name_of, run_on_device
    from ray_ep.collective.device import cuda_device

    device = cuda_device(None)
    ceilings: dict[str, Ceilings] = {}
    wanted = dict.fromkeys((c.work, c.dtype, c.backward, c.rounds) for c in rows)  # malloc is the CPU's affair
    for number, case in enumerate(wanted):
        dtype = case[1]
        if dtype not in ceilings:
            ceilings[dtype] = measure_ceilings(dtype, device)
            if not as_json:
                click.echo(f"{name_of(device)}, {dtype} {ceilings[dtype].line()}")
        result = run_on_device(*case, ceilings[dtype], device)
        if not as_json and not number:
            click.echo(TITLE)
        click.echo(json.dumps(result.to_dict()) if as_json else result.line())
