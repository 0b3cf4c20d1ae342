"""A layer of tests.bench.moe by FlashInfer's cuTile kernels for NVFP4 weights, tuned by FlashInfer's autotuner.

They are compiled by `tileiras`, which takes libnvvm and ptxas from CUDA_HOME and CUDA_PATH where those are set: unset them, and have
nvidia-cuda-tileiras, nvidia-cuda-nvcc and nvidia-nvvm of one version, and cuda-tile. The tuner tries 36 pairs of kernels for each
number of tokens and compiles each for seconds.

E experts, D hidden, I intermediate.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from experts.nvfp4 import GROUP
from experts.weights import MoEShape


def available() -> bool:
    if find_spec("flashinfer") is None:
        return False
    from flashinfer.cutile import is_cuda_tile_available

    return is_cuda_tile_available()


class CuTileLayer:
    """A layer with random weights.

    tune() comes before the first call with as many tokens: tuning and compiling wait for the device, graphs
    cannot.
    """

    def __init__(self, shape: MoEShape, *, top_k: int, max_tokens: int, device: torch.device) -> None:
        from flashinfer.fused_moe import api
        from flashinfer.fused_moe.layer import MoELayer
        from flashinfer.fused_moe.prepare import prepare_cutile_nvfp4_weights

        config = api.MoEConfig(
            routing=api.RoutingConfig(num_experts=shape.num_experts, top_k=top_k),
            quant=api.QuantConfig(weight=api.QuantFormat.NVFP4),
            experts=api.ExpertConfig(intermediate_size=shape.intermediate),
            activation=api.SwiGLU(),
            backend=api.BackendOptions((api.CuTileNvfp4Bf16Config(),)),
            execution=api.ExecutionConfig(tune_max_num_tokens=max_tokens),
        )
        self._layer = MoELayer(config, torch.device("cuda", torch.cuda.current_device()))
        self._weights = api.MoEWeightPack()
        prepared = prepare_cutile_nvfp4_weights(
            *_random_matrices(shape.num_experts, 2 * shape.intermediate, shape.hidden, device),
            *_random_matrices(shape.num_experts, shape.hidden, shape.intermediate, device),
            num_local_experts=shape.num_experts,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
        )
        self._weights.prepare_for("cutile_nvfp4", prepared)
        self._pack = api.MoEActivationPack

    def tune(self, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor) -> None:
        """Tune the layer for this number of tokens; another layer of the shape then finds the result."""
        from flashinfer.autotuner import autotune

        with autotune(True, tuning_buckets=(len(x_TD),)):
            self(x_TD, ids_TK, w_TK)

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor) -> Tensor:
        out_TD = self._layer(self._pack(x_TD, None, ids_TK, w_TK), self._weights)
        assert isinstance(out_TD, Tensor)
        return out_TD


def _random_matrices(
    num_experts: int, rows: int, cols: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw codes, block scales and multipliers of every expert."""
    packed_ENK = torch.randint(256, (num_experts, rows, cols // 2), dtype=torch.uint8, device=device)
    sizes = num_experts, rows, cols // GROUP
    scale_ENG = torch.randint(0x28, 0x40, sizes, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    return packed_ENK, scale_ENG, torch.full((num_experts,), 0.02, device=device)
