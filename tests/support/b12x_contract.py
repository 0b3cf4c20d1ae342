"""Calls of backend b12x, through FlashInfer's host code, to the compiled kernels' own check of their arguments.

No GPU: CPU tensors go by as CUDA ones. A kernel that accepts its arguments asks for the driver, and there is none:
that is the success, and the only way to see it. After it the process is useless (the library's next call would wait for
ever), so each call is made in a fork of a process that has compiled the kernel, and that is a fork of one that has
imported the library. The kernels of W4A16 ask for the driver first, so those are compiled and not called.
T tokens, D hidden, K top-k.
"""

import math
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experts.backends.b12x.backend import MAX_TOKENS, B12xBackend, Mode, token_buckets
from experts.weights import MoEShape
from tests.support.b12x_calls import MISTAKES, Arguments, arguments_of, forward
from tests.support.b12x_on_cpu import pretend_sm12x, pretend_w4a16
from tests.support.b12x_tensors import as_cuda

ACCEPTED = "accepted"
BUCKETS = tuple(token_buckets(MAX_TOKENS))
MMA = {
    "w4a4": "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3",
    "w4a16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
}
"""The tensor-core instruction that a kernel is there for."""

_REGCOUNT = b"\x2f"
_DEADLINE_S = 60


class Model(NamedTuple):
    """The sizes of one MoE layer."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int


MODELS = {
    "demo": Model(32, 256, 128, 4),
    "Qwen3-30B-A3B": Model(128, 2048, 768, 8),
    "Qwen3-235B-A22B": Model(128, 4096, 1536, 8),
    "MiniMax-M2": Model(256, 3072, 1536, 8),
    "GLM-4.6": Model(160, 5120, 1536, 8),
    "Qwen3-Coder-480B": Model(160, 6144, 2560, 8),
    "Qwen3-Next-80B": Model(512, 2048, 512, 10),
}
"""The layers whose kernels are compiled. The last model is known to crash in other servers."""


@dataclass(frozen=True)
class Case:
    """The calls that one shard of `ranks` equal ones makes, its experts rounded up. tokens: rows of the calls.

    mistakes: make those, too. sass: count spills.
    """

    model: str
    ranks: int = 2
    tokens: tuple[int, ...] = BUCKETS
    mode: Mode = "w4a4"
    arch: str = "sm_121a"
    mistakes: bool = False
    sass: bool = False

    def __str__(self) -> str:
        return f"{self.model}-ep{self.ranks}-{self.mode}-{self.arch}-{self.tokens[0]}..{self.tokens[-1]}"

    @property
    def num_slots(self) -> int:
        return math.ceil(MODELS[self.model].experts / self.ranks)

    @property
    def shape(self) -> MoEShape:
        experts, hidden, intermediate, _ = MODELS[self.model]
        return MoEShape(1, (0,), experts, hidden, intermediate)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    mma: how many instructions of MMA it has. spills: how many that write or read local memory, None if nobody
    asked.
    """

    name: str
    seconds: float
    target: str
    mma: int
    registers: int
    spills: int | None


@dataclass(frozen=True)
class Findings:
    """What was found for each number of tokens: the kernels that are launched, and what the library says:
    ACCEPTED, or a complaint."""

    kernels: list[Kernel]
    launches: dict[int, tuple[str, ...]]
    verdicts: dict[int, str]
    mistakes: dict[int, dict[str, str]]


def pool() -> ProcessPoolExecutor:
    """Return a pool of processes that examine a case each, as many at a time as there are cores."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.support.b12x_imports"])
    return ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1)


def examine(case: Case) -> Findings:
    """Compile what the case needs and, unless it is W4A16, call it. A process may do so once."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(case, Path(folder))
        backend = backend_of(case)
        found = Findings(compiler.kernels, {}, {}, {})
        top_k = MODELS[case.model].top_k
        for num_tokens in case.tokens:
            right = arguments_of(num_tokens, hidden=case.shape.hidden, top_k=top_k, num_slots=case.num_slots)
            call = partial(forward, backend, case.shape.moe_layers[0], right)
            call()
            found.launches[num_tokens] = compiler.launched()
            if case.mode == "w4a4":
                found.verdicts[num_tokens] = in_fork(partial(compiler.verdict, call))
            if case.mistakes:
                found.mistakes[num_tokens] = verdicts_on_mistakes(compiler, backend, right)
        return found


