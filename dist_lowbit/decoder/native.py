"""The executor in C++: a step is one call of the compiled library (kernels/cpu/decoder.h)."""

from __future__ import annotations

import ctypes
import threading
import weakref
from dataclasses import dataclass

import torch

from dist_lowbit.core.errors import CommError, KernelError, UsageError
from dist_lowbit.core.native import native_why_not
from dist_lowbit.ops import library as compiled_library

from .native_program import Structs, why_not
from .native_structs import CRopeTable, CStep, CTimes, declare
from .program import Program, Rope
from .rope import rope_table
from .step import BLOCK_SLOTS, KvStore, Step

_KV_TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}  # kernels/cpu/float_kernels.h
_FAULT = -16
_NO_MEMORY = -3
_POSITION = -21
_FIRST_POSITIONS = 512
_TABLE_POSITIONS = 1 << 20  # beyond these there is no table of all positions


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
    set. Memory beside the weights: activations of up to 512 rows, kept from step to step. Threads take turns; over
    several ranks their steps must come in the same order on each.
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
        self._turn = threading.Lock()  # the library's decoder is used by one thread at a time, and so is what follows
        self._ropes = (CRopeTable * max(1, len(program.ropes)))()
        self._by_length = any(rope.dynamic is not None for rope in program.ropes)
        bare = program.hidden if program.final_project is None else program.final_project.out_features
        self._widths = {True: program.vocab, False: bare}
        # What the library reads of the last step and of its store, and what these point to.
        self._c = CStep()
        self._given: list[torch.Tensor] = []
        self._last: weakref.ref[Step] | None = None
        self._store: tuple[weakref.ref[KvStore], list[object]] | None = None

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
        with self._turn:
            if not self._free.alive:
                raise UsageError("this decoder is closed")
            c = self._filled(step)
            width = self._widths[logits]
            out = torch.empty(c.wanted_count, width, dtype=torch.float32, device="cpu")
            c.logits, c.out, c.out_stride = int(logits), out.data_ptr(), width
            status = self._library.dlb_decoder_step(self._handle, ctypes.byref(c))
            if status == _POSITION and self._more_angles(step):
                status = self._library.dlb_decoder_step(self._handle, ctypes.byref(c))
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

    def _filled(self, step: Step) -> CStep:
        """Return the struct of a step; of the one before again, whose tensors have other contents now, as it is."""
        if self._last is not None and self._last() is step:
            return self._c
        self._last = None  # until the struct is whole
        self._check_shapes(step)
        c = self._of_store(step.store)
        given = [_whole(t, torch.int32) for t in (step.positions, step.row_begin, step.lengths, step.table)]
        given.append(_whole(step.wanted, torch.int64))
        c.positions, c.row_begin, c.lengths, c.table, c.wanted = (t.data_ptr() for t in given)
        read = [step.positions, step.row_begin, step.lengths, step.table, step.wanted]
        c.ids = c.embeds = None
        if step.embeds is not None:
            given.append(_whole(step.embeds, torch.float32))
            c.embeds = given[-1].data_ptr()
        elif step.ids is not None:
            given.append(_whole(step.ids, torch.int32))
            read.append(step.ids)
            c.ids = given[-1].data_ptr()
        c.rows, c.sequences, c.wanted_count = step.positions.numel(), step.lengths.numel(), step.wanted.numel()
        c.table_stride = step.table.shape[1]
        self._fill_ropes(step)
        self._c, self._given = c, given
        same = len(read) == len(given) and all(mine is theirs for mine, theirs in zip(given, read, strict=True))
        self._last = weakref.ref(step) if same and not self._by_length else None
        return c

    def _of_store(self, store: KvStore) -> CStep:
        """Return a struct that points to the store, made once for each store."""
        if self._store is not None and self._store[0]() is store:  # whose tensors stay where they are
            return self._c
        tensors = (store.keys, store.values, store.key_scales, store.value_scales)
        c = CStep(blocks=store.blocks, block_slots=BLOCK_SLOTS, kv_type=_KV_TYPES[store.dtype])
        alive: list[object] = []
        for name, kind in zip(("keys", "values", "key_scales", "value_scales"), tensors, strict=True):
            if kind:
                pointers = (ctypes.c_void_p * len(kind))(*(tensor.data_ptr() or None for tensor in kind))
                alive.append(pointers)
                setattr(c, name, ctypes.addressof(pointers))
        c.ropes = ctypes.addressof(self._ropes)
        self._c, self._store = c, (weakref.ref(store), alive)
        return c

    def _fill_ropes(self, step: Step) -> None:
        """Point to cos and sin for a step: of the positions seen so far, or of its rows where they go by the length."""
        for index, rope in enumerate(self.program.ropes):
            if rope.dynamic is not None:
                self._set_angles(index, rope_table(rope, step.positions, step.row_begin), by_row=True)
            elif self._angles[index] is None or self._ropes[index].by_row:
                self._set_angles(index, _angles(rope, _FIRST_POSITIONS))

    def _more_angles(self, step: Step) -> bool:
        """Make the tables reach beyond a step's positions; False where they do, or cannot."""
        highest, grown = int(step.positions.max()), False
        for index, rope in enumerate(self.program.ropes):
            known = self._angles[index]
            if rope.dynamic is not None or known is None or known[0].shape[0] > highest:
                continue
            if highest < _TABLE_POSITIONS:
                self._set_angles(index, _angles(rope, 2 * (highest + 1)))
            else:  # for this step alone: a table of all positions would take gigabytes
                self._set_angles(index, rope_table(rope, step.positions, step.row_begin), by_row=True)
                self._last = None
            grown = True
        return grown

    def _set_angles(self, index: int, angles: tuple[torch.Tensor, torch.Tensor], by_row: bool = False) -> None:
        cos, sin = (each.contiguous() for each in angles)
        self._angles[index] = cos, sin
        self._ropes[index] = CRopeTable(cos.data_ptr(), sin.data_ptr(), cos.shape[0], int(by_row))

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
            _POSITION: f"positions run from {_ends(step.positions)}; the model has no place for one of them",
            -22: f"wanted is {step.wanted.tolist()}; expected ascending rows below {step.positions.numel()}",
        }
        raise UsageError(f"the decoder refuses a step: {sentences.get(status, f'its parts do not fit ({status})')}")


def _whole(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    fits = tensor.dtype is dtype and tensor.is_contiguous()
    return tensor if fits else tensor.detach().to(dtype).contiguous()


def _angles(rope: Rope, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the first `count` positions."""
    return rope_table(rope, torch.arange(count, device="cpu"), torch.tensor([0, count], device="cpu"))


def _ends(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None or not tensor.numel() else f"{int(tensor.min())} to {int(tensor.max())}"
