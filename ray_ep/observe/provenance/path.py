"""The path of one token through the MoE layers, made of its records; as JSON has it, and as a tree for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.text import Text
from rich.tree import Tree

Why = Callable[[int, int], str]
"""(layer, expert) -> the sentence of what put the expert where it is now; "": nobody said it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank in the epoch of a record: its number, Ray's id of the node, the host's name, the device there."""

    rank: int
    node: str
    host: str
    device: str

    def words(self) -> str:
        """For people."""
        return f"rank {self.rank} ({self.host}, {self.device})"


@dataclass(frozen=True, slots=True)
class Hop:
    """One choice of one layer. kind: primary, replica or guest. why: what put the expert where it is now."""

    choice: int
    expert: int
    weight: float
    kind: str
    place: Place
    why: str


@dataclass(frozen=True, slots=True)
class TokenPath:
    """One token: where it stands in text and batch, and by MoE layer which expert computed for it on which rank.

    Args:
        name: for people. row, column: of the global batch, or of the request.
        version, epoch: of placement and membership that it was computed under. now: version of the present placement;
        None: not known.
    """

    name: str
    step: int | None
    request: str | None
    position: int
    row: int
    column: int
    token: int
    text: str
    before: str
    after: str
    document: int | None
    home: Place
    version: int
    epoch: int
    now: int | None
    layers: dict[int, list[Hop]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def facts(self) -> list[str]:
        """What is to be known beside the layers, in sentences."""
        document = f"Document {self.document} of the training text. " if self.document is not None else ""
        held = f"{document}The token was with {self.home.words()}."
        under = f"Computed under placement {self.version}, in epoch {self.epoch}."
        if self.now not in (None, self.version):
            under += f" The placement is {self.now} now: the reasons are those of present places."
        return [held, under]


def path_of(rows: Sequence[dict[str, Any]], why: Why, now: int | None) -> TokenPath:
    """The path that the records of one token tell, by layer and choice; `now`: version of the present placement."""
    first = rows[0]
    step, request = first["step"], first["request"]
    which = f"step {step}" if request is None else f"request {request}"
    return TokenPath(
        name=f"{which}, token {first['position']} (row {first['batch_row']}, column {first['batch_column']})",
        step=step,
        request=request,
        position=first["position"],
        row=first["batch_row"],
        column=first["batch_column"],
        token=first["token"],
        text=first["text"] or "",
        before=first["before"] or "",
        after=first["after"] or "",
        document=first["document"],
        home=Place(*(first[f"home_{name}"] for name in ("rank", "node", "host", "device"))),
        version=first["placement_version"],
        epoch=first["epoch"],
        now=now,
        layers={layer: [_hop(row, why) for row in of_it] for layer, of_it in groupby(rows, lambda row: row["layer"])},
    )


def _hop(row: dict[str, Any], why: Why) -> Hop:
    place = Place(row["rank"], row["node"], row["host"], row["device"])
    said = why(row["layer"], row["expert"])
    return Hop(row["choice"], row["expert"], row["weight"], row["kind"], place, said)


def tree_of(path: TokenPath) -> Tree:
    """The path as a tree: layers, in each the experts with weight, rank and the reason for their present place."""
    tree = Tree(Text.assemble((path.name, "bold"), f": {path.text!r}, id {path.token}"), guide_style="dim")
    tree.add(Text.assemble((shown(path.before), "dim"), (shown(path.text), "bold reverse"), (shown(path.after), "dim")))
    for sentence in path.facts:
        tree.add(Text(sentence))
    for layer, hops in path.layers.items():
        branch = tree.add(Text(f"MoE layer {layer}", "bold"))
        for hop in hops:
            kind = (hop.kind, "bold" if hop.kind == "guest" else "")
            node = branch.add(
                Text.assemble(f"expert {hop.expert}, weight {hop.weight:.3f}: ", kind, f" on {hop.place.words()}")
            )
            if hop.why:
                node.add(Text(hop.why, "dim"))
    return tree


def shown(text: str) -> str:
    """Text in one line: line ends and what cannot be seen as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
