"""The b12x kernels of real models, compiled without a GPU: python -m tests.bench.b12x_kernels [--arch sm_120a]

For each that one of two shards needs, whatever the number of tokens: seconds to compile, registers per thread, bytes of
stack (0: none spilled), tensor-core instructions (block-scaled FP4, or BF16 for W4A16), and whether it accepts what the
backend passes ("-": W4A16's kernels look at their arguments on a GPU only). A few minutes.
"""

import argparse
import itertools
from typing import get_args

from experts.backends.b12x import Mode
from tests.b12x_contract import MODELS, Case, examine, pool
from tests.b12x_on_cpu import NUM_SMS

HEAD = f"{'model':18}{'mode':7}{'kernel':22}{'target':9}{'seconds':>8}{'registers':>11}{'stack':>7}{'MMA':>6}  verdict"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", choices=NUM_SMS, default="sm_121a")
    arch = parser.parse_args().arch
    cases = [Case(model, mode=mode, arch=arch) for model, mode in itertools.product(MODELS, get_args(Mode))]
    print(HEAD)
    with pool() as processes:
        for case, found in zip(cases, processes.map(examine, cases), strict=True):
            for kernel in found.kernels:
                verdicts = {
                    verdict
                    for num_tokens, verdict in found.verdicts.items()
                    if kernel.name in found.launches[num_tokens]
                }
                print(
                    f"{case.model:18}{case.mode:7}{kernel.name.split('_')[0]:22}{kernel.target:9}{kernel.seconds:8.1f}"
                    f"{kernel.registers:11}{kernel.stack:7}{kernel.mma:6}  {', '.join(sorted(verdicts)) or '-'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
