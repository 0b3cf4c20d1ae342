"""The tensors of a checkpoint directory, by name, whichever *.safetensors file holds them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


class TensorFiles:
    """Opens each file when it is first needed and keeps it mapped until close(). For one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, safe_open] = {}
        self._file_of = self._index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        """Every tensor's name, file by file, so that reading in this order goes through each file once."""
        return iter(sorted(self._file_of, key=lambda name: (self._file_of[name], name)))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def close(self) -> None:
        """Unmap the files. Tensors that were read stay valid."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header, as dtype(): reads no data."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: BF16, F32, U8, F8_E4M3, ..."""
        return self._slice(name).get_dtype()

    def read(self, name: str, *index: int | slice) -> Tensor:
        """tensor[index], or the whole tensor, in memory of its own. Only these bytes are read from disk."""
        return self._slice(name)[index or ...].clone()

    def _slice(self, name: str) -> Any:  # safetensors does not export the type
        """A tensor whose data has not been read."""
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
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file}: broken or cut short ({error}); {_AGAIN}") from error
        return self._open[file]

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such checkpoint directory")
        if (self.path / INDEX).is_file():
            return self._read_index()
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.path}: holds no *.safetensors files")
        return {name: file for file in files for name in self._handle(file).keys()}  # noqa: SIM118 (no __iter__)

    def _read_index(self) -> dict[str, str]:
        file_of: dict[str, str] = read_json(self.path / INDEX)["weight_map"]
        for file in sorted(set(file_of.values())):
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file}: missing, though {INDEX} names it; {_AGAIN}")
        return file_of


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError if the file is not valid JSON."""
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); {_AGAIN}") from error


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], *, file_bytes: int) -> None:
    """Write model files of at most `file_bytes` (unless one tensor is larger), and an index if they are several.

    Holds one file's tensors in memory at a time. Tensors must be contiguous and share no memory.
    """
    names_of_file: list[list[str]] = []
    total_bytes = 0
    for batch in _batches(tensors, file_bytes=file_bytes):
        part = path / f"{len(names_of_file)}.part"
        save_file(batch, part, metadata={"format": "pt"})
        part.chmod(path.stat().st_mode & 0o666)  # safetensors lets only the owner read
        names_of_file.append(list(batch))
        total_bytes += sum(tensor.nbytes for tensor in batch.values())
    count = len(names_of_file)
    if count == 1:
        (path / "0.part").rename(path / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(names_of_file):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (path / f"{number}.part").rename(path / file)
        weight_map.update(dict.fromkeys(names, file))
    (path / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)
    )


def _batches(tensors: Iterable[tuple[str, Tensor]], *, file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Each is emptied when the next is asked for, so that the two are never in memory together."""
    batch: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if batch and num_bytes + tensor.nbytes > file_bytes:
            yield batch
            batch.clear()
            num_bytes = 0
        batch[name] = tensor
        num_bytes += tensor.nbytes
    yield batch


_AGAIN = "download the checkpoint again"
