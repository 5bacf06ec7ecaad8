"""What users of Hugging Face models do with one, on the fused decoder: the same tokens as Hugging Face's own forward.

The model is a random Llama in fp32, so the two forwards differ by the order of sums alone; ties between tokens closer
than that do not occur with these seeds, which the first test checks.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, TextStreamer
from transformers.generation import StoppingCriteria

from dist_lowbit import optimize_model
from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.activation import FixedSilu
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.decoder.cache import PagedLayer
from dist_lowbit.decoder.hf_attention import ATTENTION_NAME
from tests.bounds import U
from tests.decoder.exact_program import ExactProgram

VOCAB = 151


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def fused(plain: LlamaForCausalLM) -> LlamaForCausalLM:
    model = optimize_model(copy.deepcopy(plain), "fp32")
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.model, FusedBackbone)
    return model


def without_decoder(plain: LlamaForCausalLM, attention: str) -> Any:
    """Return Hugging Face's forward over the same Linears and the decoder's activation, with an attention by name."""
    apart: Any = optimize_model(copy.deepcopy(plain), "fp32", decoder="off")
    apart.set_attn_implementation(attention)
    for layer in apart.model.layers:
        layer.mlp.act_fn = FixedSilu()
    return apart


def check_near(fused: Any, ids: torch.Tensor, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check some logits of two fp32 forwards against the derived bound, which each of them may be off by."""
    exact = ExactProgram(fused.model.program, ids[1], [ids.shape[1]])
    for row in (0, ids.shape[1] - 1):
        for token in (int(wanted[1, row].argmax()), int(wanted[1, row].argmin()), 7):
            bound = exact.bound(row, token)
            assert bound < 0.1 * float(wanted.std()), "a bound this wide would say little"
            assert abs(float(found[1, row, token] - wanted[1, row, token])) <= 2 * bound, (row, token)


