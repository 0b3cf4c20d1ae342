"""ExpertStream reads many experts of a checkpoint at the speed of the disk, onto the device that will hold them."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from experts.checkpoint.byte_reader import AHEAD_BYTES, HELD_GROUPS, ByteReader, Extent, group_of
from experts.checkpoint.layouts import ExpertTensor
from experts.checkpoint.reader import ExpertCheckpoint
from experts.checkpoint.tensor_files import Span
from experts.checkpoint.tensor_stream import dtype_of, tensor_at
from experts.weights import ExpertWeights


class _Part(NamedTuple):
    """A tensor of an expert on disk. columns: the index of what is wanted within the span's tensor."""

    tensor: ExpertTensor
    span: Span
    columns: tuple[slice, ...]


class ExpertStream:
    """The NVFP4 experts (layer, expert) of a list, in its order; iterating over it yields what ExpertCheckpoint.read does.

    The tensors of an expert are on the device, in memory of their own. Its bytes go there in one piece, as they are on
    disk; what has to be turned or inverted, is so there. The host does not wait for the device, and holds no more than what
    ByteReader reads ahead.

    sizes: the bytes of each expert on disk.
    Raises ValueError, naming file, tensor or expert, for a checkpoint that is broken or not supported.
    """

    def __init__(
        self, checkpoint: ExpertCheckpoint, experts: Sequence[tuple[int, int]], *, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._experts = experts
        self._device = device
        self._parts = [self._locate(layer, expert) for layer, expert in experts]
        spans = [{part.span for part in parts} for parts in self._parts]  # K-first, gate and up are in one
        self.sizes = [sum(span.size for span in of_expert) for of_expert in spans]
        self._groups = [group_of([_extent(part.span) for part in parts]) for parts in self._parts]
        self._reader = ByteReader(self._groups, pinned=device.type == "cuda", ahead_bytes=AHEAD_BYTES)
        self._copies: deque[Any] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[ExpertWeights]:
        for (layer, expert), parts, group, memory in zip(
            self._experts, self._parts, self._groups, self._reader, strict=True
        ):
            there = self._upload(memory)
            values = {
                part.tensor: tensor_at(there, at, part.span)[part.columns]
                for part, at in zip(parts, group.at, strict=True)
            }
            yield self._checkpoint.assemble(layer, expert, values)

    def close(self) -> None:
        """Stop reading. Experts that were yielded stay valid."""
        for copy in self._copies:
            copy.synchronize()
        self._copies.clear()
        self._reader.close()

    def _locate(self, layer: int, expert: int) -> list[_Part]:
        parts = []
        for tensor in self._checkpoint.tensors_of(layer, expert):
            name, index = self._checkpoint.locate(tensor)
            span, rest = self._checkpoint.files.span(name, *index)
            dtype_of(span)  # an unknown one is refused before anything is read
            parts.append(_Part(tensor, span, rest))
        return parts

    def _upload(self, memory: Tensor) -> Tensor:
        """Return a copy of the reader's memory on the device, and give back what the device has surely read."""
        if self._device.type == "cpu":
            there = memory.clone()
            self._reader.release()
            return there
        there = memory.to(self._device, non_blocking=True)
        self._copies.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._copies) > HELD_GROUPS:
            self._copies.popleft().synchronize()
            self._reader.release()
        return there


def _extent(span: Span) -> Extent:
    return Extent(span.file, span.offset, span.size)
