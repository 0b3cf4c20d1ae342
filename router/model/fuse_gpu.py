"""Modules of transformers' modelling code that a few kernels of ours compute on a GPU, where theirs are many.

A module is replaced only if ours gives what it gives on random inputs: nothing here knows a family by its name.
T rows of a step, D hidden, E experts, K top-k, H query heads, G KV heads, d head dim.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from router.kernels import linear, rows
from router.model.attention import PagedAttention, current_attention, set_attention

ROWS = 4
"""Rows of the random inputs on which ours and theirs are compared."""

NEAR = 0.03
"""Largest difference relative to the norm that counts as equal: theirs rounds to bfloat16 more often."""


def fuse_products(model: nn.Module) -> None:
    """Let linear layers compute one row, or a few rows by a small matrix, in our kernel, which is quicker there."""
    for module in model.modules():
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.detach()
            cast(Any, module).forward = partial(linear.linear, module.weight.detach(), bias)


@torch.no_grad()
def fuse_gates(model: nn.Module) -> None:
    """Compute softmax, top-k and the division by the weights' sum in one kernel, for gates that do no more than that."""
    for module in model.modules():
        if {"top_k", "num_experts", "weight"} <= vars(module).keys() | module._parameters.keys():
            gate = cast(Any, module)
            x_TD = torch.randn(ROWS, gate.weight.shape[1], dtype=gate.weight.dtype, device=gate.weight.device)
            try:
                logits_TE, scores_TK, ids_TK = gate(x_TD)
            except (TypeError, ValueError):  # it takes more than rows, or returns something else
                continue
            divides = bool(
                torch.allclose(scores_TK.sum(-1).float(), torch.ones(ROWS, device=x_TD.device), atol=0.02)
            )
            ours = partial(_gate, gate.weight.detach(), gate.top_k, scores_TK.dtype, divides)
            _, our_scores_TK, our_ids_TK = ours(x_TD)
            chosen_TK, our_chosen_TK = (logits_TE.gather(1, ids) for ids in (ids_TK, our_ids_TK))
            if torch.equal(chosen_TK, our_chosen_TK) and _near(
                our_scores_TK, scores_TK
            ):  # ids of equal ones may differ
                module.forward = ours


