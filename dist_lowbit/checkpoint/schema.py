"""The text of lowbit.json: every field read with its type and range checked, and one checksum over all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_lowbit.core.errors import CheckpointError, FormatError
from dist_lowbit.formats import lookup
from dist_lowbit.formats.table import check_group_size

from .container import DIM_LIMIT, DTYPE_NAMES, DTYPES, RANK_LIMIT, checksum
from .manifest import FileInfo, Info, Manifest, Shard, TensorInfo, WeightInfo
from .pieces import Entry, TensorEntry, WeightEntry
from .strict import Fields, parse_json

SCHEMA_VERSION = 1
_HEX = re.compile(r"[0-9a-f]{16}")


def _canonical(raw: Mapping[str, Any]) -> bytes:
    return json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def render(raw: Mapping[str, Any]) -> bytes:
    """Return the text of a manifest's JSON with its checksum, laid out to be read by people."""
    sealed = {"checksum": checksum(_canonical(raw)), **raw}
    lines = []
    for key, value in sealed.items():
        if key in ("weights", "tensors") and value:
            rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{rows}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _shards_json(shards: tuple[Shard, ...]) -> list[dict[str, Any]]:
    return [
        {"file": s.file, "start": s.start, "stop": s.stop, "checksums": {p: list(c) for p, c in s.checksums.items()}}
        for s in shards
    ]


def _weight_json(info: WeightInfo) -> dict[str, Any]:
    return {
        "format": info.format,
        "group_size": info.group_size,
        "shape": list(info.shape),
        "axis": info.axis,
        "shards": _shards_json(info.shards),
    }


def _tensor_json(info: TensorInfo) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[info.dtype],
        "shape": list(info.shape),
        "axis": info.axis,
        "shards": _shards_json(info.shards),
    }


def read_checksums(value: dict[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    """Return checksums by part, each 16 hex digits."""
    for part, sums in value.items():
        if not isinstance(sums, list) or not all(isinstance(s, str) and _HEX.fullmatch(s) for s in sums):
            raise CheckpointError(f"{where} has checksums {sums!r:.80} of {part!r:.40}; expected 16 hex digits each")
    return {part: tuple(sums) for part, sums in value.items()}


def _shards(rows: list[Any], where: str) -> tuple[Shard, ...]:
    shards = []
    for row in rows:
        fields = Fields(row, f"{where}: a shard")
        file = fields.integer("file", 0, 1 << 32)
        start, stop = fields.integer("start", 0, DIM_LIMIT), fields.integer("stop", 0, DIM_LIMIT)
        shards.append(Shard(file, start, stop, read_checksums(fields.object("checksums"), where)))
        fields.done()
    return tuple(sorted(shards, key=lambda s: s.start))


def read_whole(name: str, fields: Fields, kind: str) -> Entry:
    """Take the fields that say what a weight or a tensor is, of all of it."""
    if kind == "weights":
        format = lookup(fields.text("format"))
        group_size = fields.integer("group_size", -1, DIM_LIMIT)
        if check_group_size(format, group_size) != group_size:
            raise CheckpointError(f"{name} has group_size {group_size}; expected -1 for {format.name}")
        shape = fields.integers("shape", 1, DIM_LIMIT, 2)
        return WeightEntry(name, format, group_size, shape)  # type: ignore[arg-type]  # its length is checked there
    dtype = fields.text("dtype")
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} has dtype {dtype!r:.40}; expected one of {', '.join(DTYPES)}")
    return TensorEntry(name, DTYPES[dtype], fields.integers("shape", 0, DIM_LIMIT, RANK_LIMIT))


def _info(name: str, row: object, kind: str) -> Info:
    fields = Fields(row, f"{name!r:.200}")
    whole = read_whole(name, fields, kind)
    axis = fields.optional("axis", 0, 1)
    shards = _shards(fields.array("shards"), f"{name!r:.200}")
    fields.done()
    if isinstance(whole, WeightEntry):
        return WeightInfo(whole, axis, shards)
    return TensorInfo(whole, axis, shards)


def _manifest(raw: dict[str, Any]) -> Manifest:
    fields = Fields(raw, "the manifest")
    fields.integer("schema_version", SCHEMA_VERSION, SCHEMA_VERSION)
    files = []
    for row in fields.array("files"):
        file = Fields(row, "an entry of files")
        info = FileInfo(file.text("name"), file.integer("bytes", 8, 1 << 62), file.text("header"))
        file.done()
        files.append(info)
    weights, tensors = {}, {}
    for name, row in fields.object("weights").items():
        weights[name] = _info(name, row, "weights")
    for name, row in fields.object("tensors").items():
        tensors[name] = _info(name, row, "tensors")
    manifest = Manifest(
        fields.integer("tp", 1, 1 << 20),
        fields.text("producer"),
        fields.object("metadata"),
        tuple(files),
        weights,  # type: ignore[arg-type]
        tensors,  # type: ignore[arg-type]
    )
    fields.done()
    return manifest


def encode(manifest: Manifest) -> bytes:
    """Return the file's text: one line for each weight and tensor, and a checksum of all of it."""
    return render(
        {
            "schema_version": SCHEMA_VERSION,
            "producer": manifest.producer,
            "tp": manifest.tp,
            "metadata": manifest.metadata,
            "files": [{"name": f.name, "bytes": f.bytes, "header": f.header} for f in manifest.files],
            "weights": {info.name: _weight_json(info) for info in manifest.weights.values()},
            "tensors": {info.name: _tensor_json(info) for info in manifest.tensors.values()},
        }
    )


def decode(data: bytes, where: str) -> Manifest:
    """Read lowbit.json; whatever is wrong is a CheckpointError that begins with `where`."""
    raw = parse_json(data, where)
    version = raw.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{where} has schema_version {version!r:.40}; expected {SCHEMA_VERSION}: "
            "it was written by another version of dist_lowbit"
        )
    stated = raw.pop("checksum", None)
    found = checksum(_canonical(raw))
    if stated != found:
        raise CheckpointError(
            f"{where} has checksum {found}; expected {stated!r:.40}: it was altered after it was written"
        )
    try:
        return _manifest(raw)
    except (CheckpointError, FormatError) as error:
        raise CheckpointError(f"{where}: {error}") from None
