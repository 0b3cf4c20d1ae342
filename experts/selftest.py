"""`sparkmoe selftest` finds out whether every backend that this machine can run computes what it should, and how fast.

T tokens, D hidden, K top-k, e slots, I intermediate. A pair is a (token, expert) of a local expert.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.backends import DEFAULTS, ExpertBackend
from experts.backends.b12x.library import VERSIONS, is_sm12x, machine_of, why_not
from experts.backends.b12x.numerics import is_static
from experts.backends.registry import BACKENDS
from experts.device import resolve_dtype
from experts.nvfp4 import dequantize, quantize, scale_2_of
from experts.placement import EMPTY
from experts.progress import show
from experts.weights import ExpertWeights, MoEShape

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""The largest relative error of a row that passes. In float32 only the order of additions differs. In bfloat16 outputs, and
weights where a backend keeps them so, are rounded by 2^-9; the b12x kernels round each partial sum, and a sum that was added
in another order may fall into the next FP4 code. A swap, a lost multiplier or another expert is wrong by more than 0.04 in
some row."""

REPEATS = 20
BYTES_PER_WEIGHT = 9 / 16
"""A weight is a 4-bit code, and 16 of them share an e4m3 scale."""


@dataclass(frozen=True)
class Layer:
    """The sizes of one shard's share of a layer. The ids of num_slots * shards experts reach the shard."""

    name: str
    hidden: int
    intermediate: int
    num_slots: int
    top_k: int
    shards: int = 4

    @property
    def shape(self) -> MoEShape:
        """The shape of a model that has this layer only, and only this shard's experts."""
        return MoEShape(1, (0,), self.num_slots, self.hidden, self.intermediate)


LAYERS = (
    Layer("demo model", 256, 128, num_slots=8, top_k=4),
    Layer("Qwen3-30B-A3B", 2048, 768, num_slots=32, top_k=8),
    Layer("an odd size", 1024, 704, num_slots=11, top_k=6),
)
TOKENS = {"cuda": (1, 16, 129, 2048), "cpu": (1, 16, 129)}
"""The numbers of tokens to test, by the device's type. At top-8 the static kernel takes calls of up to 128."""


class Call(NamedTuple):
    """The arguments of one forward, and a name for people."""

    name: str
    x_TD: Tensor
    local_TK: Tensor
    w_TK: Tensor


class Result(NamedTuple):
    """The verdict on one call.

    error: the largest relative error of a row. us: the median time of a call. trouble: what is wrong, or empty.
    """

    call: str
    error: float
    limit: float
    us: float
    gib_per_s: float
    trouble: str


def selftest(device: torch.device, *, echo: Callable[[str], None]) -> bool:
    """Test every backend on every layer and return whether all is well.

    echo: gets each line as soon as it is known.
    """
    names, reason = backends_of(device)
    echo(machine_sentence(device))
    if reason:
        echo(f"not tested: {reason}")
    echo(f"{'backend':<12} {'layer':<14} {'call':<23} {'error':>8} {'limit':>8} {'us':>9} {'GiB/s':>6}")
    results = []
    for layer in LAYERS:
        experts = random_experts(layer, device)
        for name in names:
            for result in results_of(name, layer, experts, TOKENS[device.type], device):
                results.append(result)
                echo(_line(name, layer, result))
    good = passed(device, reason, results)
    failed = sum(bool(result.trouble) for result in results)
    if failed:
        echo(f"{failed} of {len(results)} calls failed: please report all of this")
    elif not good:
        echo("b12x cannot run on this GPU yet, see above")
    else:
        echo(f"all {len(results)} calls are right")
    return good


def backends_of(device: torch.device) -> tuple[tuple[str, ...], str]:
    """Return the backends to test here, and why b12x is not one of them (empty if it is)."""
    machine = machine_of(device)
    reason = why_not(machine) or ""
    if machine.capability is None:
        return ("cpu", "torch"), reason
    portable = ("triton", "torch") if machine.capability >= (8, 0) else ("torch",)
    return (portable if reason else ("b12x", "b12x-w4a16", *portable)), reason


def passed(device: torch.device, reason: str, results: Iterable[Result]) -> bool:
    """Return whether the machine has passed.

    An SM12x GPU that lacks what b12x needs has not, however well the others do.
    """
    return not any(result.trouble for result in results) and not (reason and is_sm12x(machine_of(device)))


def random_experts(layer: Layer, device: torch.device) -> list[ExpertWeights]:
    """Return random experts that resemble trained ones.

    Weights have deviation 0.02, each matrix a multiplier of its own, and inputs deviation 1.
    """
    random = torch.Generator(device).manual_seed(layer.hidden)

    def matrix(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=random, device=device) * std

    amax = torch.tensor(6.0, device=device)
    return [
        ExpertWeights(
            gate=quantize(matrix(layer.intermediate, layer.hidden, 0.02)),
            up=quantize(matrix(layer.intermediate, layer.hidden, 0.025)),
            down=quantize(matrix(layer.hidden, layer.intermediate, 0.02)),
            input_scale=scale_2_of(amax),
            down_input_scale=scale_2_of(amax),
        )
        for _ in range(layer.num_slots)
    ]