def prompts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    """Three rows of 3, 9 and 6 tokens, padded on the left."""
    ids, mask = prompts(3, 9, 5), torch.ones(3, 9, dtype=torch.int64)
    for row, pads in ((0, 6), (2, 3)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "beams": {"num_beams": 4, "do_sample": False},
    "beams sampled": {"num_beams": 3, "do_sample": True},
    "beam groups of returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "penalty": {"repetition_penalty": 1.3, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(way: str, plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    inputs = {"input_ids": prompts(1, 11)} if way == "prompt lookup" else padded()
    results = []
    for model in (plain, fused):
        torch.manual_seed(11)
        results.append(model.generate(**inputs, max_new_tokens=40, **WAYS[way]))
    assert torch.equal(*results)


def gap(logits: torch.Tensor) -> float:
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return float((first - second).min())


def test_the_two_forwards_differ_less_than_the_closest_tokens(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    ids = prompts(4, 40)
    with torch.inference_mode():
        one, other = plain(ids).logits, fused(ids).logits
    assert float((one - other).abs().max()) < gap(one) / 2


def test_streamer_and_stopping_criteria(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    class Collect(TextStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20)

    seen = []
    for model in (plain, fused):
        streamer = Collect()
        model.generate(
            prompts(1, 5), max_new_tokens=40, do_sample=False, streamer=streamer, stopping_criteria=[After()]
        )
        seen.append(streamer.tokens)
    assert seen[0] == seen[1]
    assert len(seen[1]) == 21


def test_the_cache_goes_on_across_calls(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 30)
    with torch.inference_mode():
        cache = DynamicCache()
        whole = fused(ids).logits
        first = fused(ids[:, :13], past_key_values=cache)
        assert first.past_key_values is cache
        assert cache.get_seq_length() == 13
        second = fused(ids[:, 13:], past_key_values=cache).logits
    assert torch.equal(torch.cat([first.logits, second], 1), whole)
    assert cache.get_seq_length() == 30
    # A conversation: generate, then go on from what generate left in its cache.
    texts = []
    for model in (plain, fused):
        cache = DynamicCache()
        once = model.generate(ids, max_new_tokens=7, do_sample=False, past_key_values=cache)
        longer = torch.cat([once, prompts(2, 4, 9)], 1)
        texts.append(model.generate(longer, max_new_tokens=9, do_sample=False, past_key_values=cache))
    assert torch.equal(*texts)


def test_a_cropped_cache_forgets(fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 40)
    with torch.inference_mode():
        cache = fused(ids[:, :37], use_cache=True).past_key_values
        cache.crop(-20)
        assert cache.get_seq_length() == 17
        again = fused(ids[:, 17:], past_key_values=cache).logits
        assert torch.equal(again, fused(ids).logits[:, 17:])


def test_beams_share_blocks_until_they_part(fused: LlamaForCausalLM) -> None:
    """Reordering copies no key; a block that two rows share is copied when one of them writes."""
    ids = prompts(1, 70)
    with torch.inference_mode():
        cache = fused(ids, use_cache=True).past_key_values
        batch = cache.layers[0].batch
        cache.batch_repeat_interleave(3)
        assert batch.blocks.table([0, 1, 2]).unique().numel() == 3  # 70 tokens in blocks of 32, all shared
        tokens = torch.tensor([[3], [4], [5]])
        out = fused(tokens, past_key_values=cache).logits
        assert batch.blocks.table([0, 1, 2]).unique().numel() == 2 + 3
        before = batch.blocks.store.keys[0].data_ptr()
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        assert batch.blocks.store.keys[0].data_ptr() == before
        more = fused(tokens, past_key_values=cache).logits
        assert batch.blocks.table([0, 1, 2]).unique().numel() == 2 + 3
        for row, path in enumerate([[5, 3], [5, 4], [3, 5]]):
            alone = fused(torch.cat([ids, torch.tensor([path])], 1)).logits
            assert torch.equal(more[row, -1], alone[0, -1])
            assert torch.equal(out[2, -1], fused(torch.cat([ids, tokens[2:]], 1)).logits[0, -1])


def test_padding_changes_no_bit(fused: LlamaForCausalLM) -> None:
    inputs = padded()
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        together = fused(**inputs, position_ids=positions).logits
        for row in range(3):
            ids = inputs["input_ids"][row][mask[row].bool()][None]
            assert torch.equal(fused(ids).logits[0], together[row, mask[row].bool()])


def test_hidden_states_come_from_hugging_face(
    plain: LlamaForCausalLM, fused: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompts(2, 12)
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "dist_lowbit"):
        mine = fused(ids, output_hidden_states=True)
        fused(ids, output_hidden_states=True)
        theirs = without_decoder(plain, ATTENTION_NAME)(ids, output_hidden_states=True)
        wanted = plain(ids).logits
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
    assert all(torch.equal(*pair) for pair in zip(mine.hidden_states, theirs.hidden_states, strict=True))
    check_near(fused, ids, mine.logits, wanted)
    assert len([r for r in caplog.records if "output_hidden_states" in r.getMessage()]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_fp32_whichever_forward_computes(dtype: torch.dtype, plain: LlamaForCausalLM) -> None:
    model: Any = optimize_model(copy.deepcopy(plain), torch_dtype=dtype)
    ids = prompts(1, 5)
    with torch.inference_mode():
        found = [model(ids, **{name: True}) for name in ("use_cache", "output_hidden_states", "output_attentions")]
        theirs = optimize_model(copy.deepcopy(plain), torch_dtype=dtype, optimize_llm=False)(ids)
    assert {output.logits.dtype for output in found} == {torch.float32}
    assert found[1].hidden_states[-1].dtype == theirs.logits.dtype == dtype


def test_attention_weights_come_from_hugging_face(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 12)
    with torch.inference_mode():
        before = fused(ids).logits
        mine = fused(ids, output_attentions=True).attentions
        # Their other attentions return none.
        theirs = without_decoder(plain, "eager")(ids, output_attentions=True).attentions
        after = fused(ids).logits
    assert len(mine) == len(theirs) == 3
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == (2, 6, 12, 12)
        assert torch.equal(one, other)
    assert torch.equal(before, after)  # and the decoder goes on as before


def test_a_static_cache_is_hugging_faces(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    for inputs in ({"input_ids": prompts(1, 4)}, padded()):
        options: dict[str, Any] = {**inputs, "do_sample": False, "max_new_tokens": 3, "cache_implementation": "static"}
        assert torch.equal(fused.generate(**options), plain.generate(**options))


def test_a_tokenizer_for_stop_strings_asks_nothing_of_the_decoder(
    fused: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "dist_lowbit"):
        fused(prompts(1, 4), tokenizer=object())
    assert not caplog.records


def test_a_copied_cache_goes_on_by_itself(fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 40)
    with torch.inference_mode():
        whole = fused(ids[:, :30], use_cache=True).past_key_values
        copied = copy.deepcopy(whole)
        other = fused(ids[:, :5], past_key_values=copied).logits  # another text on the copy
        rest = fused(ids[:, 30:], past_key_values=whole).logits
        assert torch.equal(rest, fused(ids).logits[:, 30:])
        assert torch.equal(other, fused(torch.cat([ids[:, :30], ids[:, :5]], 1)).logits[:, 30:])


def test_pickling_says_what_to_call_and_copying_works(fused: LlamaForCausalLM) -> None:
    fused(prompts(1, 2), output_hidden_states=True)  # Hugging Face's forward leaves hooks that pickle does not know
    for write in (lambda: torch.save(fused, io.BytesIO()), lambda: pickle.dumps(fused)):
        with pytest.raises(UsageError, match=r"is not pickled; call save_low_bit\(directory\)$"):
            write()
    ids = prompts(1, 6)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(fused)(ids).logits, fused(ids).logits)


def test_a_cache_moves_between_the_forwards(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    """The decoder takes over a cache that Hugging Face filled, and gives its own back where that forward goes on."""
    ids = prompts(2, 30)
    with torch.inference_mode():
        expected = plain(ids).logits[:, -5:]
        theirs = plain(ids[:, :25], use_cache=True).past_key_values
        taken = fused(ids[:, 25:], past_key_values=theirs).logits
        mine = fused(ids[:, :25], use_cache=True).past_key_values
        given = fused(ids[:, 25:], past_key_values=mine, output_hidden_states=True).logits
    for found in (taken, given):
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_loss(plain: LlamaForCausalLM, fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 20)
    with torch.inference_mode():
        one, other = plain(ids, labels=ids), fused(ids, labels=ids)
    check_near(fused, ids, other.logits, one.logits)
    # A row's loss is logsumexp - logit: each moves by no more than the farthest logit does. Its own roundings: V sums
    # and exponentials of 2 u, u of the range in each exponent and of what they sum to; then a mean of the rows.
    apart, largest = float((one.logits - other.logits).abs().max()), float(one.logits.abs().max())
    rounding = U * (VOCAB + 8 + 6 * largest + (ids.numel() + 2) * float(one.loss))
    assert abs(float(one.loss - other.loss)) <= 2 * (apart + rounding)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_by_torch_it_does_the_same(backend: str, fused: LlamaForCausalLM) -> None:
    """The head and the loss are compiled; the decoder's own step stays one call."""
    torch.compiler.reset()
    compiled: Any = torch.compile(fused, backend=backend)
    inputs = padded()
    with torch.inference_mode():
        assert torch.equal(compiled(**inputs).logits, fused(**inputs).logits)
        texts = [model.generate(**inputs, do_sample=False, max_new_tokens=3) for model in (compiled, fused)]
    assert torch.equal(*texts)


def test_embeddings_as_input(fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 9)
    with torch.inference_mode():
        assert torch.equal(fused(inputs_embeds=fused.get_input_embeddings()(ids)).logits, fused(ids).logits)


BAD = {
    "ids that are no integers": (lambda m: m(torch.rand(1, 4)), "expected integers"),
    "ids without a batch": (lambda m: m(torch.tensor([1, 2])), r"expected integers \[batch, tokens\]"),
    "a cache that is none": (lambda m: m(prompts(1, 4), past_key_values=[(1, 2)]), "expected a transformers.Cache"),
    "another batch": (
        lambda m: m(prompts(3, 2), past_key_values=m(prompts(2, 5), use_cache=True).past_key_values),
        "the input has 3 rows and the cache 2",
    ),
    "a short mask": (lambda m: m(prompts(1, 5), attention_mask=torch.ones(1, 4)), "attention_mask has shape"),
    "two inputs": (lambda m: m.model(prompts(1, 5), inputs_embeds=torch.zeros(1, 5, 96)), "either input_ids or"),
    "ids in a list": (lambda m: m([[1, 2]]), "input_ids is a list; expected a torch.Tensor"),
    "a mask in a list": (lambda m: m(prompts(1, 2), attention_mask=[[1, 1]]), "attention_mask is a list"),
    "positions in a list": (lambda m: m(prompts(1, 2), position_ids=[0, 1]), "position_ids is a list"),
    "positions too wide": (
        lambda m: m(prompts(1, 5), position_ids=torch.arange(9)[None]),
        r"position_ids are torch.int64 of shape \[1, 9\]; expected integers \[1, 5\]",
    ),
    "positions of other rows": (
        lambda m: m(prompts(2, 5), position_ids=torch.arange(15).view(3, 5)),
        r"of shape \[3, 5\]; expected integers \[2, 5\]",
    ),
    "positions without a batch": (lambda m: m(prompts(1, 5), position_ids=torch.arange(5)), r"of shape \[5\]"),
    "positions between tokens": (lambda m: m(prompts(1, 1), position_ids=torch.full((1, 1), 0.5)), "float32 of shape"),
    "embeddings too narrow": (lambda m: m(inputs_embeds=torch.zeros(1, 3, 7)), r"expected \[batch, tokens, 96\]"),
    "another vocabulary": (
        lambda m: m.resize_token_embeddings(VOCAB + 1),
        "keeps its 151 token embeddings, and resize_token_embeddings asks for 152",
    ),
    "another embedding": (
        lambda m: m.set_input_embeddings(torch.nn.Embedding(VOCAB, 96)),
        "set_input_embeddings has no effect on a low-bit model",
    ),
    "another head": (lambda m: m.set_output_embeddings(torch.nn.Linear(96, VOCAB)), "set_output_embeddings has no eff"),
    "shared memory": (lambda m: m.share_memory(), "cannot be moved to shared memory"),
    "a padded vocabulary": (lambda m: m.resize_token_embeddings(pad_to_multiple_of=64), "a multiple of 64"),
    "a token out of range": (lambda m: m(torch.tensor([[VOCAB]])), "token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, fused: LlamaForCausalLM) -> None:
    call, text = BAD[case]
    with torch.inference_mode(), pytest.raises((UsageError, IndexError), match=text):
        call(fused)


def test_a_call_that_is_refused_leaves_the_cache_as_it_was(fused: LlamaForCausalLM) -> None:
    ids = prompts(2, 40)
    with torch.inference_mode():
        cache = fused(ids[:, :30], use_cache=True).past_key_values
        for asked in ({}, {"output_attentions": True}):
            with pytest.raises(UsageError, match="position_ids are"):
                fused(ids[:, 30:], past_key_values=cache, position_ids=torch.arange(40)[None], **asked)
        assert torch.equal(fused(ids[:, 30:], past_key_values=cache).logits, fused(ids).logits[:, 30:])


@pytest.mark.parametrize(
    ("rows", "change", "text"),
    [
        (1, {}, r"layer 0 of the cache holds keys of shape \[2, 2, 9, 16\]; expected \[1, 2, 9, 16\]"),
        (3, {}, r"holds keys of shape \[2, 2, 9, 16\]; expected \[3, 2, 9, 16\]"),
        (2, {"num_key_value_heads": 1}, r"holds keys of shape \[2, 1, 9, 16\]; expected \[2, 2, 9, 16\]"),
        (2, {"num_hidden_layers": 1}, "the cache has 1 layers and the model 3; it is another model's"),
    ],
)
def test_a_cache_that_does_not_fit_is_not_taken_over(
    rows: int, change: dict[str, int], text: str, plain: LlamaForCausalLM, fused: LlamaForCausalLM
) -> None:
    other = LlamaForCausalLM(LlamaConfig(**{**plain.config.to_dict(), **change})).eval()
    with torch.inference_mode():
        cache = other(prompts(2, 9), use_cache=True).past_key_values
        with pytest.raises(UsageError, match=text):
            fused(prompts(rows, 2), past_key_values=cache)
    assert not any(isinstance(layer, PagedLayer) for layer in cache.layers)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_layer_of_a_cache_that_was_cut_is_not_taken_over(
    part: str, plain: LlamaForCausalLM, fused: LlamaForCausalLM
) -> None:
    with torch.inference_mode():
        cache = plain(prompts(2, 9), use_cache=True).past_key_values
        setattr(cache.layers[1], part, getattr(cache.layers[1], part)[..., :8])
        with pytest.raises(UsageError, match=rf"layer 1 .* {part} of shape \[2, 2, 9, 8\]; expected \[2, 2, 9, 16\]"):
            fused(prompts(2, 2), past_key_values=cache)
    assert not any(isinstance(layer, PagedLayer) for layer in cache.layers)


def test_attention_weights_on_two_ranks_are_refused_before_anything_changes(decoder_ranks: Any) -> None:
    for rank in decoder_ranks("refused_attentions", 2)[1]:
        assert rank == {"told": [], "refused": 2, "same": True}


def test_ranks_that_go_on_with_different_tokens_are_refused_together(decoder_ranks: Any) -> None:
    ranks = decoder_ranks("other_tokens", 2)[1]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]["drawn"]) > 12
    assert len(ranks[0]["said"]) == 2
    assert all(said.startswith("rank 1 was called with other tokens than rank 0; ") for said in ranks[0]["said"])


def test_hugging_faces_forward_on_two_ranks_looks_at_the_tokens_too(decoder_ranks: Any) -> None:
    ranks = decoder_ranks("other_tokens_for_hugging_face", 2)[1]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]["said"]) == 4
    assert ranks[0]["found"][0] == ranks[0]["found"][1], "a copy goes on in the same group"
    assert all(said.startswith("rank 1 was called with other tokens than rank 0; ") for said in ranks[0]["said"])


def test_a_vocabulary_of_the_same_size_is_no_change(fused: LlamaForCausalLM) -> None:
    assert fused.resize_token_embeddings(VOCAB) is fused.get_input_embeddings() is fused.resize_token_embeddings()


def test_a_kept_linear_is_held_once(plain: LlamaForCausalLM) -> None:
    """What the decoder reads is the module that Hugging Face's head calls and that is saved."""
    model: Any = optimize_model(copy.deepcopy(plain), "sym_int4", modules_to_not_convert=["lm_head", "o_proj"])
    program = model.model.program
    assert program.lm_head is model.lm_head
    assert program.layers[0].attention.o is model.model.layers[0].self_attn.o_proj
    assert {program.lm_head.format, program.layers[0].attention.o.format} == {"fp32"}
