"""The one schema of a run: dataclasses whose fields carry their own documentation.

`docs/configuration.md` is generated from it; load.py checks values against it. Imports sections of their own alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray_ep.config.sections.lora import LoraConfig
from ray_ep.config.sections.observing import ControlConfig, ObserveConfig, ProvenanceConfig, TrackingConfig
from ray_ep.config.sections.option import opt as _opt
from ray_ep.config.sections.serving import ServeConfig


@dataclass
class ClusterConfig:
    """Where the ranks run."""

    address: str = _opt("", "Ray cluster to join; empty: the one RAY_ADDRESS names, else a local Ray is started")
    ranks: int = _opt(2, "number of ranks (one Ray actor with one device each)")
    device: str = _opt(
        "auto",
        "device of a rank; auto: cuda if the cluster has a GPU for every rank and torch was built for CUDA, else cpu",
        ("auto", "cpu", "cuda"),
    )
    cpus_per_rank: float = _opt(
        1.0, "CPUs of a rank, and its torch threads (at least one); below one, ranks share a CPU"
    )
    block_label: str = _opt(
        "",
        "key of a node label, such as ray.io/gpu-domain: ranks go to nodes with as few of its values as hold them all, "
        "and to none without it; empty: to few nodes, as Ray packs them",
    )
    wait_s: float = _opt(
        60.0, "how long to wait for the cluster to place the ranks, and then (at least 5 minutes) for them to start"
    )
    silence_s: float = _opt(
        5.0, "a rank that has not answered for so long counts as lost: stopped, hanging, or its machine cut off"
    )
    collective_timeout_s: float = _opt(300.0, "a collective that takes longer fails the step")
    dashboard: bool = _opt(False, "start Ray's dashboard beside a local Ray")


@dataclass
class ModelConfig:
    """Which model: a transformers config class with overrides, or a checkpoint on disk."""

    type: str = _opt(
        "qwen3_moe",
        "transformers model type (such as qwen3_moe, mixtral, deepseek_v3) or config class name; with model.path: only "
        "to read the checkpoint as another type than its config says",
    )
    overrides: dict[str, Any] = _opt(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
        },
        "fields of the config class to override; the default sizes belong to the default type; without model.path, "
        "vocab_size follows the tokenizer unless given",
    )
    path: str = _opt(
        "",
        "transformers checkpoint to start from: a directory, or owner/name of the Hugging Face hub, or with @revision; "
        "overrides then change its own config",
    )
    dtype: str = _opt("float32", "dtype of compute weights; master weights are float32", ("float32", "bfloat16"))
    gradient_checkpointing: bool = _opt(False, "recompute blocks in backward, with the recorded routes")


@dataclass
class DataConfig:
    """What it reads. With neither files nor a dataset: the Python standard library's source text on this machine."""

    files: list[str] = _opt(
        [], "paths, globs or fsspec URLs of text, JSON, CSV, Parquet or Arrow files, compressed or in archives too"
    )
    format: str = _opt(
        "auto",
        "auto: as a file's content tells; text: a file is one document; chat: a row is a conversation",
        ("auto", "text", "chat"),
    )
    encoding: str = _opt("utf-8", "encoding of text, JSON and CSV files, and of binary columns: any codec of Python")
    dataset: str = _opt("", "name or directory of a Hugging Face dataset (needs the 'datasets' extra)")
    dataset_split: str = _opt("train", "split of the dataset")
    text_field: str = _opt("text", "field or column of JSON, CSV, Parquet, Arrow and dataset rows that holds the text")
    messages_field: str = _opt("messages", "field or column that holds a row's conversation, with data.format=chat")
    pack: str = _opt(
        "auto",
        "what a sequence is; stream: a cut of all documents end to end; documents: several whole ones that do not see "
        "each other; off: one, and padding; auto: stream, and documents for chat",
        ("auto", "stream", "documents", "off"),
    )
    tokenizer: str = _opt("bytes", "bytes, or a Hugging Face tokenizer (name or directory)")
    held_out: float = _opt(0.02, "share of the documents kept for evaluation, 0 to 0.5")
    max_bytes: int = _opt(64_000_000, "stop reading after this many bytes of text; 0: no limit")


