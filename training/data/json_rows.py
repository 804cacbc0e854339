"""Read records from files, each with the place it came from.

A record is whatever one row of the file holds; `examples.py` judges it. Every record keeps its file, row and
(for text formats) line, because an error that cannot be found in an editor is not worth printing. Text is read
row by row, so a file may be larger than memory. A row may not: input that never ends (a stream of spaces in a small
.gz, a list in a list in a list …) is refused after MAX_ROW_BYTES.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from exo_fast.training.data.places import Place
from exo_fast.training.errors import InputError

JSON_SPACE = " \t\n\r"
MAX_ROW_BYTES = 64 * 2**20  # 16 million tokens
MAX_NESTING = 100  # lists and objects in one another; Python's own functions stop at less than a thousand
BLOCK_BYTES = 2**20
LONGEST_TOKEN = 16  # longer than -Infinity or an escape: an error so near to the end may mean that the rest is missing
_BLANK = re.compile(f"[{JSON_SPACE}]*")
_DECODER = json.JSONDecoder()
# Halves of surrogate pairs; and matches that are not halves: an escaped backslash, and a whole pair.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_WHOLE = re.compile(r"\\\\|\\u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


class JsonLine(str):
    """A line of a JSONL file, not yet decoded, so that a broken line does not hide the next."""

    def decoded(self) -> Any:
        """Return its value. Raises JSONDecodeError as decode_json does."""
        start = len(self) - len(self.lstrip(JSON_SPACE))
        value, end = decode_json(self, start)
        if rest := self[end:].strip(JSON_SPACE):
            raise json.JSONDecodeError("Extra data", self, self.index(rest, end))
        return value


# JSON


def decode_json(text: str, position: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at `position`, and where it ends.

    Raises JSONDecodeError, also for values that `json` accepts (or raises another error for) and later code could not
    use: half a surrogate pair, nesting beyond MAX_NESTING, or a whole number with more digits than Python converts.
    """
    try:
        value, end = _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise json.JSONDecodeError(f"nested deeper than {MAX_NESTING} levels", text, position) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError("a number of thousands of digits", text, position) from error
    # Counting brackets costs little, and few rows have so many.
    if text.count("[", position, end) + text.count("{", position, end) > MAX_NESTING and _is_deep(value):
        raise json.JSONDecodeError(f"nested deeper than {MAX_NESTING} levels", text, position)
    if _HALF.search(text, position, end) and _HALF.search(_WHOLE.sub(" ", text[position:end])):
        raise json.JSONDecodeError("half a surrogate pair, which is no character", text, position)
    return value, end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        inside = (item for v in level for item in (v.values() if isinstance(v, dict) else v))
        level = [item for item in inside if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def read_json(path: Path) -> Any:
    """Return the value of a small JSON file. Raises InputError if it is not JSON, or larger than MAX_ROW_BYTES."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ROW_BYTES + 1)
        if len(content) > MAX_ROW_BYTES:
            raise InputError(f"{path}: more than {MAX_ROW_BYTES >> 20} MiB, which is not what such a file holds.")
        return JsonLine(content.decode("utf-8-sig")).decoded()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error.start) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.") from error


def read_json_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            blocks = (file.read(BLOCK_BYTES) for _ in range(MAX_ROW_BYTES // BLOCK_BYTES))
            stripped = (block.removeprefix(codecs.BOM_UTF8).lstrip(JSON_SPACE.encode()) for block in blocks)
            is_list = next(filter(None, stripped), b"").startswith(b"[")
            file.seek(0)
            yield from _read_json_list(path, file) if is_list else _read_json_lines(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file: {error}; fetch it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error


def _read_json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[Place, JsonLine]]:
    row, start, number = 0, 0, 0
    # Not text.splitlines(): it also cuts at characters, such as U+2028, that a JSON string may hold.
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(path, number)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, start + error.start) from error
        start += len(line)
        if text.strip():
            yield Place(str(path), row, number), JsonLine(text.rstrip("\r\n"))
            row += 1


def _read_json_list(path: Path, file: IO[bytes]) -> Iterator[tuple[Place, Any]]:
    text = _Text(path, file)
    text.position = text.skip_space() + 1  # the [
    row = 0
    while text.at(text.skip_space()) != "]":
        line, record = text.value(f"row {row}")
        yield Place(str(path), row, line), record
        row += 1
        if (mark := text.at(text.skip_space())) == ",":
            text.position += 1
        elif mark != "]":
            raise text.fail(f"not valid JSON: a comma or ] is needed after row {row - 1}")
    text.position += 1
    if text.at(text.skip_space()):
        raise text.fail("text after the list's closing ]; one JSON list is needed")


class _Text:
    """A file's text from `position` on, as far as it has been read: `json` decodes only complete values."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position = "", 0
        self.line, self.counted = 1, 0  # the line of the position `counted`
        self.bytes_read, self.ended = 0, False

    def more(self) -> bool:
        """Read at least a block, or as much as is waiting already. Returns False at the end of the file."""
        if self.ended:
            return False
        waiting = len(self.text) - self.position
        if waiting > MAX_ROW_BYTES:
            raise _too_long(self.path, self.line_at(self.position))
        block = self.file.read(max(BLOCK_BYTES, waiting))
        self.ended = not block
        held = len(self.decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            fresh = self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line_at(len(self.text)) + block[: max(error.start - held, 0)].count(b"\n")
            raise _not_utf8(self.path, line, self.bytes_read - held + error.start) from error
        self.bytes_read += len(block)
        self.line_at(self.position)
        self.text, self.position, self.counted = self.text[self.position :] + fresh, 0, 0
        return True

    def line_at(self, position: int) -> int:
        """Return the line of `position`, which may not lie before the position of an earlier call."""
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def at(self, position: int) -> str:
        return self.text[position : position + 1]

    def skip_space(self) -> int:
        """Move `position` to the next character that is not white space (or the end), and return it."""
        while True:
            self.position = _BLANK.match(self.text, self.position).end()
            if self.position < len(self.text) or not self.more():
                return self.position

    def value(self, what: str) -> tuple[int, Any]:
        """Return the line of the value that begins at `position`, and the value; moves to its end."""
        while True:
            try:
                value, end = decode_json(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_TOKEN
                if cut and self.more():
                    continue
                self.position = error.pos
                raise self.fail(f"not valid JSON: {error.msg} ({what})") from error
            if end == len(self.text) and self.more():  # a number may go on in the next block
                continue
            line = self.line_at(self.position)
            self.position = end
            return line, value

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.path}, line {self.line_at(self.position)}: {problem}.")


def _too_long(path: Path, line: int) -> InputError:
    return InputError(
        f"{path}, line {line}: a row of more than {MAX_ROW_BYTES >> 20} MiB; one JSON list of rows, or one row on each "
        "line (JSONL), is needed."
    )


def _not_utf8(path: Path, line: int, byte: int) -> InputError:
    return InputError(f"{path}, line {line}: not UTF-8 text (byte {byte}); convert the file to UTF-8.")


# Binary formats
