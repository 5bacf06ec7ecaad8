"""The executor in C++: a step is one call of the compiled library (kernels/cpu/decoder.h)."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch

from dist_lowbit.core.errors import CommError, KernelError, UsageError
from dist_lowbit.core.native import native_why_not
from dist_lowbit.ops import library as compiled_library

from .native_program import Structs, why_not
from .native_structs import CRopeTable, CStep, CTimes, declare
from .program import Program
from .rope import rope_table
from .step import BLOCK_SLOTS, KvStore, Step

_KV_TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}  # kernels/cpu/float_kernels.h
_FAULT = -16
_NO_MEMORY = -3
_FIRST_POSITIONS = 512


@dataclass(frozen=True)
class Times:
    """Where the time of steps went, in nanoseconds of one thread; `reduce` holds `wait` (for the slowest rank)."""

    linear: int
    attention: int
    reduce: int
    wait: int
    other: int
    total: int
    steps: int
    rows: int


class NativeDecoder:
    """Run a program in compiled code, every step in one call that holds no lock of Python.

    For formats of integers the results are TorchDecoder's, bit for bit, for any number of threads and any instruction
    set. Memory beside the weights: activations of up to 512 rows, kept from step to step.
    """

    name = "native"

    def __init__(self, program: Program, device: str = "cpu") -> None:
        """Take a program that `why_not` has no objection to; else a UsageError. Holds on to its tensors."""
        self.device = torch.device(device)
        why = self.why_not(program, "fp32", self.device.type)
        library = compiled_library()
        if why is not None or library is None:
            raise UsageError(f"the compiled decoder does not take this model: {why}")
        self.program = program
        self._library = library
        group = program.embed.group
        self._collective = group.native_collective() if group.size > 1 else None
        self._structs = Structs(program, self._collective)
        status = ctypes.c_int()
        handle = library.dlb_decoder_create(ctypes.byref(self._structs.program), ctypes.byref(status))
        if not handle:
            raise KernelError(f"the compiled decoder refuses the program (status {status.value}): its parts do not fit")
        self._handle = handle
        self._free = weakref.finalize(self, library.dlb_decoder_destroy, handle)
        self._angles: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(program.ropes)
        self._store: tuple[weakref.ref[KvStore], CStep, list[object]] | None = None

    @staticmethod
    def why_not(program: Program, store_dtype: str, device: str) -> str | None:
        """Return why not: another device, no library, a kernel or a shape that the compiled decoder does not know."""
        if device != "cpu":
            return f"it runs on the CPU, not on {device}"
        library = compiled_library()
        if library is None:
            return native_why_not()
        declare(library)
        return why_not(program, store_dtype)

    def step(self, step: Step, logits: bool) -> torch.Tensor:
        """Run a step (see Executor.step).

        Ids outside the vocabulary, lengths beyond the table and the like are UsageErrors and write nothing. A lost
        group is the CommError of its backend; the cache then holds a part of the step.
        """
        if not self._free.alive:
            raise UsageError("this decoder is closed")
        program = self.program
        width = program.vocab if logits else program.hidden
        if not logits and program.final_project is not None:
            width = program.final_project.out_features
        out = torch.empty(step.wanted.numel(), width, device="cpu")
        c, alive = self._of_store(step.store)
        self._check_shapes(step)
        given = [_whole(t, torch.int32) for t in (step.positions, step.row_begin, step.lengths, step.table)]
        given.append(_whole(step.wanted, torch.int64))
        c.positions, c.row_begin, c.lengths, c.table, c.wanted = (t.data_ptr() for t in given)
        ids = None if step.ids is None or step.embeds is not None else _whole(step.ids, torch.int32)
        embeds = None if step.embeds is None else _whole(step.embeds, torch.float32)
        c.ids = None if ids is None else ids.data_ptr()
        c.embeds = None if embeds is None else embeds.data_ptr()
        c.rows, c.sequences, c.wanted_count = step.positions.numel(), step.lengths.numel(), out.shape[0]
        c.table_stride = step.table.shape[1]
        ropes, angles = self._ropes(step)
        c.ropes = ctypes.addressof(ropes)
        c.logits, c.out, c.out_stride = int(logits), out.data_ptr(), width
        status = self._library.dlb_decoder_step(self._handle, ctypes.byref(c))
        del alive, angles  # until here the library read them
        if status != 0:
            self._raise(status, step)
        return out

    def times(self, reset: bool = False) -> Times:
        """Return where the time of all steps since the last reset went."""
        c = CTimes()
        if self._free.alive:
            self._library.dlb_decoder_times_of(self._handle, ctypes.byref(c), int(reset))
        return Times(*(getattr(c, name) for name, _ in CTimes._fields_))

    @property
    def workspace_bytes(self) -> int:
        """Return the memory that activations take."""
        return int(self._library.dlb_decoder_workspace_bytes(self._handle)) if self._free.alive else 0

    def close(self) -> None:
        """Free what the library holds; the program stays. May be called twice."""
        self._free()

    def _of_store(self, store: KvStore) -> tuple[CStep, list[object]]:
        """Return a struct that points to the store, made once for each store, and what it points through."""
        if self._store is not None and self._store[0]() is store:  # whose tensors stay where they are
            return self._store[1], self._store[2]
        tensors = (store.keys, store.values, store.key_scales, store.value_scales)
        c = CStep(blocks=store.blocks, block_slots=BLOCK_SLOTS, kv_type=_KV_TYPES[store.dtype])
        alive: list[object] = []
        for name, kind in zip(("keys", "values", "key_scales", "value_scales"), tensors, strict=True):
            if kind:
                pointers = (ctypes.c_void_p * len(kind))(*(tensor.data_ptr() or None for tensor in kind))
                alive.append(pointers)
                setattr(c, name, ctypes.addressof(pointers))
        self._store = (weakref.ref(store), c, alive)
        return c, alive

    def _ropes(self, step: Step) -> tuple[ctypes.Array[CRopeTable], list[torch.Tensor]]:
        """Return cos and sin for a step: of every position so far, or of its rows where they go by the length."""
        tables = (CRopeTable * max(1, len(self.program.ropes)))()
        alive: list[torch.Tensor] = []
        highest = int(step.positions.max()) if step.positions.numel() and self.program.ropes else 0
        for index, rope in enumerate(self.program.ropes):
            if rope.dynamic is not None:
                cos, sin = rope_table(rope, step.positions, step.row_begin)
            else:
                known = self._angles[index]
                if known is None or known[0].shape[0] <= highest:
                    count = max(_FIRST_POSITIONS, 2 * (highest + 1))
                    known = rope_table(rope, torch.arange(count, device="cpu"), torch.tensor([0, count], device="cpu"))
                    self._angles[index] = known
                cos, sin = known
            alive += [cos.contiguous(), sin.contiguous()]
            by_row = int(rope.dynamic is not None)
            tables[index] = CRopeTable(alive[-2].data_ptr(), alive[-1].data_ptr(), cos.shape[0], by_row)
        return tables, alive

    def _check_shapes(self, step: Step) -> None:
        """Refuse what the library cannot see: tensors of other sizes than the step says."""
        rows, sequences = step.positions.numel(), step.lengths.numel()
        sizes = {
            "row_begin": (step.row_begin.numel(), sequences + 1),
            "table": (step.table.shape[0], sequences),
            "keys": (len(step.store.keys), len(self.program.layers)),
        }
        if step.embeds is not None:
            sizes["embeds"] = (step.embeds.numel(), rows * self.program.embed.embedding_dim)
        elif step.ids is not None:
            sizes["ids"] = (step.ids.numel(), rows)
        wrong = [f"{name} holds {found}, expected {want}" for name, (found, want) in sizes.items() if found != want]
        if wrong or (step.ids is None and step.embeds is None):
            raise UsageError(f"a step of {rows} rows: {wrong[0] if wrong else 'it has neither ids nor embeds'}")

    def _raise(self, status: int, step: Step) -> None:
        if status == _FAULT:
            if self._collective is not None:
                self._collective.check()
            raise CommError("the ranks lost each other in a step of the decoder")
        if status == _NO_MEMORY:
            raise KernelError("a step of the decoder found no memory for its activations")
        limit = self.program.embed.num_embeddings
        sentences = {
            -17: f"row_begin is {step.row_begin.tolist()}; expected 0, ... {step.positions.numel()}, ascending",
            -18: f"lengths are {step.lengths.tolist()}; expected each from its rows to {step.table.shape[1]} blocks",
            -19: f"the table names a block beyond the {step.store.blocks} of the store",
            -20: f"token ids run from {_ends(step.ids)}; expected 0 to {limit - 1}",
            -21: f"positions run from {_ends(step.positions)}; the model has no place for one of them",
            -22: f"wanted is {step.wanted.tolist()}; expected ascending rows below {step.positions.numel()}",
        }
        raise UsageError(f"the decoder refuses a step: {sentences.get(status, f'its parts do not fit ({status})')}")


def _whole(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype).contiguous()


def _ends(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None or not tensor.numel() else f"{int(tensor.min())} to {int(tensor.max())}"
