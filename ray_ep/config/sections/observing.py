"""Sections of the schema by which a run is seen and steered. Imports only how a field is written."""

from __future__ import annotations

from dataclasses import dataclass

from ray_ep.config.sections.option import opt as _opt


@dataclass
class ControlConfig:
    """The gRPC service by which a run is seen and steered while it goes (docs/control.md)."""

    enabled: bool = _opt(True, "serve; false: a run is steered by signals alone")
    address: str = _opt("127.0.0.1", "address to listen on; beyond this machine's loopback only with TLS")
    port: int = _opt(0, "port to listen on; 0: a free one, which control.json in the run directory tells")
    operator_token_file: str = _opt(
        "",
        "file with the token of those who may change the run, of mode 0600; empty: none but the one in control.json, "
        "and the token of a Ray cluster that has one",
    )
    viewer_token_file: str = _opt("", "file with the token of those who may only look, of mode 0600; empty: none")
    tls_cert: str = _opt("", "PEM file with the server's certificate and its chain; empty: no TLS")
    tls_key: str = _opt("", "PEM file with the private key of tls_cert, of mode 0600")
    tls_client_ca: str = _opt(
        "", "PEM file with the authorities whose certificates clients must show (mTLS); empty: they show none"
    )


@dataclass
class ProvenanceConfig:
    """Which expert on which rank computed for a token, kept in the run directory (docs/provenance.md)."""

    sample: str = _opt(
        "off",
        "off; a share of the tokens of every training step, such as 0.01; or steps such as steps:1,100-110, all tokens "
        "of these",
    )
    disk_mb: int = _opt(1024, "most MiB that the records take on disk; the oldest files go first, which is told")


@dataclass
class TrackingConfig:
    """Experiment trackers that get the figures of each step, and OpenTelemetry, which gets spans."""

    to: list[str] = _opt(
        [],
        "tensorboard, mlflow, wandb: each is an extra of the package; otel: spans into spans.jsonl of the run "
        "directory. Where they send to, their own variables say",
    )
    project: str = _opt("ray_ep", "experiment of MLflow, project of Weights & Biases that the run belongs to")


@dataclass
class ObserveConfig:
    """What a run shows of itself while it goes: a page, served by the driver, and figures for Prometheus."""

    page: bool = _opt(True, "serve it; its address is said at the start")
    host: str = _opt(
        "127.0.0.1", "address to listen on; the page has no password: on any other, who reaches it may read it"
    )
    port: int = _opt(0, "port to listen on; 0: a free one")
    metrics: bool = _opt(True, "export the run's figures through Ray's metrics (docs/metrics.md)")
