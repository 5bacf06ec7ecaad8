"""Floor 2: disk. Low-bit checkpoints written piece by piece and read by range, and the weights of ordinary models."""

from .commit import commit, discard
from .manifest import MANIFEST, Manifest, Shard, TensorInfo, WeightInfo, shard_names
from .pieces import TensorEntry, WeightEntry
from .reader import CheckpointReader, is_checkpoint
from .report import Report, Row, describe, verify
from .source import SourceTensor, TensorSource
from .writer import FileRecord, ShardWriter

__all__ = [
    "MANIFEST",
    "CheckpointReader",
    "FileRecord",
    "Manifest",
    "Report",
    "Row",
    "Shard",
    "ShardWriter",
    "SourceTensor",
    "TensorEntry",
    "TensorInfo",
    "TensorSource",
    "WeightEntry",
    "WeightInfo",
    "commit",
    "describe",
    "discard",
    "is_checkpoint",
    "shard_names",
    "verify",
]
