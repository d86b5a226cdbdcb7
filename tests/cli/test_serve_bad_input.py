"""`ray-ep serve` refuses what it cannot serve in one sentence, with exit status 2, before anything is started."""

import socket
import sys

import pytest
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.config import load_config
from ray_ep.errors import ConfigError
from ray_ep.serve import running
from tests.models import build
from tests.serve.scene import words


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    build("mixtral").save_pretrained(path)
    words().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch):
    def started(*_):
        raise AssertionError("ranks were asked for")

    monkeypatch.setattr(running, "engine", started)


def refused(*arguments):
    done = CliRunner().invoke(main, ["serve", *arguments])
    assert done.exit_code == 2, done.output
    return [line for line in done.stderr.splitlines() if line.startswith("ray-ep: ")]


def private(path, text):
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("serve.port=70000", "serve.port=70000: allowed are 0 (a free one) to 65535"),
        ("serve.host=0.0.0.0", "give serve.api_key_file, serve.tls_cert, serve.tls_key, too, or a loopback address"),
        ("serve.tls_cert=x.pem", "needs serve.tls_key, too"),
        ("serve.host=", "serve.host='': expected an address"),
        ("serve.answers=0", "serve.answers=0: must be at least 1"),
        ("serve.nonsense=1", "unknown key 'serve.nonsense'"),
    ],
)
def test_keys_that_do_not_go_together_are_named(override, says):
    with pytest.raises(ConfigError) as e:
        load_config(None, [override])
    assert says in str(e.value)


def test_a_port_in_use_a_file_of_keys_and_a_certificate_that_are_none(checkpoint, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused(checkpoint, f"serve.port={port}")
    assert told == [
        f"ray-ep: serve.host='127.0.0.1', serve.port={port}: cannot listen there: Address already in use: give another "
        "port, or 0 for a free one"
    ]
    assert "No such file" in refused(checkpoint, f"serve.api_key_file={tmp_path}/none")[0]
    cert, key = private(tmp_path / "cert", "x"), private(tmp_path / "key", "y")
    assert "are no pair that can be used" in refused(checkpoint, f"serve.tls_cert={cert}", f"serve.tls_key={key}")[0]


def test_no_checkpoint_and_a_run_in_its_place(tmp_path):
    assert len(refused(str(tmp_path / "nowhere"))) == 1
    (tmp_path / "config.yaml").write_text("")
    assert "ray-ep export" in refused(str(tmp_path))[0]


def test_without_the_extra_it_is_said_how_to_install_it(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused(checkpoint) == ["ray-ep: ray-ep serve: uvicorn is not installed: pip install 'ray_ep[serve]'"]
