"""The verbs that look at a run and change it, each one call of its control. Neither torch nor Ray is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ray_ep.cli.control.options import access, as_json, carry_out, change, client, mutation, number, text


@click.command()
@access
def status(where: str, **given: Any) -> None:
    """Print what a run is at: step, figures, ranks, the newest events.

    RUN_OR_ADDRESS is the directory of a run on this machine, or HOST:PORT of its control, with --token-file.

    \b
      ray-ep status runs/20260701-123005
      ray-ep status 10.0.3.17:7500 --token-file ~/.ray/auth_token --ca run.pem
    """
    from ray_ep.cli.control.words import lines
    from ray_ep.control.v1 import control_pb2 as pb

    with client(where, given) as it:
        found = it.call(pb.StatusRequest())
    click.echo(as_json(found) if given["as_json"] else "\n".join(lines(found.status)))


@click.command()
@change
@click.option("--version", type=int, callback=number, metavar="N", help="An earlier one, by its number.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write it as a placement file, too.")
@click.option("--propose", is_flag=True, help="What the planner finds now, and what it would bring; changes nothing.")
@click.option("--predict", metavar="FILE", help="What the placement in FILE would bring; changes nothing.")
@click.option("--apply", "apply_", metavar="FILE", help="Move experts to the placement in FILE.")
def placement(
    where: str,
    version: int | None,
    out: Path | None,
    propose: bool,
    predict: str | None,
    apply_: str | None,
    **given: Any,
) -> None:
    """Print which expert sits where in a run; predict another placement, or move to one.

    FILE is a placement as docs/placement.md has it; `ray-ep plan --out` writes one, and so does --propose --out.

    \b
      ray-ep placement runs/20260701-123005
      ray-ep placement runs/20260701-123005 --propose --out better.json
      ray-ep placement runs/20260701-123005 --apply better.json
    """
    from ray_ep.cli.control.words import placed, proposal
    from ray_ep.control.messages import placement_message, placement_of
    from ray_ep.control.v1 import control_pb2 as pb
    from ray_ep.errors import BadInput
    from ray_ep.placement.placement import Placement

    if sum([propose, predict is not None, apply_ is not None, version is not None]) > 1:
        raise BadInput("placement: give one of --version, --propose, --predict and --apply")
    guards = given["request_id"], given["if_epoch"], given["if_placement_version"]
    if apply_ is None and guards != ("", None, None):
        raise BadInput("placement: --request-id, --if-epoch and --if-placement-version go with --apply alone")
    if apply_ is not None and out is not None:
        raise BadInput("placement: --out writes what is shown: give it without --apply")
    if apply_ is not None:
        moved = pb.ApplyPlacementRequest(mutation=mutation(given), placement=placement_message(Placement.load(apply_)))
        carry_out(where, given, moved)
        return
    with client(where, given) as it:
        if propose or predict is not None:
            wanted = None if predict is None else placement_message(Placement.load(predict))
            found = it.call(pb.ProposePlacementRequest(placement=wanted), given["limit_s"])
        else:
            found = it.call(pb.GetPlacementRequest(version=version))
    if out is not None:
        try:
            out.write_text(placement_of(found.placement).to_json(), encoding="utf-8")
        except OSError as e:
            raise BadInput(f"--out {str(out)!r}: {e.strerror or e}") from None
    if given["as_json"]:
        click.echo(as_json(found))
    else:
        click.echo(
            "\n".join(placed(found.placement) if version is not None or not (propose or predict) else proposal(found))
        )


@click.command()
@change
def rebalance(where: str, **given: Any) -> None:
    """Have a run consider other places for its experts now.

    It decides after its next step, beside the steps, and moves experts where that pays back (placement.horizon_steps).
    The answer is the decision, with its reason. Works with placement.every=0, too.

    \b
      ray-ep rebalance runs/20260701-123005
    """
    from ray_ep.control.v1 import control_pb2 as pb

    carry_out(where, given, pb.RebalanceRequest(mutation=mutation(given)))


@click.command()
@change
@click.argument("ranks", metavar="N")
def scale(where: str, ranks: str, **given: Any) -> None:
    """Have a run go on with N ranks; N=auto: with as many as elastic.policy says.

    It keeps that number, whatever the policy, until it is asked for another one. The answer comes when the order
    stands; new ranks start beside the steps and join between two, and where the cluster has no room for them within
    elastic.wait_s, the run goes on without: `ray-ep top` shows it. Allowed are elastic.min_ranks to elastic.max_ranks.

    \b
      ray-ep scale runs/20260701-123005 4
      ray-ep scale runs/20260701-123005 auto
    """
    from ray_ep.control.v1 import control_pb2 as pb
    from ray_ep.errors import BadInput

    if ranks != "auto" and not (ranks.isdecimal() and 0 < int(ranks) < 1 << 32):
        raise BadInput(f"N={ranks!r}: expected a number of ranks from 1 on, or auto")
    count = 0 if ranks == "auto" else int(ranks)
    carry_out(where, given, pb.ScaleRequest(mutation=mutation(given), ranks=count))


@click.command()
@change
@click.argument("node", callback=text)
@click.option("--undo", is_flag=True, help="Take that back: ranks may be placed there again.")
def drain(where: str, node: str, undo: bool, **given: Any) -> None:
    """Have all ranks of a run leave NODE.

    NODE is a node's id as Ray says it, or the beginning of it, or its host's name or address. The ranks hand over what
    they own and go: no step is made again. No new rank of the run is placed there, until --undo.

    \b
      ray-ep drain runs/20260701-123005 10.0.3.17
      ray-ep drain runs/20260701-123005 10.0.3.17 --undo
    """
    from ray_ep.control.v1 import control_pb2 as pb

    carry_out(where, given, pb.DrainRequest(mutation=mutation(given), node=node, undo=undo))


@click.command()
@change
def checkpoint(where: str, **given: Any) -> None:
    """Have a run write a checkpoint now, between two steps; answered when it is whole.

    \b
      ray-ep checkpoint runs/20260701-123005
    """
    from ray_ep.control.v1 import control_pb2 as pb

    carry_out(where, given, pb.CheckpointRequest(mutation=mutation(given)))


@click.command()
@change
def pause(where: str, **given: Any) -> None:
    """Have a run make no further step until `ray-ep resume`.

    Ranks keep all they have, and their GPUs. They are watched: one that is lost is recovered from. Ranks may join and
    leave, experts move, and checkpoints be written meanwhile, as somebody asks.

    \b
      ray-ep pause runs/20260701-123005
    """
    from ray_ep.control.v1 import control_pb2 as pb

    carry_out(where, given, pb.PauseRequest(mutation=mutation(given)))


@click.command()
@change
def resume(where: str, **given: Any) -> None:
    """Have a run go on after `ray-ep pause`.

    \b
      ray-ep resume runs/20260701-123005
    """
    from ray_ep.control.v1 import control_pb2 as pb

    carry_out(where, given, pb.ResumeRequest(mutation=mutation(given)))


@click.command()
@change
def stop(where: str, **given: Any) -> None:
    """Have a run save and end, after the step that is under way; answered when its last checkpoint is written.

    \b
      ray-ep stop runs/20260701-123005
    """
    from ray_ep.control.v1 import control_pb2 as pb

    carry_out(where, given, pb.StopRequest(mutation=mutation(given)))


VERBS = (status, placement, rebalance, scale, drain, checkpoint, pause, resume, stop)
"""All of them."""