@dataclass
class BatchConfig:
    """The global batch: a function of (seed, step) alone, never of the number of ranks."""

    sequences: int = _opt(32, "sequences of one optimizer step, over all ranks and accumulation steps")
    length: int = _opt(128, "tokens of a sequence")
    accumulation: int = _opt(1, "forward-backward passes of one optimizer step")


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    kind: str = _opt("adamw", "optimizer", ("adamw", "sgd"))
    steps: int = _opt(200, "optimizer steps of the run")
    learning_rate: float = _opt(3e-3, "peak learning rate")
    schedule: str = _opt("cosine", "learning-rate schedule after warm-up", ("cosine", "linear", "constant_with_warmup"))
    warmup_steps: int = _opt(20, "steps of linear warm-up")
    weight_decay: float = _opt(
        0.1, "weight decay of matrices (not of biases and norms): decoupled for adamw, L2 for sgd"
    )
    beta1: float = _opt(0.9, "AdamW beta1; momentum of sgd")
    beta2: float = _opt(0.95, "AdamW beta2")
    eps: float = _opt(1e-8, "AdamW epsilon")
    clip_norm: float = _opt(1.0, "clip the global gradient norm, every expert counted once; 0: no clipping")
    freeze: list[str] = _opt([], "names of parameters that are not trained, with * for any text, such as *.mlp.gate.*")


@dataclass
class RouterConfig:
    """Balancing of the router, over the global batch (with accumulation: over each pass of it, then the mean)."""

    aux_loss: str = _opt(
        "auto",
        "load-balancing loss: layer: one term a layer; pooled: all layers pooled; auto: with model.path what the model "
        "was trained with (transformers' own form, or none where a correction bias balances), else layer",
        ("auto", "layer", "pooled", "off"),
    )
    aux_coefficient: float | None = _opt(
        None,
        "weight of the load-balancing loss (a sum over layers for aux_loss=layer); null: with model.path that of the "
        "model's own config, else 0.05",
    )
    z_coefficient: float | None = _opt(
        None,
        "weight of the router z-loss (mean squared logsumexp of the logits); null: with model.path that of the model's "
        "own config, else 0",
    )
    bias_rate: float = _opt(0.001, "step of the auxiliary-loss-free update of a router's correction bias; 0: none")
    force: str = _opt("none", "replace the router's choice, for benchmarks only", ("none", "balanced", "skewed"))
    alarm_balancedness: float = _opt(0.25, "warn when mean/max expert load of a layer falls below; 0: never")
    alarm_starved: float = _opt(0.05, "warn when an expert gets less than this share of its fair load; 0: never")


@dataclass
class PlacementConfig:
    """Where each expert starts out, and when experts move while the run goes on."""

    initial: str = _opt("contiguous", "contiguous, random, or the path of a placement JSON file")
    slots_per_rank: int = _opt(
        0, "slots of a rank in each MoE layer; more than experts/ranks gives replicas; 0: just enough"
    )
    every: int = _opt(
        100,
        "consider other places for the experts every N steps, and when a link changes; they move only where the "
        "measured gain is predicted to pay the move back; 0: only on imbalance and on demand (ray-ep rebalance)",
    )
    imbalance: float = _opt(
        0.0, "consider them too when the busiest rank (or node) computes this times the mean; above 1; 0: never"
    )
    level: str = _opt(
        "auto",
        "what a plan makes even; auto: node where balance.in_step evens the ranks of a node out, else rank",
        ("auto", "node", "rank"),
    )
    horizon_steps: int = _opt(1000, "steps within which a move must pay back; at most those that are left")
    decay: float = _opt(50.0, "half-life, in steps, of the statistics that a plan is made from")
    migration_buffer_mb: int = _opt(256, "MiB that a rank sends and receives at most in one exchange of a move")
    survive_nodes: int = _opt(
        0, "nodes that may be lost, any of them, with a replica of every expert left; takes slots_per_rank"
    )
    alert_s: float = _opt(600.0, "a plan that has not come to a decision for so long is an alert event; 0: never")
    mode: str = _opt(
        "act", "act: experts move where a decision says so; advise: it is told, and nothing moves", ("act", "advise")
    )


@dataclass
class ExchangeConfig:
    """How tokens travel to their experts and back."""

    kind: str = _opt(
        "auto",
        "flat: once to each rank; two_level: once to each node, and on from there; all_gather: to all ranks, for few "
        "tokens; auto: all are timed at the start on the run's own routing and the fastest is taken",
        ("auto", "flat", "two_level", "all_gather"),
    )
    chunks: int = _opt(1, "parts, up to 32, that a rank's tokens travel in; on GPUs one travels while another computes")
    float8: bool = _opt(False, "dispatch tokens rounded to 8 bits (e4m3, one scale a token), in forward only")
    tokens: int = _opt(
        0,
        "most tokens of a rank in one pass: for all_gather on GPUs, so that nothing waits (0: agreed on in each pass), "
        "and for deepep's buffer (0: as many as training and evaluation have)",
    )
    transport: str = _opt(
        "auto",
        "library that moves them: gloo (on GPUs through CPU memory), nccl (CuPy's), torch_nccl, or deepep (DeepEP's "
        "kernels over torch_nccl; not run yet with the real library; without balance inside the step); auto: gloo for "
        "CPU ranks, for GPU ranks the faster of the two over NCCL",
        ("auto", "gloo", "nccl", "torch_nccl", "deepep"),
    )


