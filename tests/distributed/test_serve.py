"""`ray-ep serve` and the application of Ray Serve: real ranks that answer as plain transformers generates."""

import json
import signal
import threading

import httpx
import pytest
import torch
from openai import OpenAI

from tests.distributed.conftest import free_ports
from tests.models import build
from tests.serve.scene import words

PROMPTS = [[4, 10 + i, 11, 7] for i in range(4)]
LIMITS = ["generate.cache_tokens=1024", "generate.pass_tokens=64", "topology.measure=false"]


@pytest.fixture
def checkpoint(here):
    """A plain transformers checkpoint with its tokenizer."""
    model = build("mixtral")
    model.save_pretrained(here.path / "tiny")
    words().save_pretrained(here.path / "tiny")
    return model


def greedy(model, prompt, count):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=0)
    return words().decode(out[0, len(prompt) :].tolist(), skip_special_tokens=True)


def answers(client, count):
    """Of all prompts at once, every second one streamed."""
    found = [None] * len(PROMPTS)

    def ask(i):
        more = {"model": "tiny", "prompt": PROMPTS[i], "temperature": 0, "max_tokens": count}
        if i % 2:
            found[i] = "".join(c.choices[0].text for c in client.completions.create(**more, stream=True) if c.choices)
        else:
            found[i] = client.completions.create(**more).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    return found


@pytest.mark.slow
def test_two_ranks_serve_what_transformers_generates_until_they_are_asked_to_stop(here, checkpoint, cluster):
    options = ["--json", "serve.port=0", "cluster.cpus_per_rank=0.5", *LIMITS]
    command = here.start("ray-ep", "serve", "tiny", *options, RAY_ADDRESS=cluster.driver)
    said = json.loads(command.until(lambda: command.out.endswith("\n") and command.out, 180, "the address"))
    client = OpenAI(base_url=said["address"], api_key="none", max_retries=0, timeout=120)
    assert answers(client, 12) == [greedy(checkpoint, p, 12) for p in PROMPTS]
    drawn = [
        client.completions.create(model="tiny", prompt=PROMPTS[0], seed=3, n=2, max_tokens=8).choices for _ in range(2)
    ]
    assert [c.text for c in drawn[0]] == [c.text for c in drawn[1]]
    figures = httpx.get(said["address"].replace("/v1", "/metrics")).text
    assert 'ep_serve_rank_requests{rank="1"} 0.0' in figures
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(60) == 0, command.err
    assert 'path="/v1/completions" status=200' in command.err


@pytest.mark.slow
def test_a_port_in_use_is_refused_before_anything_is_started(here, checkpoint):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = here.start("ray-ep", "serve", "tiny", f"serve.port={port}")
        assert command.wait(120) == 2
        assert f"serve.port={port}: cannot listen there: Address already in use" in command.err
        assert "Ray" not in command.out


RAY_SERVE = """
import contextlib, sys, threading
import ray
from ray import serve
import ray_ep
from ray_ep.serve import app

ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
with contextlib.suppress(TimeoutError):  # it waits 60 s for its proxy, which comes nevertheless
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(app(ray_ep.load_config(None, ["model.path=tiny", "cluster.cpus_per_rank=0.5", *sys.argv[2:]])))
print("up", flush=True)
threading.Event().wait()
"""


def ready(port):
    """Whether requests are taken in there; not, where nobody listens yet."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_ray_serve_runs_it_as_one_ordinary_replica_that_owns_the_ranks(here, checkpoint):
    """In a Ray of its own: how long its proxy may take to start is a matter of that Ray's environment."""
    (here.path / "with_ray_serve.py").write_text(RAY_SERVE)
    port = free_ports(1)[0]
    slow = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "100"}
    command = here.start("python", "with_ray_serve.py", str(port), *LIMITS, **slow)
    command.until(lambda: "up" in command.out and ready(port), 500, "the application")
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    assert answers(client, 6) == [greedy(checkpoint, p, 6) for p in PROMPTS]
