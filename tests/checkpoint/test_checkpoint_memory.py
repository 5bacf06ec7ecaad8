"""Peak memory (VmHWM) of writing and reading is a few pieces, whatever the size of the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

COMMON = """
import sys, torch
from pathlib import Path
from dist_lowbit.checkpoint import *
from dist_lowbit.formats import PackedWeight, lookup

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1])

folder, fp16 = Path(sys.argv[1]), lookup("fp16")
shape, count = (1024, 1024), 64  # 2 MiB each, 128 MiB in all
halves = [(0, 512), (512, 1024)]
def piece(i):
    values = torch.full((1024, 512), float(i), dtype=torch.float16)
    return PackedWeight.from_tensors(fp16, (1024, 512), -1, {"values": values})
"""

WRITE = """
piece(0)
before = peak()
writers = [
    ShardWriter(folder, name, [WeightEntry(f"w{i}", fp16, -1, shape, 1, *half) for i in range(count)])
    for name, half in zip(shard_names(2), halves)
]
for i in range(count):
    for writer, (start, _) in zip(writers, halves):
        writer.write_weight(f"w{i}", start, piece(i))
commit(folder, 2, {}, [writer.close() for writer in writers])
print(peak() - before)
"""

READ = """
with CheckpointReader(folder) as reader:
    reader.read_weight("w0", 0, [(0, 8)])
    before = peak()
    for i in range(count):
        assert bool((reader.read_weight(f"w{i}").parts["values"].tensor == i).all())
        reader.read_weight(f"w{i}", 1, [(256, 768)])
print(peak() - before)
"""

VERIFY = """
describe(folder)
before = peak()
assert verify(folder).bytes == 128 << 20
print(peak() - before)
"""

SOURCE = """
from safetensors.torch import save_file
if not (folder / "model.safetensors").exists():
    save_file({f"w{i}": torch.full((1 << 20,), float(i)) for i in range(32)}, folder / "model.safetensors")
    sys.exit(print(0))
before = peak()
with TensorSource(folder) as source:
    for name in source:
        source.read(name)
print(peak() - before)
"""


def run(code: str, folder: Path) -> int:
    """Return how far VmHWM rose, in KiB."""
    command = [sys.executable, "-c", COMMON + code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# Measured rises are 2 to 10 MiB: a piece or two, or the reader's 8 MiB window, and what the allocator keeps. 128 MiB
# are written or read, so a bound of 24 MiB tells the two apart.
BOUND = 24 << 10


@pytest.mark.slow
def test_peak_memory_is_a_few_pieces(tmp_path: Path) -> None:
    assert run(WRITE, tmp_path) < BOUND
    assert run(READ, tmp_path) < BOUND
    assert run(VERIFY, tmp_path) < BOUND


@pytest.mark.slow
def test_peak_memory_of_a_source_is_a_tensor(tmp_path: Path) -> None:
    run(SOURCE, tmp_path)
    assert run(SOURCE, tmp_path) < BOUND
