"""DeepEP 2.1 as far as ray_ep calls it: its signatures, its refusals and its orders, over torch's gloo on CPU.

Written against deep_ep/buffers/elastic.py and csrc/elastic/buffer.hpp of that version, for tests: no kernel of it runs.
What the library leaves open is made to matter here: rows of one source come in another order each time unless the
buffer is deterministic, and weights of choices that are another rank's are whatever was sent.
"""

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup

from ray_ep.collective import TorchGroup, TorchNcclGroup
from ray_ep.collective.torch_nccl import whole

topk_idx_t = torch.int64


class EventOverlap:
    def __init__(self, event=None, extra_tensors=None):
        self.event = event


class EPHandle:
    """What a dispatch leaves for the ways back; attributes have the library's names, but for the last."""

    def __init__(self, num_experts, num_max_tokens_per_rank, num_sms, topk_idx, sent):
        self.do_expand, self.expert_alignment = False, 1
        self.num_experts, self.num_max_tokens_per_rank, self.num_sms = num_experts, num_max_tokens_per_rank, num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens_per_expert_list = []
        self.recv_src_metadata = None  # [N, 2 + K]: the first is source rank * num_max_tokens_per_rank + token
        self.cached_recv_src_metadata_before_sort = None
        self.sent = sent  # by rank: tokens in the order in which they went there


