"""Whole tensors in their order, each of them as safetensors reads it, however it is cut into pieces."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.checkpoint import tensor_stream
from experts.checkpoint.byte_reader import ALIGN
from experts.checkpoint.tensor_files import Span, TensorFiles
from experts.checkpoint.tensor_stream import DTYPES, read_tensors
from tests.support.checkpoints import FIXTURES, WHOLE


@given(st.data())
def test_tensors_are_those_that_are_read_one_at_a_time(data: st.DataObject) -> None:
    with TensorFiles(WHOLE) as files, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_stream, "PIECE_BYTES", data.draw(st.sampled_from([1000, ALIGN, 2**24])))
        names = data.draw(st.lists(st.sampled_from(list(files)), max_size=30))
        streamed = list(read_tensors([files.span(name)[0] for name in names]))
        for name, value in zip(names, streamed, strict=True):
            theirs = files.read(name)
            assert (value.dtype, value.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(value.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_are_safetensors_own(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3, dtype=torch.uint8).to(dtype)}, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as files:
        (value,) = read_tensors([files.span("x")[0]])
    assert (value.dtype, value.shape) == (dtype, (3,))


def test_a_dtype_that_torch_lacks_is_refused_by_name() -> None:
    span = Span(FIXTURES / "whole-trunk.safetensors", 0, 4, "F6_E2M3", (1, 2))
    with pytest.raises(
        ValueError, match=r"whole-trunk.safetensors: holds a tensor of F6_E2M3 \[1, 2\], which"
    ):
        list(read_tensors([span]))
