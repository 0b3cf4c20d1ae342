"""Reading whole tensors at the speed of the disk, however large they are; and the tensor that bytes of a span are."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experts.checkpoint.byte_reader import ByteReader, Extent, group_of
from experts.checkpoint.tensor_files import Span

PIECE_BYTES = 16 * 2**20
"""The most that is read of a tensor at a time: an embedding of a gigabyte need not fit into what is read ahead."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
"""The dtypes of safetensors that torch has, too."""


def read_tensors(spans: Sequence[Span]) -> Iterator[Tensor]:
    """Yield the tensors of these spans, in host memory of their own, while the next ones are read. See ByteReader."""
    pieces = [_pieces(span) for span in spans]
    groups = [group_of([piece]) for of_span in pieces for piece in of_span]
    with ByteReader(groups) as reader:
        coming = zip(groups, reader, strict=True)
        for span, of_span in zip(spans, pieces, strict=True):
            whole = torch.empty(span.size, dtype=torch.uint8)
            for piece in of_span:
                group, memory = next(coming)
                begin = piece.offset - span.offset
                whole[begin : begin + piece.size].copy_(memory[group.at[0] :][: piece.size])
                reader.release()
            yield tensor_at(whole, 0, span)


def tensor_at(memory: Tensor, at: int, span: Span) -> Tensor:
    """Return the tensor whose bytes begin here in uint8 memory: in place, unless it stands askew for its dtype."""
    dtype = dtype_of(span)
    value = memory[at : at + span.size]
    value = value.clone() if at % dtype.itemsize else value
    return value.view(dtype).view(span.shape)


def dtype_of(span: Span) -> torch.dtype:
    """Return torch's dtype. Raises ValueError for one that it does not have."""
    if span.dtype not in DTYPES:
        raise ValueError(
            f"{span.file}: holds a tensor of {span.dtype} {list(span.shape)}, which is not supported"
        )
    return DTYPES[span.dtype]


def _pieces(span: Span) -> list[Extent]:
    begins = range(span.offset, span.offset + span.size, PIECE_BYTES)
    return [Extent(span.file, at, min(PIECE_BYTES, span.offset + span.size - at)) for at in begins]
