"""One HTML page from the template: with addresses of its parts where a server has them, or with all parts inside.

The modules name each other as "ray_ep/NAME.js"; an import map says where each one is, so both pages run the same code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from typing import Any

import jinja2
from markupsafe import Markup

from ray_ep.observe.page.assets import FOLDER, library, modules

MAIN = "main"
"""The view of a run."""


def served_page(title: str) -> tuple[str, str]:
    """The page of a server, and the Content-Security-Policy that it is to be sent with."""
    imports = json.dumps({"imports": {f"ray_ep/{name}": f"./assets/{name}" for name in modules()}})
    head = ['<link rel="stylesheet" href="./assets/page.css">']
    head += [f'<script src="./assets/{name}"></script>' for name in library()]
    head += [f'<script type="importmap">{imports}</script>']
    policy = (
        f"default-src 'none'; script-src 'self' {_hash(imports)} {_hash(_entry(MAIN))}; "
        "style-src 'self' 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'self'"
    )  # charts set styles of their own elements
    return _render(title, MAIN, head, ""), policy


def whole_page(title: str, data: dict[str, Any], view: str = MAIN, charts: bool = True) -> str:
    """A page that needs nothing but a browser.

    Args:
        data: what it shows; JSON can hold it.
        view: the module that draws it: main, sheet or path. charts: it needs the chart library.
    """
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    coded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in modules().items()}
    imports = {f"ray_ep/{name}": f"data:text/javascript;base64,{code}" for name, code in coded.items()}
    head = [f"<style>\n{style}</style>"]
    if charts:
        head += [f"<script>{_inline(path.read_text(encoding='utf-8'))}</script>" for path in library().values()]
    head += [f'<script type="importmap">{json.dumps({"imports": imports})}</script>']
    held = as_json(data).replace("<", "\\u003c")  # no text of a run ends the element around it
    return _render(title, view, head, f'<script type="application/json" id="data">{held}</script>')


def as_json(tree: Any) -> str:
    """JSON without NaN and infinity, which it does not have: they become null."""
    try:
        return json.dumps(tree, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(tree), separators=(",", ":"), allow_nan=False)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _render(title: str, view: str, head: list[str], data: str) -> str:
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (FOLDER / "index.html").read_text(encoding="utf-8")
    )
    parts = {"head": Markup("\n".join(head)), "data": Markup(data), "entry": Markup(_entry(view))}
    return template.render(title=title, **parts)


def _entry(view: str) -> str:
    """The script that starts the page."""
    return f'import "ray_ep/{view}.js";'


def _inline(script: str) -> str:
    """A script that does not end the element around it; only its strings have such text, where the backslash says the
    same."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
