"""The b12x kernels of real models, compiled without a GPU: python -m tests.bench.b12x_kernels [--arch sm_120a]

For each: seconds to compile, registers per thread, bytes of stack (0: none spilled), FP4 tensor-core instructions,
and whether it accepts what the backend passes. Two ranks; a minute or two.
"""

import argparse

from tests.b12x_on_cpu import NUM_SMS
from tests.unit.test_b12x_contract import LARGE, MODELS, SMALL, contract


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", choices=NUM_SMS, default="sm_121a")
    arch = parser.parse_args().arch
    print(
        f"{'model':18}{'kernel':10}{'target':9}{'seconds':>8}{'registers':>11}{'stack':>7}{'FP4 MMA':>9}  verdict"
    )
    for model in MODELS:
        for num_tokens in (SMALL, LARGE):
            one = contract(model, ranks=2, num_tokens=num_tokens, arch=arch)
            print(
                f"{model:18}{one['kernel'].split('_')[0]:10}{one['target']:9}{one['seconds']:8.1f}"
                f"{one['registers']:11}{one['stack']:7}{one['mma']:9}  {one['verdict']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
