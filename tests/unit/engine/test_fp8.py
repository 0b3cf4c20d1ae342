"""Keys and values in FP8: what is kept of a vector, what an engine makes of it, how much fits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.cache.fp8 import E4M3, dequantize, quantize
from router.cache.kv_cache import KVCache, num_blocks_for, stored_dtype
from router.config import KVCacheConfig, RouterConfig
from router.text.tokenizer import Tokenizer
from tests.bench.perplexity import FP8
from tests.support.in_process import greedy, in_process
from tests.support.paged import shape_of
from tests.support.places import DEMO_MODEL, HELDOUT

CPU = torch.device("cpu")


@given(exponent=st.integers(-80, 120), seed=st.integers(0, 9))
def test_an_element_is_kept_to_one_part_in_16_whatever_its_size(exponent: int, seed: int) -> None:
    x_TGD = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    found = dequantize(*quantize(x_TGD), torch.float32)
    smallest_TG1 = (
        x_TGD.abs().amax(-1, keepdim=True) / 448 * 2**-10
    )  # half of what FP8's least element stands for
    assert ((found - x_TGD).abs() <= (x_TGD.abs() / 16).maximum(smallest_TG1) * 1.0001).all()


def test_zero_stays_zero_and_what_is_not_finite_is_found_again() -> None:
    x_TGD = torch.randn(4, 2, 8)
    x_TGD[0, 0], x_TGD[1, 1, 3], x_TGD[2, 0, 5], x_TGD[3, 1, 0] = 0, torch.nan, torch.inf, -torch.inf
    found = dequantize(*quantize(x_TGD), torch.float32)
    assert not found[0, 0].any()
    assert torch.equal(found.isfinite().all(-1), x_TGD.isfinite().all(-1))


def test_what_was_nan_is_erased() -> None:
    shape = shape_of(4, 2, 8)
    cache = KVCache(shape, num_slots=4, dtype=E4M3, device=CPU)
    k_SGD, v_SGD, scale_SG2 = cache.layer(1)
    assert scale_SG2 is not None
    k_SGD[:], v_SGD[:], scale_SG2[:] = torch.nan, torch.nan, torch.nan
    cache.erase(torch.tensor([1, 2]).numpy())
    kept = (
        dequantize(k_SGD, scale_SG2[..., 0], torch.float32),
        dequantize(v_SGD, scale_SG2[..., 1], torch.float32),
    )
    for found in kept:
        assert not found[1:3].any()
        assert found[[0, 3]].isnan().all()


def test_nearly_twice_as_many_tokens_fit() -> None:
    shape, num_bytes = shape_of(32, 4, 128), 2**30
    blocks = {
        dtype: num_blocks_for(shape, num_bytes, block_size=16, dtype=dtype)
        for dtype in (torch.bfloat16, E4M3)
    }
    assert blocks[E4M3] == pytest.approx(blocks[torch.bfloat16] * 2 * 128 / (128 + 4), rel=1e-3)
    cache = KVCache(shape, num_slots=160, dtype=E4M3, device=CPU)
    assert cache.scales is not None
    num_bytes = cache.k.nbytes + cache.v.nbytes + cache.scales.nbytes
    assert num_blocks_for(shape, num_bytes, block_size=16, dtype=E4M3) == 10
    assert num_blocks_for(shape, num_bytes - 1, block_size=16, dtype=E4M3) == 9


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        ValueError, match=r"router.kv_cache.dtype=fp8_e4m3 needs a GPU of SM89 .* NVIDIA A100 is SM80"
    ):
        stored_dtype(FP8, dtype=torch.bfloat16, device=gpu)
    assert stored_dtype(KVCacheConfig(), dtype=torch.bfloat16, device=gpu) == torch.bfloat16
    assert stored_dtype(FP8, dtype=torch.float32, device=CPU) == E4M3


def test_tokens_depend_on_neither_company_nor_cuts_nor_preemption_nor_the_prefix_cache() -> None:
    """Every prompt attends to what is kept of its keys and values, even where it computes them all in one
    step."""
    tokens = Tokenizer(DEMO_MODEL).encode(HELDOUT.read_text())
    prompts = [tokens[1000 * n : 1000 * n + length] for n, length in enumerate((3, 17, 64, 150, 301))]
    requests = [greedy(str(n), prompt, num_tokens=24) for n, prompt in enumerate(prompts)]
    small = FP8.model_copy(update={"memory_gib": 38.5 * 16 * 6 * 2 * 2 * (64 + 4) / 2**30})
    answers, preempted, found = [], [], []
    for config in (
        RouterConfig(kv_cache=FP8),
        RouterConfig(kv_cache=FP8, max_requests=8, max_batch_tokens=19),
        RouterConfig(kv_cache=small),
    ):
        with in_process(DEMO_MODEL, num_shards=2, config=config) as server:
            for some in (requests, *([one] for one in requests)):  # the same again, alone
                server.run(some)
                answers += [(one.id, server.answers[one.id].tokens) for one in some]
            preempted.append(server.engine.preempted)
            found.append(server.engine.status().num_cached)
    first = dict(answers[: len(requests)])
    assert [name for name, tokens in answers if tokens != first[name]] == []
    assert [bool(some) for some in preempted] == [False, False, True]
    assert found[0] == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts)
