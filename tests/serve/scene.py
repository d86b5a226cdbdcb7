"""A server as `ray-ep serve` has it, over the small engine: real HTTP on a port of its own."""

import contextlib
import threading
import time

import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ray_ep.serve.http.admission import Places
from ray_ep.serve.http.desk import Desk
from ray_ep.serve.http.figures import Figures
from ray_ep.serve.http.served import Served
from ray_ep.serve.http.server import build
from tests.models import VOCAB
from tests.serve.local import LocalEngine

TEMPLATE = "{% for m in messages %}w4 {{ m['content'] }} w5 {% endfor %}w6"


def words(template=TEMPLATE):
    """A tokenizer with a word for each id."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2", pad_token="w0")
    tokenizer.chat_template = template
    return tokenizer


def served_model(model, tokenizer, **more):
    given = {"generation_config": GenerationConfig(), "eos": (2,)} | more
    return Served(name="tiny", tokenizer=tokenizer, config=model.config, created=1, **given)


@contextlib.contextmanager
def desk_of(model, tokenizer, places=8, **engine):
    """A desk with an engine behind it."""
    desk = Desk(Places(places, time.monotonic), tokenizer)
    local = LocalEngine(model, desk.deliver, **engine)
    figures = Figures("tiny", local.limits, local.status, lambda: (desk.places.taken, desk.places.most))
    desk.opens(local, figures)
    try:
        yield desk, local
    finally:
        local.stop()


@contextlib.contextmanager
def listening(app, **more):
    """The address of an application that is served; its server ends first."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False, **more))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(model, tokenizer=None, keys=None, most_bytes=100_000, served=None, **desk):
    """(base address, engine, desk) of a server."""
    tokenizer = tokenizer or words()
    with desk_of(model, tokenizer, **desk) as (at, engine):
        app = build(served or served_model(model, tokenizer), at, keys, most_bytes)
        with listening(app) as address:
            yield f"http://{address}", engine, at
