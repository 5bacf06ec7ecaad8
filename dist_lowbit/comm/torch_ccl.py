"""Register the backend "ccl" of torch.distributed: `import dist_lowbit.comm.torch_ccl`.

Then `torch.distributed.init_process_group("ccl")` and `deepspeed.init_distributed("ccl")` work without
oneccl_bindings_for_pytorch. Where those bindings are installed for this very version of torch, they are imported
instead; bindings for another version would abort the process, so the versions are compared before.

Sums of fp32, bf16 and fp16 are the tree's; any other reduction or dtype gathers and reduces in rank order. Collectives
return when they are done, `async_op` or not. Messages from one rank to another, which oneCCL could not match by tag, go
over gloo and are under way while the caller goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import reduce
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.core.rank import discover

from .backends import init_group
from .base import cut
from .group import Group
from .torch_messages import Messages
from .tree import DTYPES

BINDINGS = ("oneccl_bindings_for_pytorch", "oneccl_bind_pt")  # names of the distribution, new and old

_ProcessGroup: Any = dist.ProcessGroup  # torch's stubs know none of the ways that its Python calls a subclass


_REDUCTIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0),
    dist.ReduceOp.AVG: lambda parts: parts.sum(0) / len(parts),
    dist.ReduceOp.PRODUCT: lambda parts: parts.prod(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
    dist.ReduceOp.BAND: lambda parts: reduce(torch.bitwise_and, parts),
    dist.ReduceOp.BOR: lambda parts: reduce(torch.bitwise_or, parts),
    dist.ReduceOp.BXOR: lambda parts: reduce(torch.bitwise_xor, parts),
}


def bindings_version() -> str | None:
    """Return the version of installed bindings that were built for this torch, else None."""
    for name in BINDINGS:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if found.split(".")[:2] == torch.__version__.split(".")[:2]:
            return found
        logger.warning("%s %s is for another torch than %s and is not used", name, found, torch.__version__)
    return None


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)


@torch.no_grad()
def _write(out: torch.Tensor, result: torch.Tensor) -> None:
    """Replace what a tensor holds, also a parameter's."""
    out.copy_(result)


def _op_name(op: Any) -> str:
    return str(getattr(op, "op", op)).rpartition(".")[2]


class CclProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """torch.distributed's view of a Group; its methods have torch's names and arguments."""

    def __init__(self, group: Group, messages: Messages | None, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.group = group
        self.messages = messages
        self._name = self._description = ""

    def getBackendName(self) -> str:
        return "ccl"

    def setGroupName(self, name: str) -> None:  # by which compiled callers (functional collectives, DTensor) find it
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def getGroupDesc(self) -> str:
        return self._description

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor; all are alike in shape."""
        whole = self.group.all_gather(x.detach().reshape(-1), 0, [x.numel()] * self.group.size)
        return [piece.view(x.shape) for piece in cut(whole, [x.numel()] * self.group.size)]

    def _reduced(self, x: torch.Tensor, op: Any) -> torch.Tensor:
        if op == dist.ReduceOp.SUM and x.dtype in DTYPES:
            return self.group.all_reduce(x.detach().contiguous().clone())
        reduction = next((function for known, function in _REDUCTIONS.items() if op == known), None)
        if reduction is None:
            known = ", ".join(map(_op_name, _REDUCTIONS))
            raise UsageError(f"the backend ccl cannot reduce by {_op_name(op)}; expected one of {known}")
        return reduction(torch.stack(self._all(x))).to(x.dtype)

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for x in tensors:
            _write(x, self._reduced(x, op))
        return _done(list(tensors))

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        for x in tensors:
            total = self._reduced(x, opts.reduceOp)
            if self.rank() == opts.rootRank:
                _write(x, total)
        return _done(list(tensors))

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        for x in tensors:
            _write(x, self.group.broadcast(x.detach().contiguous(), opts.rootRank))
        return _done(list(tensors))

    def barrier(self, opts: Any = None) -> Any:
        self.group.barrier()
        return _done(None)

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for into, x in zip(outputs, inputs, strict=True):
            for out, part in zip(into, self._all(x), strict=True):
                _write(out, part)
        return _done(outputs)

    def all_gather_single(self, output: torch.Tensor, x: torch.Tensor, opts: Any = None) -> Any:
        _write(output, torch.cat([part.reshape(-1) for part in self._all(x)]).view(output.shape))
        return _done(output)

    _allgather_base = all_gather_single  # its name before torch 2.12

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        by_input = zip(*outputs, strict=True)  # they come by rank
        return self.allgather([list(into) for into in by_input], inputs, opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for output, x in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, x, opts)
        return _done(list(outputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # its name before torch 2.12

    def gather(self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any) -> Any:
        parts = self._all(inputs[0])
        if self.rank() == opts.rootRank:
            for out, part in zip(outputs[0], parts, strict=True):
                _write(out, part)
        return _done(outputs)

    def scatter(self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any) -> Any:
        out = outputs[0]
        whole = torch.stack(list(inputs[0])) if inputs else out.new_empty(self.size(), *out.shape)
        _write(out, self.group.broadcast(whole.contiguous(), opts.rootRank)[self.rank()])
        return _done(outputs)

    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> Any:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for out, parts in zip(outputs, inputs, strict=True):
            flat = torch.cat([part.reshape(-1) for part in parts])
            sizes = [part.numel() for part in parts]
            _write(out, cut(self._reduced(flat, op), sizes)[self.rank()].view(out.shape))
        return _done(outputs)

    def reduce_scatter_single(self, output: torch.Tensor, x: torch.Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter([output], [x.chunk(self.size())], opts)

    _reduce_scatter_base = reduce_scatter_single  # its name before torch 2.12

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for output, x in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, x, opts)
        return _done(list(outputs))

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # its name before torch 2.12

    def alltoall(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None) -> Any:
        counts = self.group.gather_object([x.numel() for x in inputs])
        flat = torch.cat([x.reshape(-1) for x in inputs])
        sizes = [sum(row) for row in counts]
        everything = cut(self.group.all_gather(flat, 0, sizes), sizes)
        for out, part, row in zip(outputs, everything, counts, strict=True):
            _write(out, cut(part, row)[self.rank()].view(out.shape))
        return _done(outputs)

    def all_to_all_single(
        self, output: torch.Tensor, x: torch.Tensor, outputs: Sequence[int], inputs: Sequence[int], opts: Any = None
    ) -> Any:
        into = cut(output, outputs) if outputs else output.chunk(self.size())
        return self.alltoall(into, cut(x, inputs) if inputs else x.chunk(self.size()), opts)

    alltoall_base = all_to_all_single  # its name before torch 2.12

    def send(self, tensors: Sequence[torch.Tensor], to: int, tag: int = 0) -> Any:
        return self._between.send(tensors, to, tag)

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> Any:
        return self._between.receive(tensors, source, tag)

    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> Any:
        return self._between.receive(tensors, None, tag)

    @property
    def _between(self) -> Messages:
        if self.messages is None:
            raise UsageError(
                "the backend ccl sends from one rank to another over gloo, which this build of torch lacks or which "
                "has one rank only here; use a collective"
            )
        return self.messages

    def shutdown(self) -> None:
        if self.messages is not None:
            self.messages.close()
        self.group.close()

    abort = shutdown


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> CclProcessGroup:
    here = discover(os.environ)
    if here.world_size != size or here.rank != rank:  # a subgroup, or ranks that came by init_method
        here = replace(here, rank=rank, world_size=size, local_rank=min(here.local_rank, size - 1), local_size=0)
    group = init_group("ccl", here, timeout.total_seconds(), prefix="torch", store=store)
    messages = Messages(group, here, store, timeout.total_seconds()) if Messages.possible(group) else None
    return CclProcessGroup(group, messages, rank, size)


def register() -> str:
    """Register the backend, or import the bindings that do; return what torch will use. May be called again."""
    if hasattr(dist.Backend, "CCL"):
        return "registered before"
    found = bindings_version()
    if found is not None:
        __import__("oneccl_bindings_for_pytorch")
        return f"oneccl_bindings_for_pytorch {found}"
    dist.Backend.register_backend("ccl", _create, devices=["cpu"])
    return "dist_lowbit"


register()
