"""Softmax and top-k of the gate on a GPU: whatever the logits are, ids stay within the experts."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_experts", [6, 128, 160])
@pytest.mark.parametrize("broken", ["nan", "all nan", "all -inf", "inf", "some -inf"])
def test_ids_are_experts_and_broken_weights_are_nan(num_experts: int, broken: str) -> None:
    """The lookup of a larger id would read beyond the placement, which ends the CUDA context."""
    from router.kernels.rows import softmax_top_k

    logits_TE = torch.randn(8, num_experts, device="cuda")
    row_E = logits_TE[3]
    match broken:
        case "nan":
            row_E[num_experts // 2] = torch.nan
        case "all nan":
            row_E.fill_(torch.nan)
        case "all -inf":
            row_E.fill_(-torch.inf)
        case "inf":
            row_E[num_experts - 1] = torch.inf
        case _:
            row_E[1:] = -torch.inf
    w_TK, id_TK = softmax_top_k(logits_TE, 4, rounded_to=torch.float32, divided=True)
    assert id_TK.min() >= 0
    assert id_TK.max() < num_experts
    assert all(len(set(row)) == 4 for row in id_TK.tolist())
    finite = w_TK.isfinite().all(dim=-1)
    assert finite.tolist() == [row != 3 or broken == "some -inf" for row in range(8)]
