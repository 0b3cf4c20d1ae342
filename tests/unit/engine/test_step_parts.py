"""A step's kernels and the parts that they belong to."""

from tests.bench.step_parts import parts_of

LAYER = {
    "_rms_norm": "norms",
    "nvjet_qkv": "products",
    "_rotate_halves": "attention",
    "_write_cache": "attention",
    "_attend": "attention",
    "_add_parts": "attention",
    "nvjet_o": "products",
    "add (residual)": "other",
    "_rms_norm (2)": "norms",
    "gemv": "gate",
    "splitKreduce_kernel": "gate",
    "_softmax_top_k": "gate",
    "take": "dispatch",
    "_to_local": "dispatch",
    "arrange": "experts",
    "gate_up": "experts",
    "down": "experts",
    "combine": "experts",
    "Memcpy DtoD": "dispatch",
    "add (residual 2)": "other",
}


def test_a_step_of_two_layers() -> None:
    step = (
        {"Memcpy HtoD": "inputs", "embedding": "inputs"},
        LAYER,
        LAYER,
        {"_rms_norm": "norms", "nvjet_head": "products", "argmax": "sampling", "Memcpy DtoH": "sampling"},
    )
    names, parts = zip(*(pair for each in step for pair in each.items()), strict=True)
    assert parts_of(names) == list(parts)


def test_what_it_does_not_know_is_other() -> None:
    assert parts_of(["something", "else"]) == ["other", "other"]
    assert parts_of([]) == []