def _gate(
    weight_ED: Tensor, top_k: int, dtype: torch.dtype, divides: bool, x_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, weights (rounded to the dtype of theirs, in float32) and expert ids."""
    logits_TE = linear.linear(weight_ED, None, x_TD.reshape(-1, weight_ED.shape[1]))
    return logits_TE, *rows.softmax_top_k(logits_TE, top_k, rounded_to=dtype, divided=divides)


@torch.no_grad()
def fuse_attention(model: nn.Module) -> None:
    """Compute queries, keys and values in one product, and their norms and rotary embedding in one kernel."""
    for module in model.modules():
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= module._modules.keys() and hasattr(module, "head_dim"):
            before = cast(Any, module).forward
            ours = _Attention(cast(Any, module))
            if _same(before, ours.forward, cast(Any, module)):
                module.forward = ours.forward


class _Attention:
    """A replacement of a family's attention module: projections, norms and rotary embedding around the attention itself."""

    def __init__(self, module: Any) -> None:
        self._layer: int = module.layer_idx
        self._scale: float = module.scaling
        self._head_dim: int = module.head_dim
        projections = [module.q_proj, module.k_proj, module.v_proj]
        self._num_heads, self._num_kv_heads, _ = (len(p.weight) // self._head_dim for p in projections)
        self._weight = torch.cat([p.weight for p in projections])
        biases = [p.bias for p in projections if p.bias is not None]
        self._bias = torch.cat(biases) if len(biases) == len(projections) else None
        for part, projection in zip(
            self._weight.split([len(p.weight) for p in projections]), projections, strict=True
        ):
            projection.weight = nn.Parameter(part, requires_grad=False)  # the same memory
        norms: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        self._norms: tuple[Tensor, Tensor, float] | None = None
        if all(norm is not None and norm.weight.shape == (self._head_dim,) for norm in norms):
            self._norms = norms[0].weight.detach(), norms[1].weight.detach(), norms[0].variance_epsilon
        self._o_proj = module.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None = None,
        **kwargs: Any,  # caches and masks, which we do without
    ) -> tuple[Tensor, None]:
        """Return the module's output [1, T, D]. hidden_states: [1, T, D]; cos and sin: [1, T, rotated features]."""
        heads, kv_heads = self._num_heads, self._num_kv_heads
        x_TX = linear.linear(self._weight, self._bias, hidden_states[0])
        x_TXd = x_TX.unflatten(-1, (-1, self._head_dim))
        q_THd, k_TGd, v_TGd = x_TXd.split([heads, kv_heads, kv_heads], dim=1)
        cos_1TR, sin_1TR = position_embeddings
        q_THd, k_TGd = rows.rotate_halves(q_THd, k_TGd, cos_1TR[0], sin_1TR[0], norms=self._norms)
        out_THd = current_attention().forward(
            self._layer, *(x.transpose(0, 1) for x in (q_THd, k_TGd, v_TGd)), scale=self._scale
        )
        return self._o_proj(out_THd.flatten(1))[None], None


class _Recorder(PagedAttention):
    """An attention that records its arguments and returns the values."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def forward(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, *, scale: float) -> Tensor:
        self.asked = [layer, scale, q_HTD, k_GTD, v_GTD]
        return v_GTD.repeat_interleave(len(q_HTD) // len(v_GTD), dim=0).transpose(0, 1).contiguous()


def _same(theirs: Callable[..., Any], ours: Callable[..., Any], module: Any) -> bool:
    """Return whether both forwards call the attention with the same arguments and make the same of its output.

    False if theirs cannot be called in this way.
    """
    weight = module.q_proj.weight
    kind = {"dtype": weight.dtype, "device": weight.device}
    rotated = int(module.head_dim * _rotary_factor(module))
    x_1TD = torch.randn(1, ROWS, weight.shape[1], **kind)
    half = torch.rand(2, 1, ROWS, rotated // 2, **kind)
    cos_sin = tuple(torch.cat([half, half], dim=-1))
    found = []
    for forward in (theirs, ours):
        recorder = _Recorder()
        set_attention(recorder)
        try:
            out_1TD = forward(hidden_states=x_1TD, position_embeddings=cos_sin, attention_mask=None)[0]
        except (RuntimeError, TypeError, AttributeError):
            return False
        found.append([*recorder.asked, out_1TD])
    (layer, scale, *tensors), (our_layer, our_scale, *our_tensors) = found
    return (layer, scale) == (our_layer, our_scale) and all(map(_near, our_tensors, tensors))


def _rotary_factor(module: Any) -> float:
    parameters = getattr(module.config, "rope_parameters", None) or {}
    return parameters.get("partial_rotary_factor", 1.0)


@torch.no_grad()
def fuse_layers(model: nn.Module) -> None:
    """Compute each residual sum and the norm that reads it in one kernel, in models whose layers have just two such sums."""
    for module in model.modules():
        layers, last = module._modules.get("layers"), module._modules.get("norm")
        if not isinstance(layers, nn.ModuleList) or not all(map(_adds_two_parts, layers)):
            continue
        firsts = [_Norm(norm) for norm in (*(cast(Any, layer).input_layernorm for layer in layers), last)]
        seconds = [_Norm(cast(Any, layer).post_attention_layernorm) for layer in layers]
        norms = [(*pair, second) for pair, second in zip(pairwise(firsts), seconds, strict=True)]
        if all(map(_same_sums, layers, norms)):
            for norm in firsts + seconds:
                norm.module.forward = norm.forward
            for layer, its in zip(layers, norms, strict=True):
                layer.forward = partial(_layer, cast(Any, layer), its)


class _Norm:
    """An RMSNorm whose result may have been computed together with the sum that it reads."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._weight_D, self._eps = module.weight.detach(), module.variance_epsilon
        self._made: tuple[Tensor, Tensor] | None = None

    def of_sum(self, x: Tensor, more: Tensor) -> Tensor:
        """Return x + more; its norm is computed as well and kept until `forward` is called with that sum."""
        self._made = rows.add_rms_norm(x, more, self._weight_D, self._eps)
        return self._made[0]

    def forward(self, x: Tensor) -> Tensor:
        made, self._made = self._made, None
        if made is not None and made[0] is x:
            return made[1]
        return rows.rms_norm(x, self._weight_D, self._eps)


def _layer(parts: Any, norms: tuple[_Norm, _Norm, _Norm], hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Compute one decoder layer. norms: that of its input, that of its output (the next layer's), and the one between.

    kwargs: the attention's.
    """
    before, after, between = norms
    x_1TD, _ = parts.self_attn(hidden_states=before.forward(hidden_states), **kwargs)
    sum_1TD = between.of_sum(hidden_states, x_1TD)
    return after.of_sum(sum_1TD, parts.mlp(between.forward(sum_1TD)))


def _adds_two_parts(layer: nn.Module) -> bool:
    """Return whether a layer is two norms, an attention and an MLP, going by the names of its modules."""
    return layer._modules.keys() == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class _Turned(nn.Module):
    """A stand-in for an attention or MLP that only reverses the order of features."""

    def __init__(self, *more: None) -> None:
        """Return `more` beside the output."""
        super().__init__()
        self._more = more

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        turned = hidden_states.flip(-1)
        return (turned, *self._more) if self._more else turned


def _same_sums(layer: nn.Module, norms: tuple[_Norm, _Norm, _Norm]) -> bool:
    """Return whether ours and theirs give the same output and next norm, with stand-ins for attention and MLP."""
    alike: Any = copy(layer)
    alike._modules = layer._modules | {"self_attn": _Turned(None), "mlp": _Turned()}
    weight_D = norms[0].module.weight
    x_1TD = torch.randn(1, ROWS, len(weight_D), dtype=weight_D.dtype, device=weight_D.device)
    try:
        their_1TD = alike.forward(x_1TD, position_embeddings=None)
    except (TypeError, AttributeError):  # the layer takes other arguments, or has other parts
        return False
    our_1TD = _layer(alike, norms, x_1TD, position_embeddings=None)
    return _near(our_1TD, their_1TD) and _near(norms[1].forward(our_1TD), norms[1].module(their_1TD))


def _near(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    return bool((ours.float() - theirs.float()).norm() <= NEAR * theirs.float().norm())