class ElasticBuffer:
    made = []  # of each, for tests: arguments, and rows sent to other ranks

    def __init__(self, group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0,
                 use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True,
                 prefer_overlap_with_compute=True, sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300,
                 num_gpu_timeout_secs=100, explicitly_destroy=False):  # fmt: skip
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        group._get_backend(torch.device("cpu"))  # the library takes the communicator of "cuda" from it
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.deterministic, self.shuffle = deterministic, torch.Generator().manual_seed(group.rank())
        self.fate = {"rank": group.rank(), "tokens": num_max_tokens_per_rank, "away": 0}
        self.fate |= {"destroy": explicitly_destroy, "seconds": num_cpu_timeout_secs}
        self.made.append(self.fate)
        group.barrier()

    def get_theoretical_num_sms(self, num_experts, num_topk):
        assert num_experts % self.num_ranks == 0  # TypeError for None, as there
        return 4

    def dispatch(self, x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None,
                 num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, previous_event=None,
                 previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
                 handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, do_zero_padding=False,
                 use_tma_aligned_col_major_sf=False):  # fmt: skip
        num_topk = (handle.topk_idx if topk_idx is None else topk_idx).shape[1]
        num_sms = self.get_theoretical_num_sms(num_experts, num_topk) if num_sms == 0 else num_sms
        self._check(x)
        assert 1 <= len(x) <= self.num_max_tokens_per_rank
        cached = handle is not None
        if cached:
            assert topk_idx is None
            assert num_sms == handle.num_sms
        else:
            self._check_choices(topk_idx, topk_weights, num_experts, num_topk, len(x))
            handle = EPHandle(num_experts, self.num_max_tokens_per_rank, num_sms, topk_idx.clone(), [])
            home = topk_idx.div(num_experts // self.num_ranks, rounding_mode="floor").masked_fill(topk_idx < 0, -1)
            for rank in range(self.num_ranks):
                tokens = (home == rank).any(1).nonzero().flatten()
                handle.sent.append(tokens[torch.randperm(len(tokens), generator=self.shuffle)])
        token = torch.cat(handle.sent)
        assert len(x) == len(handle.topk_idx)
        sent = [len(t) for t in handle.sent]
        self.fate["away"] += sum(sent) - sent[self.rank_idx]
        came = self._swap(torch.tensor(sent)[:, None], [1] * self.num_ranks, [1] * self.num_ranks).flatten().tolist()
        recv_x = self._swap(x[token], sent, came)
        recv_idx = self._local(self._swap(handle.topk_idx[token], sent, came), handle)
        recv_weights = None if topk_weights is None else self._swap(topk_weights[token], sent, came)
        if not cached:
            source = self._swap((self.rank_idx * self.num_max_tokens_per_rank + token)[:, None], sent, came)
            handle.recv_src_metadata = torch.cat([source, torch.full((len(source), 1 + num_topk), -1)], 1).int()
            handle.cached_recv_src_metadata_before_sort = handle.recv_src_metadata.clone()
            local = num_experts // self.num_ranks
            handle.num_recv_tokens_per_expert_list = [int((recv_idx == e).sum()) for e in range(local)]
        if self.deterministic:
            order = torch.sort(handle.cached_recv_src_metadata_before_sort[:, 0]).indices
            recv_x, recv_idx = recv_x[order], recv_idx[order]
            recv_weights = None if recv_weights is None else recv_weights[order]
            if not cached:
                handle.recv_src_metadata = handle.recv_src_metadata[order]
        return recv_x, recv_idx, recv_weights, handle, EventOverlap()

    def combine(self, x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, previous_event=None,
                previous_event_before_epilogue=None, async_with_compute_stream=False,
                allocate_on_comm_stream=False):  # fmt: skip
        self._check(x)
        source = handle.recv_src_metadata[:, 0].long()
        assert len(x) == len(source)
        tokens, num_topk = handle.topk_idx.shape
        assert topk_weights is None or (
            topk_weights.dtype == torch.float32 and topk_weights.shape == (len(x), num_topk)
        )
        rank = source // self.num_max_tokens_per_rank
        order = torch.argsort(rank, stable=True)
        give = torch.bincount(rank, minlength=self.num_ranks).tolist()
        take = [len(t) for t in handle.sent]
        token = self._swap((source % self.num_max_tokens_per_rank)[order, None], give, take).flatten()
        rows = self._swap(x[order], give, take)
        sums = torch.zeros(tokens, x.shape[1]).index_add_(0, token, rows.float())
        combined_weights = None
        if topk_weights is not None:
            back = self._swap(topk_weights[order], give, take)
            of_rank = torch.zeros(tokens, self.num_ranks + 1, num_topk)
            of_rank[token, torch.repeat_interleave(torch.arange(self.num_ranks), torch.tensor(take))] = back
            home = handle.topk_idx.div(handle.num_experts // self.num_ranks, rounding_mode="floor")
            home = home.masked_fill(handle.topk_idx < 0, self.num_ranks)  # its row is zero
            combined_weights = of_rank.gather(1, home[:, None]).squeeze(1)
        return sums.to(x.dtype), combined_weights, EventOverlap()

    def _check(self, x):
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert x.shape[1] == self.hidden
        assert x.shape[1] % 256 == 0

    def _check_choices(self, topk_idx, topk_weights, num_experts, num_topk, tokens):
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_idx.shape == topk_weights.shape == (tokens, num_topk)
        assert num_topk == self.num_topk <= 32
        assert num_experts % self.num_ranks == 0
        assert int(topk_idx.max()) < num_experts
        for row in topk_idx.tolist():
            chosen = [e for e in row if e >= 0]
            assert len(chosen) == len(set(chosen))

    def _local(self, idx, handle):
        local = handle.num_experts // self.num_ranks
        idx = idx - local * self.rank_idx
        return idx.masked_fill((idx < 0) | (idx >= local), -1)

    def _swap(self, rows, give, take):
        """rows [sum(give), n] to the ranks in order -> [sum(take), n]."""
        out = torch.empty(sum(take), rows.shape[1], dtype=rows.dtype)
        self.group.alltoall_base(out.view(torch.uint8), rows.contiguous().view(torch.uint8), take, give).wait()
        return out


class NcclOverGloo(TorchNcclGroup):
    """Takes the place of torch's NCCL, which the library goes over, where there is no GPU."""

    def __init__(self, store, rank, size):
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))
        TorchGroup.__init__(self, backend, rank, size, timeout_s=30)
        self.device, self._last, self._live = torch.device("cpu"), None, True
        self._why, self._messages, self._watcher = "", deque(), None
        self._whole = whole(backend, rank, size, "cpu", ProcessGroup.BackendType.GLOO)