def calls(layer: Layer, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Yield a call with experts chosen at random of all shards, so that some rows have none here, and one on one expert."""
    random = torch.Generator(device).manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, layer.hidden, generator=random, device=device).to(dtype)
    order_TE = torch.rand(num_tokens, layer.num_slots * layer.shards, generator=random, device=device)
    phys_TK = order_TE.argsort(dim=1)[:, : layer.top_k].to(torch.int32)
    w_TK = torch.rand(num_tokens, layer.top_k, generator=random, device=device) + 0.1
    w_TK /= w_TK.sum(dim=1, keepdim=True)
    one_TK = torch.full_like(phys_TK, EMPTY)
    one_TK[:, -1] = layer.num_slots - 1
    yield Call("random", x_TD, phys_TK.masked_fill(phys_TK >= layer.num_slots, EMPTY), w_TK)
    yield Call("one expert", x_TD, one_TK, w_TK)


def dequantised(experts: Sequence[ExpertWeights], call: Call) -> Tensor:
    """Return float32 [T, D]: the right answer of kernels that compute on the checkpoint's weights, expert by expert."""
    sum_TD = torch.zeros_like(call.x_TD, dtype=torch.float32)
    for slot, expert in enumerate(experts):
        token_R, k_R = (call.local_TK == slot).nonzero(as_tuple=True)
        if len(token_R):
            gate, up, down = (dequantize(w, torch.float32) for w in (expert.gate, expert.up, expert.down))
            x_RD = call.x_TD[token_R].float()
            y_RD = (F.silu(x_RD @ gate.T) * (x_RD @ up.T)) @ down.T
            sum_TD.index_add_(0, token_R, y_RD * call.w_TK[token_R, k_R, None])
    return sum_TD


def run(backend: ExpertBackend, call: Call) -> Tensor:
    """Return what the backend computes for a call."""
    out_TD = torch.full_like(call.x_TD, float("nan"))  # every row has to be written
    backend.forward(0, call.x_TD, call.local_TK, call.w_TK, out_TD=out_TD)
    return out_TD


def largest_error(found_TD: Tensor, truth_TD: Tensor) -> float:
    """Return the largest error of a row, relative to the row's norm.

    It is infinite if a row is not finite, or if a row is not zero that must be.
    """
    error_T = (found_TD.float() - truth_TD).norm(dim=1)
    relative_T = torch.where(error_T == 0, 0.0, error_T / truth_TD.norm(dim=1))
    return float(relative_T.nan_to_num(nan=float("inf")).max())


def seconds(call: partial[Tensor], device: torch.device) -> float:
    """Return the median time of REPEATS calls, after one call to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def judge(backend: ExpertBackend, call: Call, truth_TD: Tensor, *, layer: Layer, same_bits: bool) -> Result:
    """Compare one call with the truth and time it.

    same_bits: the backend promises the same bits for the same call.
    """
    device, limit = call.x_TD.device, LIMITS[call.x_TD.dtype]
    found_TD = run(backend, call)
    error = largest_error(found_TD, truth_TD)
    trouble = "" if error <= limit else "wrong"
    if same_bits and not torch.equal(run(backend, call), found_TD):
        trouble = "two runs of one call differ"
    touched = int((call.local_TK[call.local_TK != EMPTY]).unique().numel())
    num_bytes = touched * 3 * layer.hidden * layer.intermediate * BYTES_PER_WEIGHT
    spent_s = seconds(partial(run, backend, call), device)
    name = f"{len(call.x_TD)} tokens, {call.name}"
    return Result(name, error, limit, spent_s * 1e6, num_bytes / spent_s / 2**30, trouble)


def results_of(
    name: str, layer: Layer, experts: Sequence[ExpertWeights], tokens: Sequence[int], device: torch.device
) -> Iterator[Result]:
    """Yield the results of one backend on one layer. A call that raises is a result like any other."""
    dtype = resolve_dtype("auto", device=device)
    try:
        backend = _filled(name, layer, experts, dtype, device)
        emulation = _filled("b12x-emulated", layer, experts, dtype, device) if name == "b12x" else None
        report = show(f"{name}, {layer.name}")
        for progress in backend.warm(top_k=layer.top_k):
            report(progress)
    except Exception as error:  # noqa: BLE001 whatever a library raises, the other backends are tested
        yield _failure("set up", error)
        return
    for num_tokens in tokens:
        static = name == "b12x" and is_static(num_tokens, layer.top_k)
        for call in calls(layer, num_tokens, dtype=dtype, device=device):
            try:
                truth_TD = run(emulation, call).float() if emulation else dequantised(experts, call)
                yield judge(
                    backend, call, truth_TD, layer=layer, same_bits=static or name in ("cpu", "triton")
                )
            except Exception as error:  # noqa: BLE001
                yield _failure(f"{num_tokens} tokens, {call.name}", error)


def machine_sentence(device: torch.device) -> str:
    """Return one line on the device and the packages, for the reader of a report."""
    installed: Mapping[str, str | None] = machine_of(device).installed
    packages = ", ".join(f"{name} {installed[name] or '-'}" for name in VERSIONS)
    where = platform.processor() or platform.machine()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} (SM{major}{minor}, CUDA {torch.version.cuda})"
    return f"{where}: torch {torch.__version__}, {packages}"


def _line(name: str, layer: Layer, result: Result) -> str:
    call, error, limit, us, gib_per_s, trouble = result
    return (
        f"{name:<12} {layer.name:<14} {call:<23} {error:>8.1e} {limit:>8.0e} {us:>9.0f} {gib_per_s:>6.1f}  "
        + (f"FAILED: {trouble}" if trouble else "ok")
    )


def _filled(
    name: str, layer: Layer, experts: Sequence[ExpertWeights], dtype: torch.dtype, device: torch.device
) -> ExpertBackend:
    backend = BACKENDS[name](layer.shape, layer.num_slots, dtype, device, DEFAULTS)
    for slot, expert in enumerate(experts):
        backend.write_slot(0, slot, expert)
    return backend


def _failure(call: str, error: Exception) -> Result:
    nothing = float("nan")
    sentence = " ".join(str(error).split())
    return Result(call, nothing, nothing, nothing, nothing, f"{type(error).__name__}: {sentence}")
