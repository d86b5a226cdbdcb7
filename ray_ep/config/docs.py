"""The configuration reference, generated from the schema: `python -m ray_ep.config.docs > docs/configuration.md`."""

from __future__ import annotations

from typing import Any

from ray_ep.config.load import fields
from ray_ep.config.schema import Config


def reference() -> str:
    """Markdown tables of every key: default, allowed values, meaning."""
    out = [
        "# Configuration reference",
        "",
        "Generated from `ray_ep/config/schema.py` by `make docs`. Keys go into a YAML file (`--config FILE`) or on the",
        "command line as `key=value`; the command line wins. A key's own type decides how its text is read: text is",
        "taken as typed (`run_dir=007`, `data.files=*.jsonl`), a list is `[one, two]` or a single element, numbers are",
        "finite. Paths are seen from the directory where the command is given, also those in a file.",
    ]
    section = None
    for key, f, default in fields():
        name = key.rpartition(".")[0]
        if name != section:
            section = name
            node = getattr(Config(), name) if name else Config()
            out += [
                "",
                f"## {name or 'Run'}",
                "",
                (type(node).__doc__ or "").strip(),
                "",
                "| key | default | meaning |",
                "|---|---|---|",
            ]
        allowed = f" Allowed: {', '.join(f'`{a}`' for a in f.metadata['allowed'])}." if f.metadata["allowed"] else ""
        out.append(f"| `{key}` | `{_show(default)}` | {f.metadata['help']}.{allowed} |")
    return "\n".join(out) + "\n"


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


if __name__ == "__main__":
    print(reference(), end="")
