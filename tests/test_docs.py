"""Docs say what is there: folders, functions, configuration, versions."""

import ast
import json
import math
import pkgutil
import re
from contextlib import suppress
from pathlib import Path

import pytest

import ray_ep
from ray_ep.config import load_config
from ray_ep.config.docs import reference
from ray_ep.placement import Placement

ROOT = Path(__file__).parent.parent


def test_the_configuration_reference_is_generated_from_the_schema():
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), "run `make docs`"


def test_each_folder_that_the_readme_names_exists():
    folders = re.findall(r"^\| `([\w./]+)/` \|", (ROOT / "README.md").read_text(), re.M)
    assert len(folders) >= 6
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


def test_each_name_in_architecture_md_is_one_of_the_package():
    text = re.sub(r"^```.*?^```", "", (ROOT / "docs" / "architecture.md").read_text(), flags=re.M | re.S)
    names = {n for n in re.findall(r"`([A-Za-z_][\w.]{2,})`", text) if not n.startswith("ray.")}
    files = list((ROOT / "ray_ep").rglob("*.py"))
    elsewhere = {"exchange.json", "gradient_checkpointing_enable", *(p.name for p in files)}
    sources = "\n".join(p.read_text() for p in files)
    defined = set(re.findall(r"\b(?:def|class) (\w+)|^    (\w+): ", sources, re.M))
    defined = {name for pair in defined for name in pair}
    keys = set(re.findall(r"^\| `([\w.]+)` \|", reference(), re.M))

    def there(name):
        if name in keys or name in elsewhere or name == "ray_ep":
            return True
        rooms = ["", ".placement", ".collective", ".moe", ".rank", ".rank.trainer", ".driver", ".driver.loop"]
        for room in rooms if "." in name else []:
            with suppress(ImportError, AttributeError):
                pkgutil.resolve_name(name if name.startswith("ray_ep.") else f"ray_ep{room}.{name}")
                return True
        return "." not in name and name in defined

    assert len(names) > 80
    assert sorted(n for n in names if not there(n)) == []


def test_links_between_docs_lead_somewhere():
    docs = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    links = [(doc, link) for doc in docs for link in re.findall(r"\]\((?!http)([^)#]+)", doc.read_text())]
    assert len(links) > 20
    assert [f"{doc.name}: {link}" for doc, link in links if not (doc.parent / link).exists()] == []


def test_each_test_that_the_docs_name_exists():
    text = (ROOT / "docs" / "what-goes-wrong.md").read_text() + (ROOT / "README.md").read_text()
    sources = {p.name: p.read_text() for p in (ROOT / "tests").rglob("test_*.py")}
    files, names = re.findall(r"(test_\w+\.py)", text), re.findall(r"(?<![/\w])(test_\w+)(?!\.py|\w)", text)
    assert len(files) > 12
    assert len(names) > 12
    for file in files:
        assert file in sources, file
    for name in names:
        assert any(f"def {name}(" in s for s in sources.values()), name


def words_of(path):
    """Texts of a source file, as a reader of its output sees them: `…` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)


def test_each_message_in_troubleshooting_md_is_one_that_the_code_says():
    source = ROOT / "ray_ep"
    words = "\n".join(w.replace("\n", " ") for path in source.rglob("*.py") for w in words_of(path))
    words += "".join(path.read_text() for path in (source / "dashboards" / "page").glob("*.js"))
    rows = re.findall(r"^\| ([^|]*) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    messages = [m for row in rows for m in re.findall(r"`([^`]*)`", row)]
    assert len(messages) > 30
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        assert re.search(".*".join(parts), words), message


def test_each_heading_that_a_link_between_docs_names_exists():
    docs = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    links = [(d, *found) for d in docs for found in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", d.read_text())]
    assert links
    for doc, file, heading in links:
        headings = re.findall(r"^#+ (.*)", (doc.parent / file if file else doc).read_text(), re.M)
        assert heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], (doc, heading)


def test_the_placement_file_in_placement_md_is_one():
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "placement.md").read_text(), re.S)
    assert Placement.from_json(text).slots.shape == (1, 2, 3)
    assert json.loads(Placement.from_json(text).to_json()) == json.loads(text)


def test_the_changelog_has_the_version():
    assert f"## [{ray_ep.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_file_loads_and_steps(path, ranks):
    import threading

    from ray_ep.placement import contiguous
    from ray_ep.rank.data.corpus import load_corpus
    from ray_ep.rank.model import meta_model, model_config
    from ray_ep.rank.model_rank import ModelRank
    from ray_ep.rank.trainer import Trainer

    small = ["batch.sequences=4", "batch.length=16", "data.max_bytes=200000", "eval.sequences=2", "optim.steps=2"]
    cfg = load_config(path, small)
    corpus = load_corpus(cfg.data, cfg.batch.length, cfg.seed)
    config = model_config(cfg.model, corpus.vocab_size)
    modules = ray_ep.moe.find_experts(meta_model(config))
    experts = next(iter(modules.values())).num_experts
    placement = contiguous(len(modules), experts, 2, cfg.placement.slots_per_rank or None)
    alone = contiguous(len(modules), experts, 1)
    lock = threading.Lock()

    def work(group):
        with lock:  # weights are drawn from torch's one global generator
            rank = Trainer(ModelRank(cfg, config, group, placement if group.size == 2 else alone), corpus)
        return [rank.train_step(s).loss for s in range(2)] + [rank.evaluate()[0]]

    (one,), (first, second) = ranks(1, work), ranks(2, work)
    assert first == second
    assert first == pytest.approx(one, rel=1e-2 if cfg.model.dtype == "bfloat16" else 1e-4)
    assert first[0] == pytest.approx(math.log(corpus.vocab_size), rel=0.05)  # of an untrained model
    assert len(set(first)) == 3  # the second step saw what the first had learnt
