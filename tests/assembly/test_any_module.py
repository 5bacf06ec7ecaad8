"""optimize_model on modules that are no language models of a known family."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dist_lowbit import load_low_bit, optimize_model
from dist_lowbit.core.errors import CheckpointError, FormatError, PlanError, UsageError
from dist_lowbit.formats import FORMATS, quantize
from dist_lowbit.formats.table import ALIASES, USER_FORMATS
from dist_lowbit.parallel import LowBitLinear
from tests.bounds import exact_linear, linear_bound


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 70), nn.GELU(), nn.Linear(70, 7, bias=False))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def bert() -> nn.Module:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return BertModel(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2))


INPUTS: dict[Callable[[], nn.Module], torch.Tensor] = {
    mlp: torch.randn(3, 100, generator=torch.Generator().manual_seed(0)),
    encoder: torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)),
    bert: torch.arange(10).reshape(2, 5),
    gpt2: torch.arange(10).reshape(2, 5),
}


def first(output: object) -> torch.Tensor:
    tensor = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def low_by_hand(plain: nn.Module, low: nn.Module) -> nn.Module:
    """Let each Linear of a network give what the one of the same name in `low` does, if that has the same weights."""
    linears = {name: module for name, module in plain.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert linears.keys() == {name for name, module in low.named_modules() if isinstance(module, LowBitLinear)}
    for name, module in linears.items():
        other = low.get_submodule(name)
        assert isinstance(other, LowBitLinear)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        held, wanted = other.unpack().tensors(), quantize(weight.contiguous(), other.format).tensors()
        assert all(torch.equal(held[part], wanted[part]) for part in wanted), name
        if isinstance(plain, nn.TransformerEncoder):  # torch reads its Linears' weights instead of calling them
            module.weight.data = other.weight
        else:
            module.register_forward_hook(lambda _, inputs, output, other=other: other(inputs[0]))
    return plain


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_optimize_save_load(make: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    plain = copy.deepcopy(model).float()
    model = optimize_model(model, low_bit="sym_int8")
    x = INPUTS[make]
    with torch.no_grad():
        y, expected = first(model(x)), first(low_by_hand(plain, model)(x))
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    model.save_low_bit(tmp_path)
    torch.manual_seed(1)
    loaded = load_low_bit(make(), tmp_path)
    with torch.no_grad():
        assert torch.equal(first(loaded(x)), y)


@pytest.mark.parametrize("name", USER_FORMATS)
def test_every_linear_is_within_its_bound(name: str) -> None:
    torch.manual_seed(0)
    model = optimize_model(mlp(), low_bit=name)
    assert isinstance(model, nn.Sequential)
    x = INPUTS[mlp]
    layer = model[0]
    assert isinstance(layer, LowBitLinear)
    assert layer.format == ALIASES.get(name, name)
    weight = layer.unpack()
    product = layer(x).double() - layer.bias.double()
    # The bias is added in fp32: half an ulp of the result.
    rounding = 2.0**-24 * layer(x).double().abs()
    assert ((product - exact_linear(x, weight)).abs() <= linear_bound(x, weight) + rounding).all()


def test_fp32_compute_keeps_the_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = optimize_model(nn.Sequential(nn.Linear(128, 16, bias=False)), compute="fp32")[0]
    x = torch.randn(2, 128)
    weight = layer.unpack()
    assert ((layer(x).double() - exact_linear(x, weight)).abs() <= linear_bound(x, weight, "fp32")).all()


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [(["2"], {"2"}), (["0", "2"], {"0", "2"}), (["[01]"], {"0"}), (["?"], {"0", "2"}), ([], set())],
)
def test_modules_to_not_convert_takes_substrings_and_globs(patterns: list[str], kept: set[str]) -> None:
    model = optimize_model(mlp(), modules_to_not_convert=patterns)
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert left == kept


def test_a_kept_linear_survives_save_and_load(tmp_path: Path) -> None:
    model = optimize_model(mlp(), modules_to_not_convert=["2"])
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(mlp(), tmp_path)
    assert isinstance(loaded[2], nn.Linear)
    x = INPUTS[mlp]
    assert torch.equal(loaded(x), model(x))


def test_the_accepted_switches_change_nothing() -> None:
    torch.manual_seed(0)
    a = mlp()
    b = copy.deepcopy(a)
    x = INPUTS[mlp]
    switched = optimize_model(b, cpu_embedding=True, lightweight_bmm=True)
    assert torch.equal(optimize_model(a)(x), switched(x))


def test_a_copy_runs_alone() -> None:
    model = optimize_model(mlp())
    twin = copy.deepcopy(model)
    x = INPUTS[mlp]
    expected = model(x)
    del model
    assert torch.equal(twin(x), expected)


def test_tracing_and_exporting_see_the_product() -> None:
    model = optimize_model(mlp())
    x, other = INPUTS[mlp], torch.randn(3, 100)
    assert torch.equal(torch.jit.trace(model, x)(other), model(other))
    assert torch.equal(torch.export.export(model, (x,)).module()(other), model(other))


@pytest.mark.parametrize("compute", ["int8", "fp32"])  # for fp32 the reference takes over
@pytest.mark.parametrize("width", [1, 64, 99, 101, 4096])
def test_an_input_of_another_width_is_refused(width: int, compute: str) -> None:
    model = optimize_model(mlp(), compute=compute)
    with pytest.raises(UsageError, match=rf"x has {width} features for 70 outputs; the weight takes 100 for 70"):
        model(torch.ones(2, width))


def test_an_integer_input_is_refused() -> None:
    model = optimize_model(mlp())
    with pytest.raises(UsageError, match=r"x is torch\.int64; a Linear takes a floating-point tensor"):
        model(torch.arange(200).reshape(2, 100))


def test_a_backward_pass_is_refused() -> None:
    model = optimize_model(mlp())
    with pytest.raises(UsageError, match=r"dist_lowbit::linear has no gradient"):
        model(torch.ones(1, 100, requires_grad=True)).sum().backward()


def test_the_weight_can_be_looked_at() -> None:
    torch.manual_seed(0)
    plain = mlp()
    values = plain[0].weight.detach().clone()
    layer = optimize_model(plain, low_bit="fp32")[0]
    assert torch.equal(layer.weight, values)


def _poisoned() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = float("nan")
    return model


REFUSED = {
    "unknown format": (mlp, {"low_bit": "int4"}, FormatError, r"unknown low_bit 'int4'; expected one of sym_int4, "),
    "unknown argument": (mlp, {"lowbit": "nf4"}, UsageError, r"no argument 'lowbit'; its further arguments are torch_"),
    "bad compute": (mlp, {"compute": "int4"}, UsageError, r"compute is 'int4'; expected int8 or fp32"),
    "bad dtype": (mlp, {"torch_dtype": "int8"}, UsageError, r"torch_dtype is 'int8'; expected float32"),
    "bad group": (mlp, {"group_size": 48}, FormatError, r"group_size is 48; expected a multiple of 32"),
    "a string of patterns": (mlp, {"modules_to_not_convert": "2"}, UsageError, r"expects a list"),
    "no linear": (nn.ReLU, {}, PlanError, r"ReLU has no Linear layer"),
    "no module": (lambda: "model", {}, UsageError, r"takes an nn.Module; this is a str"),
    "meta": (lambda: mlp().to("meta"), {}, UsageError, r"has no weights \(device meta\)"),
    "twice": (lambda: optimize_model(mlp()), {}, UsageError, r"already low-bit"),
    "nan": (_poisoned, {}, FormatError, r"2\.weight holds nan at \[3, 4\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_sentences(case: str) -> None:
    make, arguments, error, text = REFUSED[case]
    with pytest.raises(error, match=text) as caught:
        optimize_model(make(), **arguments)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    optimize_model(mlp()).save_low_bit(tmp_path)
    with pytest.raises(CheckpointError, match=r"it was saved from another model"):
        load_low_bit(encoder(), tmp_path)
    smaller = nn.Sequential(nn.Linear(100, 60), nn.GELU(), nn.Linear(60, 7, bias=False))
    with pytest.raises(CheckpointError, match=r"0\.weight in .* has shape \(70, 100\); the model expects \(60, 100\)"):
        load_low_bit(smaller, tmp_path)


def test_an_ordinary_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no model, no low-bit checkpoint"):
        load_low_bit(mlp(), tmp_path)
    with pytest.raises(UsageError, match=r"is no directory"):
        load_low_bit(mlp(), tmp_path / "nowhere")


def test_saving_over_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"holds another model's weights \(pytorch_model\.bin\)"):
        optimize_model(mlp()).save_low_bit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_an_ordinary_model_has_no_low_bit_to_save(tmp_path: Path) -> None:
    from dist_lowbit.assembly.save import save_low_bit

    with pytest.raises(UsageError, match=r"not low-bit; call optimize_model on it first"):
        save_low_bit(mlp(), tmp_path)


def test_every_format_saves_and_loads(tmp_path: Path) -> None:
    for name in FORMATS:
        model = optimize_model(mlp(), low_bit=name)
        model.save_low_bit(tmp_path)  # over the previous one: the directory holds one checkpoint at a time
        x = INPUTS[mlp]
        assert torch.equal(load_low_bit(mlp(), tmp_path)(x), model(x)), name
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_an_unknown_family_says_that_hugging_faces_forward_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_lowbit"):
        optimize_model(gpt2(), "sym_int4")
        optimize_model(nn.Sequential(nn.Linear(64, 8)), "sym_int4")
    assert [r.getMessage() for r in caplog.records if "known family" in r.getMessage()] == [
        "gpt2 is no known family: Hugging Face's forward runs it, over low-bit Linears"
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"decoder": "native"},
            "decoder is 'native', and gpt2 is no known family; leave it, or DIST_LOWBIT_DECODER, out",
        ),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype is 'int8', and Hugging Face's forward, which runs this model"),
    ],
)
def test_what_only_the_decoder_does_is_refused_for_an_unknown_family(options: dict[str, str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        optimize_model(gpt2(), "sym_int4", **options)
