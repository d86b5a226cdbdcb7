"""The section of the schema about serving over HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from ray_ep.config.option import opt


@dataclass
class ServeConfig:
    """Serving over HTTP, as OpenAI's API has it: `ray-ep serve` and `ray_ep.serve.app` (docs/serve.md)."""

    host: str = opt("127.0.0.1", "address to listen on; beyond this machine's loopback only with keys and TLS")
    port: int = opt(8000, "port to listen on; 0: a free one, which is told")
    model_name: str = opt("", "what requests call the model; empty: the name of its directory")
    api_key_file: str = opt(
        "", "file with the keys that open the server, one a line, of mode 0600; read again when it changes; empty: none"
    )
    tls_cert: str = opt("", "PEM file with the server's certificate and its chain; empty: no TLS")
    tls_key: str = opt("", "PEM file with the private key of tls_cert, of mode 0600")
    answers: int = opt(256, "answers under way at once, computed or waiting; who asks for more is told when to return")
    body_mb: float = opt(4.0, "most MiB of a request's body")
    grace_s: float = opt(30.0, "how long answers under way may go on once a stop was asked for")
