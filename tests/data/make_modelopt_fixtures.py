"""Writes tests/data/modelopt/: what NVIDIA ModelOpt itself makes of small matrices and of a tiny Qwen3-MoE.

Run by hand, in an environment of its own (nvidia-modelopt==0.47.0, transformers==5.23.0, torch on CPU, requests,
accelerate, datasets), from the repository root: python -m tests.data.make_modelopt_fixtures

    matrices.safetensors   NAME.source and what NVFP4QTensor.quantize and .dequantize give for it
    source/                the Qwen3-MoE in BF16: a dense layer, then two with experts
    experts-only/          mtq.quantize with NVFP4_EXPERTS_ONLY_CFG, then export_hf_checkpoint
    whole/                 the same with NVFP4_DEFAULT_CFG and an FP8 KV cache: attention is quantised too
    whole-trunk.safetensors   layer 1's attention weights of whole/, dequantised by ModelOpt
    amax.json              of experts-only/: layer -> the calibrated [gate/up, down] input magnitudes
"""

import copy
import json
import shutil
from pathlib import Path

import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]
import torch
from modelopt.torch.export import export_hf_checkpoint  # pyright: ignore[reportMissingImports]
from modelopt.torch.quantization.qtensor import NVFP4QTensor  # pyright: ignore[reportMissingImports]
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).parent / "modelopt"
CONFIG = Qwen3MoeConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    mlp_only_layers=[0],
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,  # pyright: ignore[reportCallIssue]
    num_experts=2,
    num_experts_per_tok=1,
    norm_topk_prob=True,
    tie_word_embeddings=True,
    pad_token_id=0,
)
WHOLE_CFG = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
WHOLE_CFG["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    torch.manual_seed(0)
    save_file(
        {key: t for name, w in matrices().items() for key, t in quantised(name, w).items()},
        ROOT / "matrices.safetensors",
    )
    write_source(ROOT / "source")
    amax = export(mtq.NVFP4_EXPERTS_ONLY_CFG, ROOT / "experts-only")
    (ROOT / "amax.json").write_text(json.dumps(amax))
    export(WHOLE_CFG, ROOT / "whole")
    save_file(dequantised_attention(ROOT / "whole"), ROOT / "whole-trunk.safetensors")


def matrices() -> dict[str, Tensor]:
    """Two rows of ties land exactly on E2M1's midpoints, because scale_2 and every block scale are powers of
    two."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    dead = torch.randn(3, 32)
    dead[0, 16:32] = 0
    dead[2] = 0
    mixed = torch.randn(4, 32)
    mixed[1] *= 1e-7  # block scales at their smallest
    mixed[2] *= 1e4
    return {
        "gaussian": torch.randn(4, 32),
        "gaussian_bf16": (torch.randn(4, 32) * 0.02).bfloat16(),
        "ties": torch.stack((midpoints.repeat(4), -midpoints.repeat(4))) * 448,
        "dead_blocks": dead,
        "mixed_rows": mixed,
        "tiny": torch.randn(2, 32) * 1e-30,
        "large": torch.randn(2, 32) * 1e30,
        "small_negatives": torch.tensor([[6.0, -0.1, 0.1, -0.0] * 4]),
    }


def quantised(name: str, w: Tensor) -> dict[str, Tensor]:
    q, scale, scale_2 = NVFP4QTensor.quantize(w.clone(), 16)
    values = q.dequantize(dtype=torch.bfloat16, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    parts = {
        "source": w,
        "packed": q._quantized_data,
        "scale": scale,
        "scale_2": scale_2,
        "dequantised": values,
    }
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def write_source(path: Path) -> None:
    model = Qwen3MoeForCausalLM._from_config(CONFIG, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[0, :4] = 0  # dead blocks
    model.save_pretrained(path)


def export(config: dict, path: Path) -> dict[int, tuple[float, float]]:
    """Calibrate, quantise and export the source; returns the largest inputs of each layer's experts."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        ROOT / "source", dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    model = mtq.quantize(model, copy.deepcopy(config), lambda m: m(tokens))
    amax = {
        layer: (
            float(block.mlp.experts.gate_up_proj_input_quantizer.amax),
            float(block.mlp.experts.down_proj_input_quantizer.amax),
        )
        for layer, block in enumerate(model.model.layers)
        if layer > 0  # the first is dense
    }
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=path)
    return amax


def dequantised_attention(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if ".layers.1.self_attn." in name and file.get_slice(name).get_dtype() == "U8":
                packed, scale, scale_2 = (file.get_tensor(name + end) for end in ("", "_scale", "_scale_2"))
                q = NVFP4QTensor(torch.Size((packed.shape[0], 2 * packed.shape[1])), torch.bfloat16, packed)
                tensors[name] = q.dequantize(scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return tensors


if __name__ == "__main__":
    main()
