"""Whole Hugging Face models with our attention: near eager, the same text, and rows that depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from dist_lowbit import sample
from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder import ATTENTION_NAME, register_attention, use_attention
from dist_lowbit.decoder.hf_attention import attention_forward
from dist_lowbit.ops.attention import attention
from dist_lowbit.ops.elementwise import silu_mul

# initializer_range is large, so that attention is far from uniform.
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 60, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 1024, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip
EQUAL_HEADS = SHAPE | {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
MODELS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE),
    "mistral-window": lambda: hf.MistralConfig(**SHAPE, sliding_window=11),
    "qwen2-half-window": lambda: hf.Qwen2Config(
        **EQUAL_HEADS, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE),
    "phi3-window": lambda: hf.Phi3Config(**EQUAL_HEADS, sliding_window=13, tie_word_embeddings=False),
    "gemma2-softcap": lambda: hf.Gemma2Config(**SHAPE, sliding_window=10, query_pre_attn_scalar=20),
}


class RowLinear(nn.Module):
    """A Linear whose rows do not depend on each other: fp64 products, whose last bits the rounding to fp32 hides."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(x.double(), self.weight.double(), bias).to(x.dtype)


class RowSilu(nn.Module):
    """silu(x), where torch's own has other bits at a tensor's end (and at a thread's) than inside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_mul(x, torch.ones_like(x))


def _model(name: str, kind: str = "eager") -> Any:
    torch.manual_seed(7)
    config = MODELS[name]()
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if kind == "eager":
        return model
    if kind == "exact":
        return model.double()
    if kind == "rows":
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, child_name, RowLinear(child))
                elif child_name in ("act_fn", "activation_fn"):
                    setattr(parent, child_name, RowSilu())
    assert use_attention(model)
    return model


def _padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(8)
    most = max(lengths)
    ids = torch.randint(1, 96, (len(lengths), most))
    mask = (torch.arange(most)[None] >= most - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _steps(model: Any, batch: dict[str, torch.Tensor], cuts: list[int]) -> torch.Tensor:
    """Logits of the whole batch, its tokens given in pieces with a cache."""
    parts, cache = [], None
    for a, b in pairwise(cuts):
        given = {"input_ids": batch["input_ids"][:, a:b], "position_ids": batch["position_ids"][:, a:b]}
        out = model(**given, attention_mask=batch["attention_mask"][:, :b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("lengths", [[40], [40, 23, 1]], ids=["whole", "left-padded"])
@pytest.mark.parametrize("cuts", [[0, 40], [0, 17, 30, 31, 32, 33, 40], [0, 36, 37, 38, 39, 40]], ids=str)
@torch.no_grad()
def test_logits_are_as_near_to_exact_as_those_of_eager(name: str, lengths: list[int], cuts: list[int]) -> None:
    batch = _padded(lengths)
    real = batch["attention_mask"].bool()
    # Row by row: where all is masked, eager in fp64 gives NaN (its softmax is fp32, which makes -inf of fp64's lowest).
    alone = _model(name, "exact")
    exact = torch.cat([alone(ids[keep][None]).logits[0] for ids, keep in zip(batch["input_ids"], real, strict=True)])
    eager = _steps(_model(name), batch, cuts)[real]
    ours = _steps(_model(name, "ours"), batch, cuts)[real]
    # Both are fp32 roundings of one computation: the same Linears, and attention by sums of the same lengths. The
    # largest of some thousand such errors varies by less than 4 between two draws; a key too many moves logits 1e4
    # times as far.
    noise = float((eager.double() - exact).abs().max())
    assert float((ours.double() - exact).abs().max()) <= 4 * noise


# Not gemma2, whose gelu is torch's.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma2-softcap"])
@torch.no_grad()
def test_a_row_depends_on_neither_batch_nor_padding_nor_chunking(name: str) -> None:
    model, lengths = _model(name, "rows"), [300, 23, 261]
    batch = _padded(lengths)
    together = model(**batch).logits
    chunked = _steps(model, batch, [0, 100, 257, 258, 300])
    for i, n in enumerate(lengths):
        alone = model(batch["input_ids"][i : i + 1, -n:]).logits[0]
        assert torch.equal(together[i, -n:], alone)
        assert torch.equal(chunked[i, -n:], alone)


@torch.no_grad()
def test_a_prefill_into_a_static_cache() -> None:
    batch = _padded([20, 20])
    model = _model("llama", "rows")
    expected = model(**batch).logits
    cache = hf.StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(model(batch["input_ids"][:, :19], past_key_values=cache).logits, expected[:, :19])
    last = model(batch["input_ids"][:, 19:], past_key_values=cache, position_ids=batch["position_ids"][:, 19:])
    assert torch.equal(last.logits, expected[:, 19:])


@torch.no_grad()
def test_greedy_text_of_the_sample_model_is_that_of_eager() -> None:
    path = sample.path()
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    model = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = ["Once upon a time", "The little dog", "Tom and his sister went to the park. There they saw a big"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**given, do_sample=False, max_new_tokens=48)
    assert use_attention(model)
    assert torch.equal(model.generate(**given, do_sample=False, max_new_tokens=48), expected)


OTHERS: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)),
        {"input_ids": torch.arange(1, 19).view(2, 9), "attention_mask": torch.ones(2, 9).tril(6).long()},
    ),
    "t5": (
        lambda: hf.T5Model(hf.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)),
        {"input_ids": torch.arange(1, 19).view(2, 9), "decoder_input_ids": torch.arange(1, 11).view(2, 5)},
    ),
    "whisper": (
        lambda: hf.WhisperModel(
            hf.WhisperConfig(
                vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
                max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        {"input_features": torch.linspace(-1, 1, 320).view(1, 8, 40), "decoder_input_ids": torch.arange(1, 6)[None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
@torch.no_grad()
def test_models_that_are_no_decoders(name: str) -> None:
    build, given = OTHERS[name]
    torch.manual_seed(9)
    model = build().eval()
    model.set_attn_implementation("eager")
    eager = model(**given).last_hidden_state
    exact = model.double()(
        **{k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    ).last_hidden_state
    assert use_attention(model.float())
    noise = float((eager.double() - exact).abs().max())  # see test_logits_are_as_near_to_exact_as_those_of_eager
    assert float((model(**given).last_hidden_state.double() - exact).abs().max()) <= 4 * noise


def _call(module: nn.Module, heads: int = 6, **options: Any) -> torch.Tensor:
    torch.manual_seed(10)
    q, k, v = torch.randn(1, heads, 5, 16), torch.randn(1, 4, 5, 16), torch.randn(1, 4, 5, 16)
    return attention_forward(module.eval(), q, k, v, None, **options)[0]


@pytest.mark.parametrize("wrap", [list, lambda m: torch.tensor(m, dtype=torch.int32)], ids=["list", "tensor"])
def test_the_modules_own_map_of_heads_counts(wrap: Callable[[list[int]], Any]) -> None:
    module, index = nn.Module(), [3, 0, 0, 1, 2, 3]
    module.kv_index = wrap(index)
    torch.manual_seed(10)
    q, k, v = torch.randn(1, 6, 5, 16), torch.randn(1, 4, 5, 16), torch.randn(1, 4, 5, 16)
    expected = attention(q, k, v, torch.tensor(index, dtype=torch.int32), scale=0.25, causal_offset=0)
    assert torch.equal(_call(module), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, r'set_attn_implementation\("eager"\)'),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"heads": 5}, "set module.kv_index"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _call(nn.Module(), **({"heads": 4} | options))


def test_training_mode_and_attention_weights_are_refused_by_a_whole_model() -> None:
    model, batch = _model("llama", "ours"), _padded([4])
    with pytest.raises(UsageError, match="output_attentions"):
        model(**batch, output_attentions=True)
    with pytest.raises(UsageError, match=r"model\.eval"):
        model.train()(**batch)


def test_it_applies_only_where_the_layers_ask_for_an_attention_function() -> None:
    assert not use_attention(nn.Linear(2, 2))
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    sinks = hf.GptOssConfig(**SHAPE | {"num_local_experts": 2, "num_experts_per_tok": 1})
    for model in (bloom, hf.GptOssForCausalLM(sinks)):
        before = model.config._attn_implementation
        assert not use_attention(model)
        assert model.config._attn_implementation == before


def test_registering_again_does_no_harm() -> None:
    for _ in range(2):
        register_attention()
    assert hf.AttentionInterface().get_interface(ATTENTION_NAME, None) is attention_forward
