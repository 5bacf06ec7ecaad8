"""A device that is not there: tensors that say they are on "cuda" and whose numbers lie on the cpu.

Every operation that mixes them with tensors of the cpu is the error that it would be on such a device; what torch
allows (numbers without dimensions, copies, indices on the cpu) is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
_COPIES = {"_to_copy", "copy_", "_local_scalar_dense", "equal"}
# What torch would ask the device's driver about before any operation is dispatched.
_GUARDED = (torch.Tensor.softmax, torch.Tensor.masked_fill, torch.Tensor.__invert__, torch.Tensor.nonzero)
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


def _held(values: Any) -> Any:
    def one(value: Any) -> Any:
        if isinstance(value, slice):
            return slice(one(value.start), one(value.stop), one(value.step))
        return value.held if isinstance(value, There) else value

    return tree_map(one, values)


class There(torch.Tensor):
    """A tensor of the pretended device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return _held(args[0]).tolist()
        if func in _GUARDED and all(isinstance(v, There) for v in args if isinstance(v, torch.Tensor)):
            return tree_map(There, func(*_held(args), **(kwargs or {})))
        if func is torch.Tensor.copy_:
            _held(args[0]).copy_(_held(args[1]))
            return args[0]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            if not isinstance(args[0], There):
                raise AssertionError("a tensor on the cpu is indexed by, or given, one on a device")
            if (
                len(args) == 3
                and isinstance(args[2], torch.Tensor)
                and not isinstance(args[2], There)
                and args[2].dim()
            ):
                raise AssertionError("numbers of the cpu are put into a tensor on a device")
            found = func(*_held(args))
            return There(found) if isinstance(found, torch.Tensor) else found
        with torch._C.DisableTorchFunctionSubclass():  # else results on the cpu would be made of this class, too
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation where its tensors and its `device` say."""
    if func.namespace == "dist_lowbit":
        with torch._C._EnableTorchFunction():
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
    name = func._schema.name.partition("::")[2]
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [value for value in given if isinstance(value, There)]
    if name in _INDEXED:
        given = [args[0], *([args[2]] if len(args) > 2 else [])]
    strange = [value for value in given if not isinstance(value, There) and value.dim() > 0]
    if there and strange and name not in _COPIES:
        raise AssertionError(f"{func} mixes tensors of two devices: {[tuple(v.shape) for v in strange]} on the cpu")
    wanted = kwargs.get("device")
    onto = bool(there) if wanted is None else torch.device(wanted).type == DEVICE.type
    if name in ("copy_", *_INDEXED):
        onto = isinstance(args[0], There)
    plain = {key: value for key, value in kwargs.items() if key != "device"} if wanted is not None else kwargs
    plain = _held(plain)
    if wanted is not None and not onto:
        plain["device"] = wanted
    result = func(*_held(args), **plain)
    if func._schema.is_mutable and isinstance(result, torch.Tensor):
        return args[0]
    return tree_map(lambda v: There(v) if onto and isinstance(v, torch.Tensor) else v, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dist_lowbit":
            with self:  # what the project's operators make is seen, too
                return run(func, args, kwargs or {})
        return run(func, args, kwargs or {})


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Let torch say that it has a cuda device, and run what is on it."""
    for name, answer in (("is_available", True), ("device_count", 1), ("_lazy_init", None)):
        patch.setattr(torch.cuda, name, lambda answer=answer: answer)
    before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]
