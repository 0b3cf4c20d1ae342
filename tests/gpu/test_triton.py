"""Backend triton against the float32 reference, with fresh random inputs."""

import pytest
import torch
from torch import Tensor

from experts.backends import DEFAULTS, ExpertBackend
from experts.backends.registry import BACKENDS, resolve_backend
from experts.placement import EMPTY
from experts.selftest import LIMITS, Call, Layer, dequantised, largest_error, random_experts, run
from experts.weights import ExpertWeights, MoEShape

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
TOKENS = (1, 2, 7, 16, 33, 64, 200, 1024)
LIMIT = LIMITS[torch.bfloat16]


def filled(layer: Layer, experts: list[ExpertWeights]) -> ExpertBackend:
    backend = BACKENDS["triton"](layer.shape, layer.num_slots, torch.bfloat16, GPU, DEFAULTS)
    for slot, expert in enumerate(experts):
        backend.write_slot(0, slot, expert)
    return backend


def call_of(layer: Layer, num_tokens: int, ids_TK: Tensor) -> Call:
    x_TD = torch.randn(num_tokens, layer.hidden, device=GPU).to(torch.bfloat16)
    w_TK = torch.rand(ids_TK.shape, device=GPU) + 0.1
    return Call("", x_TD, ids_TK.to(torch.int32), w_TK / w_TK.sum(dim=1, keepdim=True))


def random_ids(layer: Layer, num_tokens: int) -> Tensor:
    return torch.rand(num_tokens, layer.num_slots, device=GPU).argsort(dim=1)[:, : layer.top_k]


@pytest.mark.parametrize(
    "layer",
    [
        Layer("small", 256, 128, num_slots=8, top_k=4),
        Layer("Qwen3-30B", 2048, 768, num_slots=64, top_k=8),
        Layer("odd", 1024 + 64, 704, num_slots=11, top_k=6),
        Layer("tiny", 64, 192, num_slots=3, top_k=1),
        Layer("many", 256, 128, num_slots=512, top_k=10),
        Layer("wide", 4096, 1536, num_slots=128, top_k=8),
    ],
    ids=lambda layer: layer.name,
)
def test_is_the_reference(layer: Layer) -> None:
    experts = random_experts(layer, GPU)
    backend = filled(layer, experts)
    for num_tokens in TOKENS:
        everyone = random_ids(layer, num_tokens)
        few = everyone.masked_fill(torch.rand(everyone.shape, device=GPU) < 0.7, EMPTY)
        one = torch.full_like(everyone, EMPTY)
        one[:, -1] = layer.num_slots - 1
        skewed = torch.where(
            torch.rand(num_tokens, 1, device=GPU) < 0.8, torch.arange(layer.top_k, device=GPU), everyone
        )
        for what, ids in {"all": everyone, "few": few, "one": one, "skewed": skewed}.items():
            call = call_of(layer, num_tokens, ids)
            error = largest_error(run(backend, call), dequantised(experts, call))
            assert error < LIMIT, f"{num_tokens} tokens, {what}"
        call = call_of(layer, num_tokens, torch.full_like(everyone, EMPTY))
        assert not run(backend, call).any(), f"{num_tokens} tokens without an expert"


def test_two_runs_have_the_same_bits_also_in_a_graph() -> None:
    layer = Layer("", 512, 256, num_slots=16, top_k=4)
    backend = filled(layer, random_experts(layer, GPU))
    for num_tokens in (1, 40, 600):
        call = call_of(layer, num_tokens, random_ids(layer, num_tokens))
        eager = run(backend, call)
        assert all(torch.equal(run(backend, call), eager) for _ in range(5))
        out_TD = torch.full_like(call.x_TD, float("nan"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backend.forward(0, call.x_TD, call.local_TK, call.w_TK, out_TD=out_TD)
        fresh = call_of(layer, num_tokens, random_ids(layer, num_tokens))
        for target, source in zip(call[1:], fresh[1:], strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(out_TD, run(backend, fresh))


def test_no_wait_for_the_device() -> None:
    layer = Layer("", 256, 128, num_slots=8, top_k=4)
    backend = filled(layer, random_experts(layer, GPU))
    call = call_of(layer, 5, random_ids(layer, 5))
    run(backend, call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        (MoEShape(1, (0,), 8, 256, 128), torch.float32, "computes in bfloat16"),
        (MoEShape(1, (0,), 8, 256, 96), torch.bfloat16, "sizes are multiples of 64, these are 256 x 96"),
    ],
)
def test_what_it_cannot_do_is_refused(shape: MoEShape, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BACKENDS["triton"](shape, 8, dtype, GPU, DEFAULTS)


def test_auto_takes_it_where_it_can() -> None:
    shape = MoEShape(1, (0,), 8, 256, 128)
    found = {
        dtype: resolve_backend("auto", shape=shape, dtype=dtype, device=GPU, weights_only=True)
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert found == {torch.bfloat16: "triton", torch.float32: "torch"}
