"""Access to the tensors of a checkpoint directory by name, whichever *.safetensors file holds them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


class Span(NamedTuple):
    """The bytes of a tensor, or of a part of one that lies in one piece, in a file.

    offset: from the beginning of the file. size: in bytes. dtype: as safetensors spells it. shape: of the part.
    """

    file: Path
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The *.safetensors files of a directory, for one thread. Each is opened when first needed and mapped until close().

    framework: with "pt" tensors can be read; "numpy" gives only names, shapes and dtypes, but does not import torch.
    """

    def __init__(self, path: Path, *, framework: Literal["pt", "numpy"] = "pt") -> None:
        self.path = path
        self._framework: Literal["pt", "numpy"] = framework
        self._open: dict[str, safe_open] = {}
        self._headers: dict[str, _Header] = {}
        self._file_of = self._index()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        """Iterate over all tensors' names, file by file, so that reading in this order goes through each file once."""
        return iter(sorted(self._file_of, key=lambda name: (self._file_of[name], name)))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def close(self) -> None:
        """Unmap the files. Tensors that were read stay valid."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the file's header: no data is read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors spells it: BF16, F32, U8, F8_E4M3, ... No data is read."""
        return self._slice(name).get_dtype()

    def read(self, name: str, *index: int | slice) -> "Tensor":
        """Return tensor[index], or the whole tensor, in memory of its own.

        Only these bytes are read from disk.
        """
        return self._slice(name)[index or ...].clone()

    def span(self, name: str, *index: int | slice) -> tuple[Span, tuple[slice, ...]]:
        """Return the shortest span that has all of tensor[index], and the index of that within the span's tensor.

        The second is () where the span holds nothing else. index: numbers first, then slices without a step. No data
        is read. Raises ValueError for a number beyond the tensor's size.
        """
        self._slice(name)  # which refuses a tensor that is not there and a file that is broken
        file = self._file_of[name]
        if file not in self._headers:
            self._headers[file] = _read_header(self.path / file)
        header = self._headers[file]
        entry = header.tensors[name]
        begin, end = entry["data_offsets"]
        whole = Span(header.path, header.size + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
        try:
            return part_of(whole, index)
        except IndexError as error:
            raise ValueError(
                f"{self.path / file}: {name} {list(whole.shape)} has no part {index}; {_AGAIN}"
            ) from error

    def _slice(self, name: str) -> Any:  # safetensors does not export the type
        """Return safetensors' handle of a tensor, whose data is not read yet."""
        if name not in self._file_of:
            raise ValueError(f"{self.path}: has no tensor {name}; {_AGAIN}")
        file = self._file_of[name]
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path / file}: lacks {name}, which {INDEX} promises; {_AGAIN}") from error

    def _handle(self, file: str) -> safe_open:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework=self._framework)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file}: broken or cut short ({error}); {_AGAIN}") from error
        return self._open[file]

    def _index(self) -> dict[str, str]:
        """Return the file name of every tensor name."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such checkpoint directory")
        if (self.path / INDEX).is_file():
            return self._read_index()
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.path}: holds no *.safetensors files")
        return {name: file for file in files for name in self._handle(file).keys()}  # noqa: SIM118 (no __iter__)

    def _read_index(self) -> dict[str, str]:
        file_of = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(file_of, dict):
            raise ValueError(f"{self.path / INDEX}: has no weight_map; {_AGAIN}")
        for file in sorted(set(file_of.values())):
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file}: missing, though {INDEX} names it; {_AGAIN}")
        return file_of


def part_of(span: Span, index: tuple[int | slice, ...]) -> tuple[Span, tuple[slice, ...]]:
    """Return the shortest span within a span that has all of tensor[index], see TensorFiles.span.

    Raises IndexError for an index that the shape does not have.
    """
    if len(index) > len(span.shape):
        raise IndexError(f"{len(index)} indices for the shape {span.shape}")
    if not index or all(one == slice(None) for one in index):
        return span, ()
    first, *others = index
    length, shape = span.shape[0], span.shape[1:]
    row_bytes = span.size // length if length else 0
    if isinstance(first, int):
        if not 0 <= first < length:
            raise IndexError(f"{first} is not below {length}")
        row = span._replace(offset=span.offset + first * row_bytes, size=row_bytes, shape=shape)
        return part_of(row, tuple(others))
    start, stop, _ = first.indices(length)
    num_rows = max(0, stop - start)
    rows = span._replace(
        offset=span.offset + start * row_bytes, size=num_rows * row_bytes, shape=(num_rows, *shape)
    )
    columns = tuple(one for one in others if isinstance(one, slice))
    assert len(columns) == len(others), "numbers come before slices"
    return rows, () if all(one == slice(None) for one in columns) else (slice(None), *columns)


class _Header(NamedTuple):
    """The header of the *.safetensors file at this path: its size in bytes, and what it says of each tensor."""

    path: Path
    size: int
    tensors: dict[str, Any]


def _read_header(path: Path) -> _Header:
    """Read the header of a file that safetensors has opened, and so checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _Header(path, 8 + length, json.loads(file.read(length)))


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ValueError if the file is not one JSON object."""
    try:
        value = json.loads(file.read_text())
    except ValueError as error:  # also raised for text that is not UTF-8
        raise ValueError(f"{file}: not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds no JSON object; {_AGAIN}")
    return value


_AGAIN = "download the checkpoint again"
