"""Backend b12x on FlashInfer's own host code, with a recorder in the place of compiled kernels.

T tokens, D hidden, K top-k.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experts.backends.b12x import library
from experts.backends.b12x.backend import B12xBackend, bucket_of, token_buckets
from experts.backends.b12x.weights import B12xWeights
from experts.weights import MoEShape
from tests.support.b12x_calls import MISTAKES, Arguments, arguments_of, forward
from tests.support.b12x_on_cpu import Recorder, pretend_sm12x
from tests.support.memory import peak_of_tensors
from tests.unit.backends.test_b12x_layout import random_expert

CPU = torch.device("cpu")
SHAPE = MoEShape(num_layers=2, moe_layers=(0, 1), num_experts=4, hidden=128, intermediate=48)
NUM_SLOTS, TOP_K, MAX_TOKENS = 4, 8, 256


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    dispatch = pretend_sm12x(monkeypatch.setattr)
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "build_and_load_cute_dsl_kernel", recorder.compile)
    dispatch.clear_sm120_moe_caches()
    yield recorder
    dispatch.clear_sm120_moe_caches()


@pytest.fixture
def backend(recorder: Recorder) -> B12xBackend:
    return make()


def make(**settings: Any) -> B12xBackend:
    made = B12xBackend(SHAPE, NUM_SLOTS, torch.bfloat16, CPU, max_tokens=MAX_TOKENS, **settings)
    for layer in SHAPE.moe_layers:
        for slot in range(NUM_SLOTS):
            expert = random_expert(SHAPE, slot)
            made.write_slot(layer, slot, expert)
    return made


def arguments(num_tokens: int, *, top_k: int = TOP_K) -> Arguments:
    return arguments_of(num_tokens, hidden=SHAPE.hidden, top_k=top_k, num_slots=NUM_SLOTS)


class CountOperations(TorchDispatchMode):
    """A count of every operation of torch that makes or moves data; views are free."""

    def __init__(self) -> None:
        self.names: list[str] = []
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._schema.name.startswith("aten::_local_scalar"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def pointers(launch: tuple[Any, ...]) -> set[int]:
    return {
        arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in launch if isinstance(arg, Tensor | int)
    }


@pytest.mark.parametrize(
    ("num_tokens", "path"), [(1, "static"), (128, "static"), (129, "dynamic"), (256, "dynamic")]
)
def test_the_kernel_gets_our_own_tensors(
    backend: B12xBackend, recorder: Recorder, num_tokens: int, path: str
) -> None:
    case = arguments(num_tokens)
    forward(backend, 1, case)
    ((name, launch),) = recorder.launches
    assert name.startswith(path) or path in name, name
    layer: Any = backend._layers[1]
    weights = layer.weights
    ours = [*case.values(), weights.w13, weights.w2, weights.w13_scale, weights.w2_scale, weights.w2_alpha]
    for tensor in ours:
        assert tensor.data_ptr() in pointers(launch), "not a copy of it"


@pytest.mark.parametrize("num_tokens", [1, 128])
def test_a_static_call_moves_no_data(backend: B12xBackend, recorder: Recorder, num_tokens: int) -> None:
    case = arguments(num_tokens)
    forward(backend, 0, case)
    with CountOperations() as count, torch.inference_mode():
        forward(backend, 0, case)
    assert set(count.names) <= {"aten::max", "aten::item"}, "the check of ids, on a CPU only"


def test_a_dynamic_call_moves_one_scale_per_expert(backend: B12xBackend, recorder: Recorder) -> None:
    """[1] makes the kernel quantise a token once; the library expands it to [e], some bytes."""
    for layer in SHAPE.moe_layers:
        for slot in range(NUM_SLOTS):
            backend.write_slot(layer, slot, random_expert(SHAPE, slot))
    case = arguments(200)
    forward(backend, 0, case)
    with CountOperations() as count:
        forward(backend, 0, case)
    assert sorted(set(count.names) - {"aten::max", "aten::item"}) == ["aten::clone"]
    assert count.names.count("aten::clone") == 1


@pytest.mark.parametrize(
    ("seeds", "numel"), [((5, 5, 5), 1), ((5, 6, 5), NUM_SLOTS)], ids=["equal", "different"]
)
def test_a_dynamic_call_shares_the_input_scale_if_experts_do(
    recorder: Recorder, seeds: tuple[int, ...], numel: int
) -> None:
    """A spare slot has no say."""
    made = B12xBackend(SHAPE, NUM_SLOTS, torch.bfloat16, CPU, max_tokens=MAX_TOKENS)
    for slot, seed in enumerate(seeds):
        expert = random_expert(SHAPE, 0)
        made.write_slot(0, slot, replace(expert, input_scale=torch.tensor(float(seed))))
    forward(made, 0, arguments(200))
    assert cast(Any, made._layers[0])._shared_input_scale.numel() == numel


def test_calls_leave_nothing_behind(backend: B12xBackend, recorder: Recorder) -> None:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_dispatch

    sizes = []
    for _ in range(4):
        for layer in SHAPE.moe_layers:
            for num_tokens in (1, 7, 128, 129, 256):
                forward(backend, layer, arguments(num_tokens))
        sizes.append(
            (len(moe_dispatch._WEIGHT_CACHE), len(moe_dispatch._WORKSPACE_CACHE), len(recorder.compiled))
        )
    assert sizes == sizes[:1] * 4
    assert moe_dispatch._PADDED_WEIGHT_CACHE == {}, "no copy of the weights for the sake of padding"
    assert moe_dispatch._WORKSPACE_CACHE == {}


def test_layers_share_workspaces(backend: B12xBackend, recorder: Recorder) -> None:
    for layer in SHAPE.moe_layers:
        forward(backend, layer, arguments(128))
        forward(backend, layer, arguments(129))
    one, other = (backend._layers[layer] for layer in SHAPE.moe_layers)
    first: Any = one
    second: Any = other
    for kind in ("_static_workspace", "_dynamic_workspace"):
        for wrapper in (first._static, first._dynamic, second._static, second._dynamic):
            assert getattr(wrapper, kind) is getattr(first._static, kind)


def test_a_rewritten_slot_reaches_the_kernel(backend: B12xBackend, recorder: Recorder) -> None:
    case = arguments(4)
    forward(backend, 0, case)
    layer: Any = backend._layers[0]
    backend.write_slot(0, 2, random_expert(SHAPE, 77))
    forward(backend, 0, case)
    before, after = (launch for _, launch in recorder.launches)
    folded = layer.weights.w13_alpha * layer.weights.input_scale
    alphas = [arg for arg in after if isinstance(arg, Tensor) and torch.equal(arg, folded)]
    assert alphas, "the fold is of the new multipliers"
    assert {layer.weights.w13.data_ptr(), layer.weights.w13_scale.data_ptr()} <= pointers(before) & pointers(
        after
    )


def test_no_inference_tensor_reaches_the_wrapper(recorder: Recorder) -> None:
    with torch.inference_mode():
        inside = make()
        for num_tokens in (1, 256, 1, 256):
            forward(inside, 0, arguments(num_tokens))
    assert len(recorder.launches) == 4


def test_foreign_ids_never_reach_the_kernel(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from experts import shard as shards

    monkeypatch.setitem(shards.BACKENDS, "b12x-here", lambda *sizes: B12xBackend(*sizes[:4]))
    shard = shards.ExpertShard(
        SHAPE, rank=1, slots_per_rank=NUM_SLOTS, backend="b12x-here", dtype=torch.bfloat16, device=CPU
    )
    case = arguments(3, top_k=4)
    phys_TK = torch.tensor([[0, 4, 7, 8], [3, 10**6, -1, 5], [-1, -1, -1, 2**31 - 1]], dtype=torch.int32)
    shard.forward(0, case["x_TD"], phys_TK, case["w_TK"], out_TD=case["out_TD"])
    ((_, launch),) = recorder.launches
    ids = next(
        arg for arg in launch if isinstance(arg, Tensor) and arg.dtype == torch.int32 and arg.numel() == 12
    )
    assert ids.view(3, 4).tolist() == [[-1, 0, 3, -1], [-1, -1, -1, 1], [-1, -1, -1, -1]]


@pytest.mark.parametrize("num_tokens", [16, 200], ids=["static", "dynamic"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_before_the_library_sees_them(
    backend: B12xBackend, recorder: Recorder, mistake: str, num_tokens: int
) -> None:
    forward(backend, 0, arguments(num_tokens))
    with pytest.raises(ValueError, match=r"b12x|must be|top_k"):
        forward(backend, 0, MISTAKES[mistake](arguments(num_tokens)))
    assert len(recorder.launches) == 1


def test_after_warming_only_buckets_run(backend: B12xBackend, recorder: Recorder) -> None:
    progress = list(backend.warm([1, 4, 128, 256], top_k=TOP_K))
    assert progress[-1].done == progress[-1].total == len(progress) - 1
    compiled, launched = len(recorder.compiled), len(recorder.launches)
    for num_tokens in (1, 2, 3, 4, 5, 127, 129, 256, 700):
        forward(backend, 1, arguments(num_tokens))
    assert len(recorder.compiled) == compiled
    rows = [launch[0].shape[0] for name, launch in recorder.launches[launched:] if "static" in name]
    assert set(rows) <= {1, 4, 128}


def test_padding_rows_have_no_experts(backend: B12xBackend, recorder: Recorder) -> None:
    list(backend.warm([8], top_k=TOP_K))
    case = arguments(3)
    forward(backend, 0, case)
    ids = recorder.launches[-1][1][1].view(8, TOP_K)
    assert torch.equal(ids[:3], case["local_TK"])
    assert (ids[3:] == -1).all()


def test_the_micro_kernels_are_off_unless_wanted(recorder: Recorder) -> None:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_dispatch

    made = make()
    for num_tokens in (1, 2, 5, 8):
        forward(made, 0, arguments(num_tokens))
    assert all("static" in name for name, _ in recorder.launches)
    assert moe_dispatch._MICRO_MAX_TOKENS == 0
    make(micro=True)
    assert moe_dispatch._MICRO_MAX_TOKENS == 8


def test_a_flashinfer_without_the_private_names_is_noticed(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_dispatch

    monkeypatch.delattr(moe_dispatch, "_MICRO_MAX_TOKENS")
    with pytest.raises(RuntimeError, match=r"has no moe_dispatch._MICRO_MAX_TOKENS any more"):
        make()
    with pytest.raises(RuntimeError, match=r"has no B12xMoEWrapper._moe_output any more"):
        library.write_output_to(object(), torch.zeros(1))


def test_w4a16_keeps_one_copy_which_is_the_librarys_own(recorder: Recorder) -> None:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_w4a16_prepare import prepare_w4a16_packed_weights

    source = B12xWeights(SHAPE, NUM_SLOTS, CPU, scales="exact", weights_only=True)
    for slot in range(NUM_SLOTS):
        source.write_slot(slot, random_expert(SHAPE, slot))
    s = source
    all_at_once = prepare_w4a16_packed_weights(
        s.w13, s.w13_scale, s.w13_alpha, s.w2, s.w2_scale, s.w2_alpha, activation="silu"
    )
    layer: Any = make(mode="w4a16")._layers[1]
    assert torch.equal(layer.packed.w13, all_at_once.w13)
    assert torch.equal(layer.packed.w2, all_at_once.w2)
    for name in ("w13", "w2"):  # the library may shift a power of two between block scales and multiplier
        ours, theirs = (_block_times_global(packed, name) for packed in (layer.packed, all_at_once))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def _block_times_global(packed: Any, name: str) -> Tensor:
    """Return scales from the exponents and mantissas of the library's own 8-bit scale format, as far as
    ratios go."""
    bits = getattr(packed, f"{name}_scale").view(torch.uint8).flatten(1).int()
    value = torch.ldexp(1 + (bits & 7) / 8, (bits >> 3).float())
    return value * getattr(packed, f"{name}_global_scale").flatten()[:, None]


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 256])
def test_w4a16_launches_on_the_repacked_weights(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_dispatch

    launches: list[tuple[Any, ...]] = []

    def record(x_TD: Tensor, packed: Any, w_TK: Tensor, ids_TK: Tensor, **others: Any) -> Tensor:
        launches.append((x_TD, packed, w_TK, ids_TK, others["output"], others["expert_map"]))
        return others["output"]

    monkeypatch.setattr(moe_dispatch, "run_w4a16_moe", record)
    made, case = make(mode="w4a16"), arguments(num_tokens)
    forward(made, 1, case)
    with CountOperations() as count:
        forward(made, 1, case)
    assert set(count.names) <= {"aten::max", "aten::item"}, "nothing is copied"
    for x_TD, packed, w_TK, ids_TK, out_TD, expert_map in launches:
        ours = [case["x_TD"], case["w_TK"], case["local_TK"], case["out_TD"]]
        theirs = [x_TD, w_TK, ids_TK, out_TD]
        assert [one.data_ptr() for one in ours] == [one.data_ptr() for one in theirs]
        assert packed is cast(Any, made._layers[1]).packed
        assert packed.num_experts == NUM_SLOTS
        assert expert_map is None, "which would turn the kernels for few tokens off"
    assert moe_dispatch._W4A16_WEIGHT_CACHE == {}, "the library keeps no copy of its own"


def test_w4a16_weights_are_written_in_place_without_a_second_copy(recorder: Recorder) -> None:
    shape, num_slots = MoEShape(1, (0,), 16, hidden=1024, intermediate=768), 16
    expert, one = random_expert(shape, 0), (1024 * 768 * 3) * 9 // 16

    def load() -> B12xBackend:
        made = B12xBackend(shape, num_slots, torch.bfloat16, CPU, mode="w4a16")
        pointer = cast(Any, made._layers[0]).packed.w13.data_ptr()
        for slot in range(num_slots):
            made.write_slot(0, slot, expert)
        assert cast(Any, made._layers[0]).packed.w13.data_ptr() == pointer
        return made

    _, peak = peak_of_tensors(load)
    assert num_slots * one < peak < (num_slots + 8) * one, (
        "a few experts' worth of scratch, whatever the slots"
    )


def test_refuses_another_dtype(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match=r"set fabric.wire_dtype=bfloat16, not torch.float32"):
        B12xBackend(SHAPE, 1, torch.float32, CPU)


def test_buckets() -> None:
    assert token_buckets(2048) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert token_buckets(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert [bucket_of(n, [1, 4, 9]) for n in (1, 2, 4, 5, 9, 10)] == [1, 4, 4, 9, 9, 10]
    assert bucket_of(7, []) == 7