@dataclass
class BalanceConfig:
    """Balance inside each step, among ranks with fast links."""

    in_step: str = _opt(
        "auto",
        "surplus tokens go to other ranks, with the expert's weights where they lack it, when measured costs say that "
        "it pays. auto: in a run only while its own steps are faster so, as it tries; always: without trial; off",
        ("auto", "off", "always"),
    )
    guest_mb: int = _opt(512, "memory of a rank for weights that it borrows; 0: none")
    most: float = _opt(2.0, "no rank computes more than this times its fair share of a layer's tokens, at any cost")


@dataclass
class CheckpointConfig:
    """Saving of weights, optimizer state and statistics in logical (layer, expert) form."""

    every: int = _opt(0, "save every N steps; 0: never by their number")
    every_minutes: float = _opt(
        10.0, "save when so many minutes have passed since the last save; 0: never by time. Always saved: the end"
    )
    keep: int = _opt(2, "number of checkpoints kept; 0: all")
    dir: str = _opt("", "directory or fsspec URL; empty: 'checkpoints' in the run directory")


@dataclass
class SnapshotConfig:
    """Second copies of what each rank owns, held by a rank of another node: from there comes what a lost one owned."""

    every: int = _opt(10, "take one every N steps: so many are repeated at most after a loss; 0: a loss ends the run")
    to_disk: bool = _opt(
        False,
        "write each to disk, too, beside the checkpoints, where the newest is kept: resume=auto goes on from it if the "
        "driver died, so that at most snapshot.every steps are lost; the directory must be one that all nodes share",
    )


@dataclass
class ElasticConfig:
    """Ranks that are lost, join and leave while a run goes on."""

    min_ranks: int = _opt(1, "fewest ranks that a run goes on with; cluster.ranks: it ends with the first one lost")
    max_ranks: int = _opt(0, "most ranks that a run grows to; 0: cluster.ranks")
    policy: str = _opt(
        "fixed",
        "fixed: lost ranks are replaced; available: takes all the room that the cluster has free; throughput: one rank "
        "more, or one fewer, as the step is predicted to gain by it (elastic.efficiency)",
        ("fixed", "available", "throughput"),
    )
    wait_s: float = _opt(
        600.0,
        "how long to ask the cluster for ranks that are missing, before going on without; steps are made meanwhile",
    )
    efficiency: float = _opt(
        0.5,
        "of policy=throughput: what a rank more must be predicted to bring, as a share of what a rank brings now; "
        "above 0, at most 1",
    )
    mode: str = _opt(
        "act",
        "act: what the policy decides is carried out; advise: it is told, and only what somebody asks for (ray-ep "
        "scale, ray-ep drain, a drain of a node) is carried out",
        ("act", "advise"),
    )
    evict_stragglers: bool = _opt(False, "a rank that is several times slower than the others is replaced")


@dataclass
class EvalConfig:
    """Evaluation on the held-out split."""

    every: int = _opt(50, "evaluate every N steps and at the end; 0: never")
    sequences: int = _opt(64, "sequences of one evaluation")


@dataclass
class GenerateConfig:
    """Generation from a checkpoint: `ray-ep generate`, `eval` and `serve`. Each of them is of one rank."""

    cache_tokens: int = _opt(16384, "tokens whose keys and values are kept, of all its requests together")
    pass_tokens: int = _opt(512, "most tokens of one pass; longer prompts are read in several")
    requests: int = _opt(64, "most requests that are computed at once; others wait")


@dataclass
class StatisticsConfig:
    """Routing statistics counted in the forward."""

    sample: int = _opt(4096, "tokens of the reservoir of expert sets, over all ranks; 0: none")


@dataclass
class TopologyConfig:
    """The links between ranks, measured with the transport of the job."""

    measure: bool = _opt(True, "measure latency and bandwidth between ranks when the run starts")
    budget_s: float = _opt(5.0, "about how long that may take, seconds; a few ranks on fast links need a tenth of one")


@dataclass
class Config:
    """One run."""

    run_dir: str = _opt("", "directory of the run, on this machine; empty: a new one under runs/")
    resume: str = _opt(
        "no",
        "no; auto: go on with the run in run_dir (empty: with the newest one started from this directory), from its "
        "newest checkpoint and with its own configuration, or start it where there is none; or the directory of a run, "
        "of its checkpoints, or one step-N: a new run from there, with that configuration. What is given beside it "
        "changes that configuration, and is told",
    )
    seed: int = _opt(0, "seed of weights, data order and everything drawn")
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)
