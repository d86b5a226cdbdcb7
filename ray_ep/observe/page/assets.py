"""Where the files of the page are: our own modules, carried by the package, and Bokeh's, carried by the bokeh package.

Imports neither: bokeh is only looked up, which takes no time.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "dashboards" / "page"
"""Template, style sheet and modules."""

_BOKEH = ("bokeh.min.js", "bokeh-api.min.js")


def modules() -> dict[str, Path]:
    """Our modules by file name."""
    return {path.name: path for path in sorted(FOLDER.glob("*.js"))}


def library() -> dict[str, Path]:
    """Bokeh's scripts by file name, in the order in which they are loaded.

    Raises:
        FileNotFoundError: bokeh is not installed, or not whole.
    """
    found = find_spec("bokeh")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    paths = {name: Path(folder) / "server" / "static" / "js" / name for folder in folders for name in _BOKEH}
    if not paths or not all(path.is_file() for path in paths.values()):
        raise FileNotFoundError("bokeh, which draws the page, is not installed: pip install bokeh")
    return paths
