"""Writing the *.safetensors files of a new checkpoint."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from experts.checkpoint.tensor_files import INDEX


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], *, file_bytes: int) -> None:
    """Write model files of at most `file_bytes` (unless one tensor is larger), and an index if they are several.

    The tensors of one file are in memory at a time. They must be contiguous and share no memory.
    """
    names_of_file: list[list[str]] = []
    total_bytes = 0
    for batch in _batches(tensors, file_bytes=file_bytes):
        part = path / f"{len(names_of_file)}.part"
        save_file(batch, part, metadata={"format": "pt"})
        part.chmod(path.stat().st_mode & 0o666)  # safetensors writes files that only the owner may read
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
    """Yield the tensors of one file at a time.

    A batch is emptied when the next is asked for: only one is in memory.
    """
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
