"""`ray-ep trace`: which expert on which rank computed for a token of a run, and which text an expert prefers.

Reading and counting are ray_ep.observe.provenance; here is what is printed. Neither torch nor Ray is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ray_ep.observe.provenance.explain import Explanation
    from ray_ep.observe.provenance.path import TokenPath
    from ray_ep.observe.provenance.reader import Records

_MOST = 20
"""Steps or tokens that are listed."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), help="Training step, from 1.")
@click.option("--request", metavar="ID", help="Request, where tokens of requests were recorded.")
@click.option("--token", metavar="I", help="Position in the global batch (or request), or ROW:COLUMN.")
@click.option("--explain", "expert", metavar="LAYER/EXPERT", help="What an expert answered for, over all records.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the path as a page, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def trace(
    run: Path, step: int | None, request: str | None, token: str | None, expert: str | None, html: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show which expert on which rank computed for a token, layer by layer, and why the expert sits there.

    RUN is the directory of a run that was trained with provenance.sample, live or finished. With RUN alone: what was
    recorded. With --step: which tokens of it. With --token, too: the path of that token. Layers count the MoE layers
    from 0.

    --explain tells which text an expert prefers: what it answers for more often than for other tokens of the same
    documents, in three documents at least, by Mantel and Haenszel's test without the document that says it most.

    \b
      ray-ep trace runs/NAME --step 100
      ray-ep trace runs/NAME --step 100 --token 3:17 --html path.html
      ray-ep trace runs/NAME --explain 2/7
    """
    from ray_ep.errors import BadInput
    from ray_ep.observe.provenance.reader import Records

    records = Records(run)
    if step is not None and request is not None:
        raise BadInput("ray-ep trace: --step and --request are both given: give one of them")
    if (token is not None or html is not None) and step is None and request is None:
        raise BadInput("ray-ep trace: --token and --html need --step N or --request ID")
    if expert is not None:
        if step is not None or request is not None:
            raise BadInput("ray-ep trace: --explain counts over all records: give it without --step and --request")
        _explain(records, expert, as_json)
    elif step is None and request is None:
        _overview(records, as_json)
    else:
        _path(records, (step, request), token, html, as_json)
    if records.damaged:
        click.echo(f"ray-ep: left out, for they cannot be read: {', '.join(records.damaged)}", err=True)


def _overview(records: Records, as_json: bool) -> None:
    steps = records.steps()
    if as_json:
        click.echo(json.dumps({"steps": [{"step": s, "tokens": n} for s, n in steps.items()]}))
        return
    click.echo(f"{sum(steps.values()):,} tokens of {len(steps)} steps are recorded, in {len(records.parts)} files.")
    for step, tokens in list(steps.items())[-_MOST:]:
        click.echo(f"  step {step}: {tokens} tokens")


def _path(
    records: Records, which: tuple[int | None, str | None], token: str | None, html: Path | None, as_json: bool
) -> None:
    from ray_ep.errors import BadInput
    from ray_ep.observe.provenance.picture import write_picture
    from ray_ep.observe.provenance.reader import chosen

    tokens = records.tokens(*which)
    if token is None and len(tokens) > 1:
        if html is not None:
            raise BadInput(f"ray-ep trace: --html shows one token, {len(tokens)} were recorded: give --token I")
        _tokens(tokens, as_json)
        return
    path = _read(records, which, (tokens[0] if token is None else chosen(tokens, token)).position)
    if html is not None:
        try:
            write_picture(path, html)
        except OSError as e:
            raise BadInput(f"--html {str(html)!r}: cannot be written: {e.strerror or e}") from None
    if as_json:
        click.echo(json.dumps(path.to_dict()))
        return
    from rich.console import Console

    from ray_ep.observe.provenance.path import tree_of

    Console(highlight=False, soft_wrap=False).print(tree_of(path))


def _tokens(tokens: list[Any], as_json: bool) -> None:
    if as_json:
        rows = [{"position": t.position, "row": t.row, "column": t.column, "text": t.text} for t in tokens]
        click.echo(json.dumps({"tokens": rows}))
        return
    click.echo(f"{len(tokens)} tokens were recorded; --token takes the first number, or ROW:COLUMN:")
    for token in tokens[:_MOST]:
        click.echo(f"  {token.words()}")
    if len(tokens) > _MOST:
        click.echo(f"  and {len(tokens) - _MOST} more (all of them: --json)")


def _read(records: Records, which: tuple[int | None, str | None], position: int) -> TokenPath:
    """The path of one token, with the reasons for the present places of its experts."""
    from ray_ep.observe.provenance.path import path_of
    from ray_ep.observe.state import RunState

    state = RunState(records.run_dir)
    newest = state.placements.newest
    return path_of(records.of_token(*which, position), state.why, None if newest is None else newest.version)


def _explain(records: Records, words: str, as_json: bool) -> None:
    from ray_ep.errors import BadInput
    from ray_ep.observe.provenance.explain import explain
    from ray_ep.observe.state import RunState

    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", words.strip())
    if found is None:
        raise BadInput(f"--explain {words!r}: expected LAYER/EXPERT such as 2/7, both from 0")
    newest = RunState(records.run_dir).placements.newest
    if newest is None:
        raise BadInput(
            f"{str(records.run_dir / 'placements')!r}: no placement there can be read, which tells how many experts are"
        )
    it = explain(records, int(found[1]), int(found[2]), newest.num_experts)
    click.echo(json.dumps(it.to_dict()) if as_json else _explained(it))


def _explained(it: Explanation) -> str:
    from ray_ep.cli.table import table
    from ray_ep.observe.provenance.path import shown

    out = [it.words()]
    if it.preferences:
        head = ("prefers", "tokens", "answered", "of others", "odds", "documents", "z")
        rows = []
        for p in it.preferences[:_MOST]:
            text, odds = p.text if p.whole_class else f"'{shown(p.text)}'", "-" if p.odds is None else f"{p.odds:.1f}"
            shares = f"{p.share:.0%}", f"{p.elsewhere:.0%}"
            rows.append((text, f"{p.tokens:,}", *shares, odds, str(p.documents), f"{p.z:.1f}"))
        out += ["", table(head, rows)]
    if it.examples:
        out += ["", "For example:", *(f"  {e.words()}" for e in it.examples)]
    return "\n".join(out)
