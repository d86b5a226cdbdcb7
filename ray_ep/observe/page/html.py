"""One HTML page from the template: with addresses of its parts where a server has them, or with all parts inside.

The modules name each other as "ray_ep/NAME.js"; an import map says where each one is, so both pages run the same code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html import escape
from typing import Any

import jinja2
from markupsafe import Markup

from ray_ep.observe.page.assets import FOLDER, library, modules

ENTRY = 'import "ray_ep/main.js";'
"""The script that starts the page."""


def served_page(title: str) -> tuple[str, str]:
    """The page of a server, and the Content-Security-Policy that it is to be sent with."""
    imports = json.dumps({"imports": {f"ray_ep/{name}": f"./assets/{name}" for name in modules()}})
    head = ['<link rel="stylesheet" href="./assets/page.css">']
    head += [f'<script src="./assets/{name}"></script>' for name in library()]
    head += [f'<script type="importmap">{imports}</script>']
    policy = (
        f"default-src 'none'; script-src 'self' {_hash(imports)} {_hash(ENTRY)}; style-src 'self' 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )  # charts set styles of their own elements
    return _render(title, "run", head, ""), policy


def whole_page(title: str, data: dict[str, Any], kind: str = "run") -> str:
    """A page that needs nothing but a browser.

    Args:
        data: what it shows; JSON can hold it.
        kind: run, or sheet: tables, words and charts of another kind (sheet.js).
    """
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    coded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in modules().items()}
    imports = {f"ray_ep/{name}": f"data:text/javascript;base64,{code}" for name, code in coded.items()}
    head = [f"<style>\n{style}</style>"]
    head += [f"<script>{_inline(path.read_text(encoding='utf-8'))}</script>" for path in library().values()]
    head += [f'<script type="importmap">{json.dumps({"imports": imports})}</script>']
    held = as_json(data).replace("<", "\\u003c")  # no text of a run ends the element around it
    return _render(title, kind, head, f'<script type="application/json" id="data">{held}</script>')


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


def _render(title: str, kind: str, head: list[str], data: str) -> str:
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (FOLDER / "index.html").read_text(encoding="utf-8")
    )
    parts = {"head": Markup("\n".join(head)), "data": Markup(data), "entry": Markup(ENTRY)}
    return template.render(title=title, kind=escape(kind), **parts)


def _inline(script: str) -> str:
    """A script that does not end the element around it; only its strings have such text, where the backslash says the
    same."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
