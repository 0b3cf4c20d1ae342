"""The b12x kernels of real models, compiled without a GPU: python -m tests.bench.b12x_kernels [--arch sm_120a]

For each that one of two shards needs: the token buckets that it computes, seconds to compile, registers per thread,
spills (instructions that write or read local memory), tensor-core instructions (block-scaled FP4, or BF16 for W4A16),
and whether it accepts what the backend passes ("-": W4A16's kernels look at their arguments on a GPU only). Minutes.
"""

import argparse
import itertools
from typing import get_args

from experts.backends.b12x.backend import Mode
from tests.support.b12x_contract import MODELS, Case, Findings, Kernel, examine, pool
from tests.support.b12x_on_cpu import NUM_SMS

HEAD = f"{'model':18}{'kernel':18}{'tokens':>10}{'target':>9}{'seconds':>9}{'registers':>11}{'spills':>8}{'MMA':>6}  verdict"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", choices=NUM_SMS, default="sm_121a")
    arch = parser.parse_args().arch
    cases = [
        Case(model, mode=mode, arch=arch, sass=True)
        for model, mode in itertools.product(MODELS, get_args(Mode))
    ]
    print(HEAD)
    with pool() as processes:
        for case, found in zip(cases, processes.map(examine, cases), strict=True):
            for kernel in found.kernels:
                print(line(case, found, kernel), flush=True)


def line(case: Case, found: Findings, kernel: Kernel) -> str:
    tokens = [size for size, launched in found.launches.items() if kernel.name in launched]
    verdicts = sorted({found.verdicts[size] for size in tokens if size in found.verdicts})
    name = kernel.name.removeprefix("moe.").rpartition("_")[0].split("_k")[0].split("_e")[0]
    span = f"{tokens[0]}..{tokens[-1]}" if len(tokens) > 1 else str(tokens[0])
    return (
        f"{case.model:18}{name:18}{span:>10}{kernel.target:>9}{kernel.seconds:9.1f}{kernel.registers:11}"
        f"{kernel.spills:8}{kernel.mma:6}  {', '.join(verdicts) or '-'}"
    )


if __name__ == "__main__":
    main()
