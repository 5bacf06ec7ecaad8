"""The plain structs of kernels/cpu/decoder.h and fused.h, field by field; the library checks version and sizes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

from dist_lowbit.ops.library import CExpert

ABI = 1
NORM_KINDS = {"rms": 1, "layer": 2}  # enum dlb_rows_kind
ACTIVATION_CODES = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "relu": 5}  # enum dlb_activation


def _of(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class CMatrix(ctypes.Structure):
    """struct dlb_matrix."""

    _fields_ = [
        ("packed", c_void_p),
        ("bytes", c_int64),
        ("bias", c_void_p),
        *_of(c_int32, "reduce gather"),
        ("widths", c_void_p),
    ]


class CNorm(ctypes.Structure):
    """struct dlb_norm."""

    _fields_ = [
        ("kind", c_int32),
        ("eps", c_float),
        *_of(c_void_p, "weight bias"),
        *_of(c_int64, "size head_stride"),
    ]


class CTable(ctypes.Structure):
    """struct dlb_table."""

    _fields_ = [("rows", c_void_p), *_of(c_int64, "count width"), *_of(c_int32, "type reserved")]


class CMlp(ctypes.Structure):
    """struct dlb_mlp."""

    _fields_ = [("up", CMatrix * 2), ("down", CMatrix), *_of(c_int32, "activation gated up_first reserved")]


class CRouted(ctypes.Structure):
    """struct dlb_routed."""

    _fields_ = [
        *_of(CMatrix, "router shared_gate"),
        ("experts", c_void_p),
        *_of(c_int64, "count top_k"),
        *_of(c_int32, "renormalise has_shared activation reduce"),
    ]


class CLayer(ctypes.Structure):
    """struct dlb_layer."""

    _fields_ = [
        *_of(CNorm, "attn_norm mlp_norm attn_post_norm mlp_post_norm q_norm k_norm"),
        ("qkv", CMatrix * 3),
        ("o", CMatrix),
        ("mlp", CMlp),
        ("routed", CRouted),
        *_of(c_void_p, "q_at k_at v_at kv_index alibi"),
        *_of(c_int64, "heads kv_heads head_dim window"),
        ("rope", c_int32),
        *_of(c_float, "scale softcap clip"),
        *_of(c_int32, "parallel norm_after residual_normed reserved"),
    ]


class CRope(ctypes.Structure):
    """struct dlb_rope."""

    _fields_ = [("dim", c_int64), *_of(c_int32, "interleaved reserved")]


class CProgram(ctypes.Structure):
    """struct dlb_program."""

    _fields_ = [
        *_of(c_int32, "abi reserved"),
        ("sizes", c_int64 * 4),
        *_of(c_int64, "hidden vocab layer_count rope_count"),
        *_of(c_void_p, "layers ropes"),
        ("embed", CTable),
        *_of(c_int64, "embed_begin ids"),
        ("embed_reduce", c_int32),
        ("embed_scale", c_float),
        ("embed_norm", CNorm),
        ("embed_project", CMatrix),
        ("positions", CTable),
        ("position_offset", c_int64),
        ("final_norm", CNorm),
        *_of(CMatrix, "final_project lm_head"),
        *_of(c_float, "logit_scale logit_softcap"),
        ("ranks", c_void_p),
    ]


class CRopeTable(ctypes.Structure):
    """struct dlb_rope_table."""

    _fields_ = [*_of(c_void_p, "cos sin"), ("count", c_int64), *_of(c_int32, "by_row reserved")]


class CStep(ctypes.Structure):
    """struct dlb_step."""

    _fields_ = [
        *_of(c_int64, "rows sequences wanted_count"),
        *_of(c_void_p, "ids embeds positions row_begin lengths table"),
        ("table_stride", c_int64),
        *_of(c_void_p, "wanted ropes keys values key_scales value_scales"),
        *_of(c_int64, "blocks block_slots"),
        *_of(c_int32, "kv_type logits"),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


class CTimes(ctypes.Structure):
    """struct dlb_decoder_times."""

    _fields_ = _of(c_int64, "linear attention reduce wait other total steps rows")


def sizes() -> tuple[int, ...]:
    """Return what dlb_program.sizes must say."""
    return tuple(ctypes.sizeof(kind) for kind in (CProgram, CLayer, CStep, CExpert))


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the decoder's functions take."""
    library.dlb_decoder_create.restype = c_void_p
    library.dlb_decoder_create.argtypes = [POINTER(CProgram), POINTER(c_int)]
    library.dlb_decoder_step.restype = c_int
    library.dlb_decoder_step.argtypes = [c_void_p, POINTER(CStep)]
    library.dlb_decoder_times_of.restype = None
    library.dlb_decoder_times_of.argtypes = [c_void_p, POINTER(CTimes), c_int]
    library.dlb_decoder_workspace_bytes.restype = c_int64
    library.dlb_decoder_workspace_bytes.argtypes = [c_void_p]
    library.dlb_decoder_destroy.restype = None
    library.dlb_decoder_destroy.argtypes = [c_void_p]
