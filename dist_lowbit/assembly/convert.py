"""Convert model files to a low-bit checkpoint, tensor by tensor, for any number of ranks in one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dist_lowbit.checkpoint import FileRecord, TensorSource, commit, discard, shard_names
from dist_lowbit.comm import SingleGroup
from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.formats import cast_name, lookup
from dist_lowbit.formats.packed import summation_block
from dist_lowbit.parallel.split import whole
from dist_lowbit.quantize import Recipe

from .build import LowBitState
from .hf_files import check_target, write_hf_files
from .optimize import embeddings, form_under
from .paths import check_conversion
from .save import Item, Piece, first_weight, metadata_of, tensor_item, weight_item, write_items
from .skeleton import class_of, empty_model, read_config
from .source import missing, source_target, source_weights
from .weights import SourceWeights


def convert(source_dir: Path, directory: Path, recipe: Recipe, tp: int, *, trust_remote_code: bool = False) -> None:
    """Quantize the model files in `source_dir` into a low-bit checkpoint of tp rank files in `directory`.

    Reads each tensor once; peak memory is a few tensors, whatever the model's size. The directory is committed as
    a whole or not at all.
    """
    check_conversion(source_dir, directory, tp)
    config = read_config(source_dir, trust_remote_code)
    model = empty_model(class_of(config), config, source_dir, trust_remote_code)
    with TensorSource(source_dir) as source:
        weights = source_weights(model, source, recipe)
        strange = missing(model, weights)
        if strange:
            raise CheckpointError(
                f"{source_dir} holds no tensor {strange[0]}; its files do not match its config, or use names that "
                f"transformers rewrites on loading: load it with from_pretrained(load_in_low_bit=...) and save_low_bit"
            )
        target, kept = source_target(model, recipe, tp)
        left = kept if target.family is None or tp == 1 else frozenset()
        state = LowBitState(recipe, target, SingleGroup(), left)
        items = _items(model, state, weights, source)
        fresh = not directory.exists()
        check_target(directory)
        try:
            records = _write(state, items, weights, directory)
        except BaseException:
            if fresh and not any(directory.iterdir()):
                directory.rmdir()
            raise
    try:
        write_hf_files(model, directory, recipe, first_weight(state), state.dtype, source_dir)
        commit(directory, tp, metadata_of(state, model), records)
    except BaseException:
        discard(directory, records)
        raise


def _items(model: torch.nn.Module, state: LowBitState, weights: SourceWeights, source: TensorSource) -> list[Item]:
    tp, own = state.target.plan.tp, embeddings(model)
    items: list[Item] = []
    planned = set()
    for name, split in state.target.plan.splits.items():
        if name in state.kept:
            continue
        planned |= {name, f"{name}.weight", f"{name}.bias"}  # a stack of experts has the name itself
        form = form_under(state.recipe, name, name in own)
        row, group_size = form if form is not None else (lookup(cast_name(weights.dtype(f"{name}.weight"))), -1)
        items.append(weight_item(name, split, row, -1 if group_size is None else group_size))
        bias = weights.tensor(f"{name}.bias")
        if bias is not None:
            items.append(tensor_item(f"{name}.bias", bias, tp, split))
    for name in model.state_dict():
        if name not in planned:
            tensor = weights.tensor(name)
            assert tensor is not None  # `missing` has looked
            items.append(tensor_item(name, tensor, tp))
    return items


def _write(state: LowBitState, items: list[Item], weights: SourceWeights, directory: Path) -> list[FileRecord]:
    tp = state.target.plan.tp

    def packed(item: Item) -> Piece:
        name = item.name.removesuffix(".weight")
        shape = (item.shape[0], item.shape[1])
        every = weights.packed(name, whole(shape, summation_block(item.group_size), 1), 0)
        axis = item.axis
        return (lambda a, b: every) if axis is None else (lambda a, b: every.split(axis, a, b))

    def tensor(item: Item) -> Callable[[int, int], torch.Tensor]:
        value = weights.tensor(item.name)
        assert value is not None  # `missing` has looked
        return (lambda a, b: value) if item.axis is None else (lambda a, b: value[a:b])

    return write_items(directory, shard_names(tp), range(tp), items, packed, tensor)
