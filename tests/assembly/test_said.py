"""What is said where Hugging Face's forward runs a model of a known family, and which calls of one are refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from dist_lowbit import optimize_model
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.settings import settings
from dist_lowbit.decoder.backbone import FusedBackbone

VOCAB = 61


def config() -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB}
    return LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0
    )


def ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dist_lowbit"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-bit checkpoint of a small llama."""
    folder = tmp_path_factory.mktemp("said") / "low"
    torch.manual_seed(0)
    optimize_model(LlamaForCausalLM(config())).save_low_bit(folder)
    return folder


@pytest.fixture
def fresh_settings() -> Iterator[None]:
    """Let a test change the environment that settings are read from."""
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize("way", ["argument", "config"])
def test_another_attention_is_hugging_faces_and_said_once(
    way: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {"attn_implementation": "eager"}
    if way == "config":
        asked = {"config": AutoConfig.from_pretrained(saved, attn_implementation="eager")}
    with caplog.at_level(logging.WARNING, "dist_lowbit"), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(saved, **asked)
        for _ in range(2):
            model(ids())
    assert model.config._attn_implementation == "eager"
    assert not isinstance(model.model, FusedBackbone)
    assert messages(caplog) == [
        "Hugging Face's forward runs this model, slower than the decoder: attn_implementation is 'eager'; leave it out"
    ]


@pytest.mark.parametrize("asked", [None, "sdpa"])
def test_the_usual_attention_leaves_the_decoder_on(
    asked: str | None, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dist_lowbit"):
        model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=asked)
    assert isinstance(model.model, FusedBackbone)
    assert not messages(caplog)


def test_eager_as_the_only_attention_of_a_class_is_no_wish(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = GPTJConfig(n_embd=64, n_head=4, n_layer=1, rotary_dim=16, vocab_size=VOCAB, n_positions=64)
    plain = GPTJForCausalLM(sizes)
    assert plain.config._attn_implementation == "eager"
    optimize_model(plain).save_low_bit(tmp_path)
    with caplog.at_level(logging.WARNING, "dist_lowbit"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model.transformer, FusedBackbone)
    assert not messages(caplog)


@pytest.mark.usefixtures("fresh_settings")
def test_another_attention_beside_a_decoder_by_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_LOWBIT_DECODER", "torch")
    with pytest.raises(UsageError, match="is 'eager', and DIST_LOWBIT_DECODER is 'torch', whose attention is its own"):
        AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")


@pytest.mark.usefixtures("fresh_settings")
def test_nothing_is_said_where_the_decoder_is_off(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DIST_LOWBIT_DECODER", "off")
    with caplog.at_level(logging.WARNING, "dist_lowbit"):
        AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert not messages(caplog)


OTHER_HEADS = {
    LlamaForSequenceClassification: r"LlamaForSequenceClassification is not built as .* family llama are \(it has no "
    r"lm_head\)",
    LlamaModel: r"LlamaModel is not built as .* family llama are \(it has no model\.embed_tokens\)",
}


@pytest.mark.parametrize("cls", OTHER_HEADS)
def test_another_head_of_a_known_family(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_lowbit"):
        optimize_model(cls(config()))
    (said,) = messages(caplog)
    assert said.endswith(": Hugging Face's forward runs it, over low-bit Linears")
    with pytest.raises(UsageError, match=f"decoder is 'torch', and {OTHER_HEADS[cls]}; leave it, or DIST") as caught:
        optimize_model(cls(config()), decoder="torch")
    assert said.partition(":")[0] in str(caught.value)


def test_a_pattern_that_matches_nothing_is_told_with_names_there_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_lowbit"):
        optimize_model(LlamaForCausalLM(config()), modules_to_not_convert=["lm_head", "embed_out"])
    (said,) = messages(caplog)
    assert said.startswith(
        "modules_to_not_convert: 'embed_out' matches no Linear of this model, which has model.layers.0."
    )
    assert said.endswith("model.layers.0.mlp.down_proj, lm_head")


@pytest.fixture(scope="module", params=["decoder", "off"])
def model(request: pytest.FixtureRequest) -> Any:
    """A low-bit model on the decoder, or on Hugging Face's forward."""
    torch.manual_seed(0)
    return optimize_model(LlamaForCausalLM(config()), optimize_llm=request.param == "decoder")


LABELS: dict[str, tuple[Any, str]] = {
    "shorter": (ids()[:, :5], r"labels are torch.int64 of shape \[2, 5\]; expected torch.int64 of shape \[2, 7\]: one"),
    "other rows": (ids(1), r"of shape \[1, 7\]; expected torch.int64 of shape \[2, 7\]"),
    "flat": (ids().flatten(), r"of shape \[14\]; expected torch.int64 of shape \[2, 7\]"),
    "no integers": (ids().float(), r"labels are torch.float32 of shape \[2, 7\]; expected torch.int64"),
    "bytes": (ids().to(torch.uint8), r"labels are torch.uint8 of shape \[2, 7\]; expected torch.int64"),
    "a list": ([[1, 2]], "labels is a list; expected a torch.Tensor"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_do_not_fit(case: str, model: Any) -> None:
    labels, text = LABELS[case]
    embeds = model.get_input_embeddings()(ids())
    for given in ({"input_ids": ids()}, {"inputs_embeds": embeds}):
        with torch.inference_mode(), pytest.raises(UsageError, match=text):
            model(**given, labels=labels)


def test_labels_that_fit_are_hugging_faces(model: Any) -> None:
    with torch.inference_mode():
        assert torch.isfinite(model(ids(), labels=ids()).loss)
        assert torch.equal(model(ids(1), labels=ids(1)[0]).loss, model(ids(1), labels=ids(1)).loss)
        # Labels of the logits that are kept, and no more.
        assert torch.isfinite(model(ids(), labels=ids()[:, -3:], logits_to_keep=3).loss)


def test_training_mode_is_refused(model: Any) -> None:
    text = r"this model is in training mode, and low-bit weights are for inference; call model.eval\(\)$"
    model.train()
    try:
        with torch.inference_mode(), pytest.raises(UsageError, match=text):
            model(ids())
        with pytest.raises(UsageError, match=text):
            model.generate(ids(), attention_mask=torch.ones(2, 7), max_new_tokens=2)
    finally:
        model.eval()
    with torch.inference_mode():
        assert model(ids()).logits.shape == (2, 7, VOCAB)
