"""What a Hugging Face decoder computes without roundings, and how far fp32 may be from it.

The yardstick is the model in fp64; its rotary table is computed in fp32 as in every other run, so it is the same. The
bound is tests.bounds.margin_bound: the error that each operation makes, carried to a difference of two logits by the
derivative, to first order. (Local errors are below 2^-14 of the activations, so what is of second order is below 2^-14
of the bound.) Each operation's error is put on the output of the Linear behind it. With u = 2^-24:

- RMSNorm, K elements: products, at most K + 4 additions, a division, eps, a square root (halves what came before), a
  division and two products: relative (K / 2 + 6) u on each input of q, k, v, gate, up and lm_head.
- a score s_ij: dist_lowbit.ops.attention.attention_error counts (ceil(D / 16) + 9) u of its absolute terms and u (88
  at most) of its range; rotary, three roundings of terms whose pair keeps its length, adds 6 sqrt(2) u |q_i| |k_j|
  scale, and q's and k's own norms (qwen3) (D + 12) u |q_i| |k_j| scale.
- the attention's output o_i = sum p_ij v_j: sum p_ij (e_ij + sum_l p_il e_il) |v_j| for the errors e of the scores, and
  what attention_error counts for exponentials and sums, times sum p_ij |v_j|.
- silu(gate) up: exp 2 u, 1 + t, a division, two products and the rounding of -|x|'s sign (none): 7 u.
- bias: u |y|. Residual: u |h|, on the outputs of o_proj and down_proj that are added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_lowbit.formats import PackedWeight, dequantize, quantize
from dist_lowbit.ops.elementwise import LANES
from tests.bounds import U, linear_bound, margin_bound

_NAME = "measured"


def _measured(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **more: Any) -> Any:
    """Attend as transformers does, and leave in module.slack how far fp32 may be off, [M, heads * D] (one sequence)."""
    scale, (rows, width) = float(more["scaling"]), q.shape[-2:]
    shared = q.shape[1] // k.shape[1]
    qs, ks, vs = (t.detach()[0] for t in (q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)))
    seen = torch.ones(rows, rows, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    scores = (scale * qs @ ks.mT).masked_fill(~seen, float("-inf"))
    p = scores.softmax(-1)
    terms, lengths = scale * qs.abs() @ ks.abs().mT, scale * qs.norm(dim=-1)[..., None] * ks.norm(dim=-1)[:, None]
    normed = width + 12 if hasattr(module, "q_norm") else 0
    error = U * ((-(-width // LANES) + 9) * terms + (6 * 2**0.5 + normed) * lengths)
    reach = (scores.amax(-1, keepdim=True) - scores).clamp(max=88.0)  # of a score below its row's largest
    error = error + U * torch.where(seen, reach, 0.0)
    spread = p * (error + (p * error).sum(-1, keepdim=True))
    # Two chunks at most here. An exponential errs by 2 u in each weight and merge, and the weights' sum by as much.
    sums = (2 * 3 * 2 + rows + 1 + 2 * 2 + rows / LANES + 5 + 2 * 2 + 1) * U
    slack = spread @ vs.abs() + sums * (p @ vs.abs())
    module.slack = slack.transpose(0, 1).reshape(rows, -1)
    return sdpa_attention_forward(module, q, k, v, mask, **more)


def exact_model(directory: str) -> Any:
    """Return a Hugging Face model in fp64 that notes how far its attention may be off in fp32."""
    AttentionInterface.register(_NAME, _measured)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation=_NAME).eval()


class Yardstick:
    """Margins of an exact model at the last position of one prompt, and bounds on them."""

    def __init__(self, directory: str, ids: torch.Tensor, form: str, compute: str, dequantized: bool = False) -> None:
        """dequantized: the exact model has the weights that the low-bit one stands for, so only roundings differ."""
        self.model, self.ids, self.compute = exact_model(directory), ids, compute
        self.weights: dict[str, PackedWeight] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                self.weights[name] = quantize(module.weight.detach().float(), form)
                if dequantized:
                    module.weight.data = dequantize(self.weights[name]).double()
        self.residual: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            hooks = [layer.register_forward_hook(self._note(name)) for name, layer in self._layers()]
            hooks += [
                layer.post_attention_layernorm.register_forward_pre_hook(self._note_middle(name))
                for name, layer in self._layers()
            ]
            self.logits = self.model(ids).logits[0]
        for hook in hooks:
            hook.remove()

    def _layers(self) -> list[tuple[str, Any]]:
        return [(f"model.layers.{i}", layer) for i, layer in enumerate(self.model.model.layers)]

    def _note(self, name: str) -> Callable[..., None]:
        def note(_: Any, inputs: Any, output: Any) -> None:
            self.residual[f"{name}.mlp.down_proj"] = output[0] if isinstance(output, tuple) else output

        return note

    def _note_middle(self, name: str) -> Callable[..., None]:
        def note(_: Any, inputs: Any) -> None:
            self.residual[f"{name}.self_attn.o_proj"] = inputs[0]

        return note

    def local(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return how far the Linear's output may be off, from all that is put on it (see the module)."""
        weight = self.weights[name]
        bound = linear_bound(x, weight, self.compute) + U * y.double().abs()
        w = self.model.get_submodule(name).weight.detach().abs()
        if name.endswith("o_proj"):
            slack = self.model.get_submodule(name.rpartition(".")[0]).slack
        elif name.endswith("down_proj"):
            slack = 7 * U * x.abs()
        else:
            slack = (x.shape[-1] / 2 + 6) * U * x.abs()
        bound = bound + slack @ w.T
        if name in self.residual:
            bound = bound + U * self.residual[name].reshape(y.shape).abs()
        return bound

    def margin(self, better: int, worse: int) -> tuple[float, float]:
        """Return the exact logit[better] - logit[worse] at the last position, and how far fp32 may be from it."""
        last = self.ids.shape[1] - 1
        bound = margin_bound(self.model, self.ids, last, better, worse, self.local)
        return float(self.logits[last, better] - self.logits[last, worse]), bound

    def spread(self, better: int, worse: int, position: int | None = None) -> float:
        """Return the standard deviation of a margin when activations are rounded to int8.

        The usual model of rounding noise: each activation of a block errs by a uniform number of half a step at most,
        independently, so by x_scale^2 / 12 in variance. It reaches the margin through slope @ W. q, k and v (or gate
        and up) round one and the same input: the square of a sum of three is at most three times the sum of squares.
        """
        variance = 0.0
        last = self.ids.shape[1] - 1 if position is None else position
        for name, x, slope in _slopes(self.model, self.ids, last, better, worse):
            block = self.weights[name].block
            carried = slope @ self.model.get_submodule(name).weight.detach().to(slope.dtype)
            steps = (
                torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).abs().amax(-1) / 127
            )
            step = steps.repeat_interleave(block, -1)[:, : x.shape[-1]]
            variance += 3 * float((carried * step).square().sum()) / 12
        return variance**0.5


def _slopes(model: Any, ids: torch.Tensor, position: int, better: int, worse: int) -> list[tuple[str, Any, Any]]:
    """Return each Linear's name and input with the derivative of a margin by its output, both [rows, ...]."""
    seen = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(_: Any, inputs: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
                held = output if output.requires_grad else output.detach().requires_grad_()
                seen.append((name, inputs[0].detach().flatten(0, -2), held))
                return held

            hooks.append(module.register_forward_hook(keep))
    with torch.enable_grad():
        logits = model(ids).logits[0, position]
        slopes = torch.autograd.grad(logits[better] - logits[worse], [y for _, _, y in seen], allow_unused=True)
    for hook in hooks:
        hook.remove()
    pairs = zip(seen, slopes, strict=True)
    return [(name, x, slope.flatten(0, -2)) for (name, x, _), slope in pairs if slope is not None]
