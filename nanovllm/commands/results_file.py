"""A file of results that survives a crash: a line for each line of the input, written as soon as it is known.

Each result has its input line's index, and a hash of that line and of what else decides the answer. So a later run
knows which lines are finished, and notices that the input is another. Only the last line can be torn, when a run is
killed while writing it: the next run cuts it off.
"""

import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

BEGINNING = b'{"index": '
FURTHEST = 1_000_000  # no run gets that far ahead of its first unfinished line


class Line(NamedTuple):
    """A line of the input."""

    index: int  # blank lines count
    hash: int
    content: bytes


def number_lines(contents: Iterable[bytes], key: bytes) -> Iterator[Line]:
    """The lines that are not blank.

    Args:
        key: at most 64 bytes, which the hash depends on as it does on the line.
    """
    for index, content in enumerate(contents):
        if content.strip():
            digest = blake2b(content.rstrip(b"\r\n"), digest_size=8, key=key).digest()
            yield Line(index, int.from_bytes(digest, "big"), content)


class ResultsFile:
    """The results of this run, behind those of earlier runs. `with` closes the file.

    Args:
        path: None: stdout, where there are no earlier runs.

    Raises:
        ValueError: another process has the file open, or it has something else in it; then it stays as it is.
    """

    def __init__(self, path: Path | None) -> None:
        self.name = "stdout" if path is None else str(path)
        self.num_errors = 0  # lines with "error", of all runs
        self._hashes = array("Q")  # of the finished lines, by index; 0: not finished
        self._file: IO[bytes] = sys.stdout.buffer if path is None else path.open("a+b")
        if path is not None:
            try:
                self._lock()
                self._read()
            except BaseException:
                self._file.close()
                raise

    def unfinished(self, lines: Iterable[Line]) -> Iterator[Line]:
        """The lines without a result.

        Raises:
            ValueError: a result is of another line, or of a line that is not there.
        """
        end = 0
        for line in lines:
            end = line.index + 1
            known = self._hashes[line.index] if line.index < len(self._hashes) else 0
            if known not in (0, line.hash):
                raise ValueError(
                    f"{self.name} has a result for line {line.index}, but not for what it asks now: the line, the "
                    "model or the sampling parameters have changed; give the old ones, or another --output"
                )
            if not known:
                yield line
        if any(self._hashes[end:]):
            raise ValueError(f"{self.name} has results for more lines than the input has: give another --output")

    def write(self, line: Line, record: dict[str, Any]) -> None:
        """Append a line's result, and hand it to the operating system."""
        record = {"index": line.index, "hash": f"{line.hash:016x}", **record}
        try:
            content = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a character, which JSON can spell and UTF-8 cannot
            content = json.dumps(record).encode()
        self._file.write(content + b"\n")
        self._file.flush()
        self.num_errors += "error" in record

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()

    def _lock(self) -> None:
        with suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is writing {self.name}: wait for it, or give another --output"
                ) from (error)

    def _read(self) -> None:
        """Read earlier runs' results, and cut off a torn last line."""
        self._file.seek(0)
        end = 0
        for number, content in enumerate(self._file):
            if content.endswith(b"\n"):
                self._take(number, content)
                end += len(content)
            elif not content.startswith(BEGINNING[: len(content)]):
                raise ValueError(self._foreign(number))
        self._file.truncate(end)

    def _take(self, number: int, content: bytes) -> None:
        try:
            record = json.loads(content)
            index, line_hash = record["index"], int(record["hash"], 16)
            if not 0 <= index < len(self._hashes) + FURTHEST:
                raise ValueError(index)
            self._hashes.extend([0] * (index + 1 - len(self._hashes)))
            self._hashes[index] = line_hash
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(self._foreign(number)) from error
        self.num_errors += "error" in record

    def _foreign(self, number: int) -> str:
        return f"line {number} of {self.name} is no result of this command: give another --output"
