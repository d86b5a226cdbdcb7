"""Cases and rows of `ray-ep bench layer`, as text."""

from __future__ import annotations

from itertools import product

from ray_ep.bench.contenders import WORKS
from ray_ep.bench.layer import LayerCase, LayerResult
from ray_ep.errors import BadInput
from ray_ep.moe import PHASES

_ALLOWED = {
    "works": list(WORKS),
    "dtypes": ["float32", "bfloat16"],
    "passes": ["forward", "both"],
    "malloc": ["default", "tuned"],
}


def cases(
    rounds: int, works: list[str], dtypes: list[str], passes: list[str], ranks: list[str], malloc: list[str]
) -> list[LayerCase]:
    """Every combination; raises BadInput for a word that is not allowed."""
    given = {"works": works, "dtypes": dtypes, "passes": passes, "malloc": malloc}
    for name, words in given.items():
        for word in words:
            if word not in _ALLOWED[name]:
                raise BadInput(f"bench layer: {word!r} is none of {', '.join(_ALLOWED[name])}")
    if not all(r.isdigit() and int(r) >= 1 for r in ranks):
        raise BadInput(f"bench layer: --ranks={','.join(ranks)}: expected numbers, such as 2,4")
    return [
        LayerCase(w, d, p == "both", int(r), m, rounds)
        for w, d, p, r, m in product(works, dtypes, passes, ranks, malloc)
    ]


def title() -> str:
    """Head of the table."""
    phases = " ".join(f"{p:>8}" for p in PHASES)
    return (
        f"{'work':4} {'dtype':8} {'pass':7} {'ranks':>5} {'malloc':7} {'ray_ep':>9} {'transf.':>9} {'deepsp.':>9} "
        f"{'ratio':>6} {'floor':>6} {phases} {'MB sent':>8}  peak MiB\n"
        f"{'':35} {'tokens/s':>9} {'tokens/s':>9} {'tokens/s':>9} {'':>6} {'share':>6}"
    )


def line(result: LayerResult) -> str:
    """One row."""
    c, speed = result.case, result.tokens_per_second
    cells = "".join(
        f"{speed[n]:9,.0f} " if n in speed else f"{'-':>9} " for n in ("ray_ep", "transformers", "deepspeed")
    )
    ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
    peaks = " ".join(f"{n} {m}" for n, m in result.peak_mib.items())
    phases = " ".join(f"{result.phases[p]:8.1%}" for p in PHASES)
    return (
        f"{c.work:4} {c.dtype:8} {'both' if c.backward else 'forward':7} {c.ranks:5} {c.malloc:7} {cells}{ratio:>6} "
        f"{result.share_of_floor:6.2f} {phases} {result.bytes_sent / 1e6:8.2f}  {peaks}"
    )
