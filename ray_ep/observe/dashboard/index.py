"""Pages that the proxy answers itself: Ray's first page with one more link, the list of runs, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import ray_ep
from ray_ep.driver.actors.shown import Page

LINK = Path(ray_ep.__file__).parent / "dashboards" / "ray" / "link.js"
"""The script that puts a link into the navigation of Ray's dashboard."""

ENDED = "ended, for its driver is gone; what it did is in report.html there"
"""Of a run that was killed: nobody has taken its page back."""

_STYLE = (
    "<style>:root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;"
    "padding:0 1rem}li{margin:.4rem 0}</style>"
)


def ray_index() -> Path | None:
    """The first page of Ray's dashboard, as it is installed here; None: it is not."""
    found = find_spec("ray")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "dashboard" / "client" / "build" / "index.html"
    return path if path.is_file() else None


def with_link(page: str, script: str) -> str:
    """Ray's first page with a script in its head; as it is where it has no head."""
    return page.replace("</head>", f"<script>{script}</script></head>", 1)


def runs_page(runs: Mapping[str, Page]) -> str:
    """The runs that show themselves, by name, as links: relative ones, for a dashboard may have a path before its own.

    A run whose driver is gone has no page any more, and says so.
    """
    links = "".join(
        f"<li>{escape(name)} <small>{escape(page.run_dir)}: {ENDED}</small></li>"
        if page.ended
        else f'<li><a href="{quote(name)}/">{escape(name)}</a> <small>{escape(page.run_dir)}</small></li>'
        for name, page in runs.items()
    )
    words = f"<ul>{links}</ul>" if links else "<p>No run shows itself on this cluster now.</p>"
    back = '<p><a href="../">Ray dashboard</a></p>'
    return _page("Runs", f"<h1>Runs</h1>{words}{back}")


def refusal(words: str) -> str:
    """One sentence."""
    return _page("Not shown", f'<h1>Not shown</h1><p>{escape(words)}</p><p><a href="../">All runs</a></p>')


def moved(to: str) -> str:
    """The reader goes on to a relative address. No redirect: Ray would follow it and keep the address of before."""
    return (
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={escape(to)}"><title></title>'
    )


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>{_STYLE}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>'
