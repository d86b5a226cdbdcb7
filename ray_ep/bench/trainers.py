"""The peers of `ray-ep bench train`: training steps as somebody without ray_ep would write them, over gloo.

Runs in processes of its own and imports nothing that a peer does not need: their peak memory is compared. Each gets the
same model, batches and optimizer settings, and gives back seconds, losses and peak memory. B sequences of L tokens.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=600)
"""Time after which a rank gives its peers up."""


@dataclass(frozen=True, slots=True)
class Job:
    """One peer's part of a round. The model is a pickled transformers module with all its experts."""

    peer: str
    ranks: int  # processes
    threads: int  # of each
    malloc: str  # see ray_ep.bench.layer.spawn
    model: str  # path
    error: str  # path of a file that says why it failed, if it did
    batches: str  # path of an array [steps, B, L + 1] int64
    optim: dict[str, Any]  # the configuration's
    dtype: str  # of the weights
    experts: tuple[str, ...]  # names of the experts modules
    checkpointing: bool


class OneProcess:
    """One process: loss, backward, clipping, AdamW."""

    def __init__(self, model: Any, job: Job, rank: int):
        self.job, self.rank, self.model = job, rank, model
        self.stacks = {id(p) for name in job.experts for p in model.get_submodule(name).parameters()}
        self.prepare()
        self.rates = self._schedule()

    def prepare(self) -> None:
        """Make the optimizer, and whatever the step needs."""
        for p in self.model.parameters():
            p.data = p.data.clone()  # it lay in the file
        self.net, self.optimizer = self.model, adamw(self.job, self._groups())

    def step(self, rows: torch.Tensor, total: int, number: int) -> torch.Tensor:
        """One optimizer step on this rank's rows [B / ranks, L + 1]; its share of the mean loss over `total` tokens."""
        loss = self.loss(rows) / total
        self.backward(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[number]
        self.update()
        return loss.detach()

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Summed cross entropy of predicting rows[:, 1:] from rows[:, :-1]."""
        logits = self.net(input_ids=rows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the mean loss over all ranks."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Clip and step."""
        if self.job.optim["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job.optim["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices decay; biases, norms and other vectors (per expert, too) do not: as in a run."""
        groups: list[dict[str, Any]] = [
            {"name": name, "params": [], "weight_decay": decay}
            for name, decay in (("decays", self.job.optim["weight_decay"]), ("does-not", 0.0))
        ]
        for name, p in self.model.named_parameters():
            matrix = p.dim() - self.is_stack(p) >= 2 and not name.endswith("bias")
            groups[0 if matrix else 1]["params"].append(p)
        return [group for group in groups if group["params"]]

    def is_stack(self, p: torch.nn.Parameter) -> bool:
        """Whether the first dimension of a parameter counts experts."""
        return id(p) in self.stacks

    def _schedule(self) -> list[float]:
        """Learning rate of each step, as in a run."""
        from transformers import get_scheduler

        optim, any_other = self.job.optim, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        warm, steps = optim["warmup_steps"], optim["steps"]
        factor = get_scheduler(optim["schedule"], any_other, warm, steps).lr_lambdas[0]
        return [optim["learning_rate"] * factor(n + 1 if n < warm else n) for n in range(steps)]


class Ddp(OneProcess):
    """torch's DistributedDataParallel: all experts on each rank."""

    def prepare(self) -> None:
        super().prepare()
        self.net = torch.nn.parallel.DistributedDataParallel(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.job.ranks).backward()  # type: ignore[no-untyped-call]  # it averages over ranks


class Transformers(OneProcess):
    """transformers' own `AllToAllEP`: each rank its share of the experts; dense gradients are summed over ranks."""

    def prepare(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.distributed.expert_parallel import AllToAllEP

        ranks = self.job.ranks
        mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
        for name in self.job.experts:
            experts = self.model.get_submodule(name)
            n = experts.num_experts // ranks
            for key, p in list(experts.named_parameters(recurse=False)):
                setattr(experts, key, torch.nn.Parameter(p.data[self.rank * n : (self.rank + 1) * n]))
            experts.num_experts, experts._is_expert_parallel = n, True
            exchange = AllToAllEP(experts, mesh["ep"], mesh["tp"])
            experts.forward = lambda *args, exchange=exchange: exchange(*args)
        stacks = [p for name in self.job.experts for p in self.model.get_submodule(name).parameters(recurse=False)]
        self.stacks = {id(p) for p in stacks}
        super().prepare()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        dense = [p.grad for p in self.model.parameters() if p.grad is not None and not self.is_stack(p)]
        flat = torch.cat([g.flatten() for g in dense])
        dist.all_reduce(flat)
        for g, part in zip(dense, torch.split(flat, [g.numel() for g in dense]), strict=True):
            g.copy_(part.view_as(g))

    def update(self) -> None:
        if self.job.optim["clip_norm"]:
            grads: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
            for p in self.model.parameters():
                if p.grad is not None:
                    grads[self.is_stack(p)].append(p.grad)
            dense, experts = (torch.nn.utils.get_total_norm(g).square() for g in grads)
            dist.all_reduce(experts)  # each expert is on one rank
            norm = (dense + experts).sqrt()
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.job.optim["clip_norm"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class DeepSpeed(OneProcess):
    """DeepSpeed's AutoEP with ZeRO-2: in bfloat16 it keeps float32 masters, as ray_ep does."""

    def prepare(self) -> None:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        for module in self.model.modules():  # router logits are not asked for; recording them fails: docs/benchmarks.md
            if hasattr(module, "_can_record_outputs"):
                module._can_record_outputs = {}
        sequences = int(np.load(self.job.batches, mmap_mode="r").shape[1])
        config = {
            "train_batch_size": sequences,
            "train_micro_batch_size_per_gpu": sequences // self.job.ranks,
            "gradient_clipping": self.job.optim["clip_norm"],
            "bf16": {"enabled": self.job.dtype == "bfloat16"},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,  # torch's own AdamW
            "expert_parallel": {"enabled": True, "autoep_size": self.job.ranks},
        }
        self.net, self.optimizer, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=lambda _: adamw(self.job, split(self._groups())),
            config=config,
            dist_init_required=False,
        )
        if not self.net.has_moe_layers:
            raise RuntimeError("AutoEP knows no MoE layer in this model")

    def is_stack(self, p: torch.nn.Parameter) -> bool:
        """DeepSpeed has put layers of its own in place of the model's."""
        return not getattr(p, "allreduce", True)

    def backward(self, loss: torch.Tensor) -> None:
        self.net.backward(loss * self.job.ranks)  # it averages over ranks

    def update(self) -> None:
        self.net.step()


TRAINERS = {"plain": OneProcess, "ddp": Ddp, "transformers": Transformers, "deepspeed": DeepSpeed}
"""What trains as each peer does, by its name."""


def adamw(job: Job, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """As in a run."""
    optim = job.optim
    betas = (optim["beta1"], optim["beta2"])
    return torch.optim.AdamW(groups, lr=optim["learning_rate"], betas=betas, eps=optim["eps"], fused=True)


def main(rank: int, job: Job, store: str, queue: Any) -> None:
    """One process of a peer. Rank 0 puts: seconds and mean loss of each step, peak MiB of the largest process.

    An error goes into the file `job.error`, the first one alone: the others come of it.
    """
    with open(os.devnull, "w") as nowhere:  # libraries talk, in C++ too
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    try:
        found = _train(rank, job, store)
        if rank == 0:
            queue.put(found)
        dist.barrier()
    except Exception as e:
        with suppress(FileExistsError), open(job.error, "x") as f:
            f.write(f"{type(e).__name__}: {e}")
        os._exit(1)
    os._exit(0)  # DeepSpeed's exit hooks hang without a launcher


def _train(rank: int, job: Job, store: str) -> dict[str, Any]:
    torch.set_num_threads(job.threads)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.ranks), LOCAL_RANK=str(rank))  # for DeepSpeed
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.ranks, timeout=TIMEOUT)
    model = torch.load(job.model, weights_only=False, mmap=True)
    if job.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = TRAINERS[job.peer](model, job, rank)
    seconds, losses = [], []
    for number, batch in enumerate(np.load(job.batches, mmap_mode="r")):
        dist.barrier()
        start = time.perf_counter()
        rows = torch.from_numpy(np.array(np.split(batch, job.ranks)[rank]))
        losses.append(trainer.step(rows, batch[:, 1:].size, number))
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    mean, peak = torch.stack(losses).double(), torch.tensor(_peak_mib())
    dist.all_reduce(mean)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {"seconds": seconds, "losses": mean.tolist(), "peak_mib": int(peak)}


def _peak_mib() -> int:
    """Peak resident memory of this process."""
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) // 1024
