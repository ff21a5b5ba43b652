"""Reads the header of a GGUF file, llama.cpp's format: what it says of the model, and where each tensor lies.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is read here and not by the gguf package, whose
reader makes an array of every string: 3 s for a vocabulary of 49,152 tokens, where this takes a tenth of a second. The
bytes stay in the mapped file until a tensor is used. Imports no torch, so that `text/` can read the vocabulary.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".gguf"
VERSIONS = (2, 3)
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # of a model that is split into several files
STRING, ARRAY, FLOAT32 = 8, 9, 6
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in the file.

    Attributes:
        type_name: ggml's name of how its numbers are stored: "F32", "Q4_K", …
        shape: PyTorch's order; GGUF writes the last dimension first.
        data: its bytes in the mapped file.
    """

    type_name: str
    shape: tuple[int, ...]
    data: "np.ndarray"


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The metadata, key by key as in the file, and the tensors of all its parts by GGUF's names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class Strings(Sequence[str]):
    """An array of strings in the file: found at once, decoded when it is read, since a vocabulary is large."""

    def __init__(self, blob: memoryview, places: list[tuple[int, int]]) -> None:
        self._blob, self._places = blob, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        start, end = self._places[i]
        return str(self._blob[start:end], "utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return (str(self._blob[start:end], "utf-8", "replace") for start, end in self._places)


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def gguf_in(folder: Path) -> Path | None:
    """The GGUF model of a folder that holds nothing else to load, and one such model only."""
    files = ggufs_in(folder)
    return files[0] if len(files) == 1 and not (folder / "config.json").exists() else None


def ggufs_in(folder: Path) -> list[Path]:
    """The GGUF files of a folder, of a split model the first."""
    return sorted(file for file in folder.glob(f"*{SUFFIX}") if is_first_part(file))


def is_first_part(file: Path) -> bool:
    part = PART.search(file.name)
    return part is None or int(part[1]) == 1


def read_gguf(path: Path) -> GGUFFile:
    """Read a file's header, and those of the further files if the model is split.

    Raises:
        FileNotFoundError: a file of a split model is missing.
        OSError: a file is no GGUF file, or is damaged or cut off.
        ValueError: its version or one of its types is unknown, or it is not the first file of a split model.
    """
    part = PART.search(path.name)
    if part is None:
        return _read_part(path)
    if int(part[1]) != 1:
        raise ValueError(f"{path} is part {int(part[1])} of {int(part[2])}: give the first part, the others are found")
    first = _read_part(path)
    for number in range(2, int(part[2]) + 1):
        file = path.with_name(f"{path.name[: part.start()]}-{number:05d}-of-{part[2]}{SUFFIX}")
        if not file.is_file():
            raise FileNotFoundError(f"{file.name} is missing in {path.parent}: the model is split into {int(part[2])}")
        tensors = _read_part(file).tensors
        twice = tensors.keys() & first.tensors.keys()
        if twice:
            raise ValueError(f"tensor {min(twice)!r} of {file} is in an earlier part too")
        first.tensors.update(tensors)
    return first


def _read_part(path: Path) -> GGUFFile:
    if path.stat().st_size < 24:
        raise OSError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes")
    import numpy as np  # here: to import this module, as the engine does, takes no numpy

    # Copy on write, for PyTorch warns of tensors it may not write; a plain array, for each view of a memmap costs more.
    blob = np.asarray(np.memmap(path, dtype=np.uint8, mode="c"))
    if bytes(blob[:4]) != b"GGUF":
        raise OSError(f"{path} is not a GGUF file: it begins with {bytes(blob[:4])!r}")
    try:
        return _parse(path, blob)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise OSError(f"{path} is damaged, or cut off in its header: {error}") from error


def _parse(path: Path, blob: "np.ndarray") -> GGUFFile:
    import gguf

    reader = _Reader(memoryview(blob))
    version, num_tensors, num_keys = reader.numbers("IQQ", start=4)
    if version not in VERSIONS:
        raise ValueError(f"{path} has version {version:#x} of GGUF: {' and '.join(map(str, VERSIONS))} are read")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.string()
        metadata[key] = reader.value(f"{path}: {key}")
    entries = []
    for _ in range(num_tensors):
        name = reader.string()
        (num_dims,) = reader.numbers("I")
        shape = reader.numbers(f"{num_dims}Q")[::-1]
        entries.append((name, shape, *reader.numbers("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise OSError(f"{path} is damaged: general.alignment={alignment!r:.80}")
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        try:
            kind = gguf.GGMLQuantizationType(type_id)
        except ValueError:
            raise ValueError(f"tensor {name!r} in {path} has the unknown type {type_id} of ggml") from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block_size or name in tensors:
            raise OSError(f"{path} is damaged: tensor {name!r} is there twice, or its shape {list(shape)} is wrong")
        start = data_start + offset
        end = start + prod(shape) // block_size * block_bytes
        if end > len(blob):
            raise OSError(f"{path} is cut off: tensor {name!r} ends at byte {end}, the file at {len(blob)}")
        tensors[name] = GGUFTensor(kind.name, shape, blob[start:end])
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """Takes values one after the other."""

    def __init__(self, blob: memoryview) -> None:
        self.blob = blob
        self.position = 0

    def numbers(self, layout: str, start: int | None = None) -> tuple[Any, ...]:
        layout = f"<{layout}"
        self.position = self.position if start is None else start
        values = struct.unpack_from(layout, self.blob, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        ((start, end),) = self.places_of_strings(1)
        return str(self.blob[start:end], "utf-8")

    def places_of_strings(self, count: int) -> list[tuple[int, int]]:
        places, end = [], self.position
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = end + 8
            end = start + length_at(self.blob, end)[0]
            places.append((start, end))
        if end > len(self.blob):
            raise IndexError(f"a string ends at byte {end}, the file at {len(self.blob)}")
        self.position = end
        return places

    def value(self, name: str) -> Any:
        (kind,) = self.numbers("I")
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            (number,) = self.numbers(NUMBERS[kind])
            import numpy as np

            # The shortest decimal of this float32: 1e-05, as the model's config.json had it, not 9.999999747378752e-06.
            return float(str(np.float32(number))) if kind == FLOAT32 else number
        if kind != ARRAY:
            raise ValueError(f"{name} has the unknown type {kind}")
        kind, length = self.numbers("IQ")
        if kind == STRING:
            return Strings(self.blob, self.places_of_strings(length))
        if kind not in NUMBERS:
            raise ValueError(f"{name} is an array of type {kind}, which is not read")
        return list(self.numbers(f"{length}{NUMBERS[kind]}"))