def verdicts_on_mistakes(compiler: "Compiler", backend: B12xBackend, right: Arguments) -> dict[str, str]:
    """Return what the library says to each of MISTAKES once our own check is passed by."""
    buffers = backend._buffers_for(right["local_TK"].shape[1])
    verdicts = {}
    for name, mistake in MISTAKES.items():
        call = partial(backend._run, 0, buffers, *mistake(right).values())
        verdicts[name] = in_fork(partial(compiler.verdict, call))
    return verdicts


def backend_of(case: Case) -> B12xBackend:
    return B12xBackend(case.shape, case.num_slots, torch.bfloat16, torch.device("cpu"), mode=case.mode)


class Compiler:
    """Compiles what the library asks for and notes it. Nothing is launched but within verdict()."""

    def __init__(self, case: Case, folder: Path) -> None:
        from tests.support.b12x_imports import compile_for

        self.kernels: list[Kernel] = []
        self._case, self._folder = case, folder
        self._launched: list[str] = []
        self._really = False
        compile_for(case.arch, folder, sass=case.sass)
        pretend_sm12x(setattr, arch=case.arch).build_and_load_cute_dsl_kernel = self._compile_w4a4
        if case.mode == "w4a16":
            pretend_w4a16(setattr, self._compile_w4a16, arch=case.arch)

    def launched(self) -> tuple[str, ...]:
        """Return the names of the kernels that were launched since the last call."""
        names, self._launched = tuple(self._launched), []
        return names

    def verdict(self, call: Callable[[], None]) -> str:
        self._really = True
        try:
            call()
        except Exception as error:  # noqa: BLE001 it is the answer
            missing_driver = "cudaErrorInsufficientDriver" in str(error) or "cuInit" in str(error)
            return ACCEPTED if missing_driver else f"{type(error).__name__}: {error}"
        return "returned, which only a GPU can explain"

    def _compile_w4a4(
        self, _module: str, name: str, make: Callable[[], Any], extra_key_files: Any = ()
    ) -> Callable[..., None]:
        return self._compile(name, make)

    def _compile_w4a16(
        self, kernel: Any, *args: Any, compile_spec: Any, dsl_compile_options: Any = None
    ) -> Callable[..., None]:
        import cutlass.cute as cute

        compiler = cute.compile[dsl_compile_options] if dsl_compile_options else cute.compile
        name = f"{compile_spec.kernel_id}_{len(self.kernels)}"  # which has nothing of the shape
        return self._compile(name, lambda: compiler(kernel, *args))

    def _compile(self, name: str, make: Callable[[], Any]) -> Callable[..., None]:
        started = time.monotonic()
        compiled = make()
        self.kernels.append(self._kernel(name, time.monotonic() - started))

        def launch(*args: Any) -> None:
            self._launched.append(name)
            if self._really:
                compiled(*(as_cuda(arg) if isinstance(arg, Tensor) else arg for arg in args))

        return launch

    def _kernel(self, name: str, seconds: float) -> Kernel:
        """Describe the kernel by the files that the compiler has left, and remove them."""
        left = {".ptx": b"", ".cubin": b"", ".sass": b""}
        for file in self._folder.rglob("*.*"):
            left[file.suffix] += file.read_bytes()
            file.unlink()
        assert left[".sass"] or not self._case.sass, "no SASS; is nvidia-cuda-nvdisasm installed?"
        target = re.search(rb"\.target (\w+)", left[".ptx"])
        return Kernel(
            name,
            round(seconds, 1),
            target=target[1].decode() if target else "",
            mma=left[".ptx"].count(MMA[self._case.mode].encode()),
            registers=registers_of(left[".cubin"]),
            spills=len(re.findall(rb"\b(?:STL|LDL)\b", left[".sass"])) if self._case.sass else None,
        )


def registers_of(cubin: bytes) -> int:
    """Return how many registers the largest kernel takes.

    An attribute of .nv.info is: format 4, a code, size 8, two 32-bit numbers: symbol, value.
    """
    found = re.finditer(rb"\x04" + re.escape(_REGCOUNT) + rb"\x08\x00....(....)", cubin, re.DOTALL)
    return max((int.from_bytes(one[1], "little") for one in found if one[1][2:] == b"\0\0"), default=0)


def in_fork(act: Callable[[], str]) -> str:
    """Return what `act` returns in a forked process, which ends with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(_DEADLINE_S)
        try:
            os.write(writer, act().encode()[:4096])
        finally:
            os._exit(0)  # a module that could not be loaded keeps a thread of tvm-ffi busy
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read().decode()
    _, status = os.waitpid(child, 0)
    return said or f"ended with status {status}"
