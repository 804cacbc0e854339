"""Rows and JSON as files."""

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exo_fast.training.errors import InputError, differences
from exo_fast.training.files import write_file
from exo_fast.version import __version__

NUMBERS = re.compile(r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]")
PARTIAL, SUMMARY = ".partial", "summary.json"


def is_main_process() -> bool:
    """Whether this process is the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def write_rows(config: Any, files: dict[str, list[Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Write lists of rows to `config.output_dir` by file name, and summary.json; returns the summary with what both
    stand for. Of several processes, which all have the same rows, the first writes.

    Raises InputError, before anything is written, where one of the files is there with other content.
    """
    folder = Path(config.output_dir).expanduser()
    content = {name: to_json(rows) for name, rows in files.items()}
    settings = {name: value for name, value in asdict(config).items() if name not in ("output_dir", "disable_tqdm")}
    whole = {
        **summary,
        "config": settings,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
        "version": __version__,
    }
    if is_main_process():
        for name, data in content.items():
            if (folder / name).is_file() and (folder / name).read_bytes() != data:
                raise InputError(
                    f"output_dir={config.output_dir!r}: holds another {name}{_changes(folder / SUMMARY, settings)}; "
                    "choose another output_dir, or delete that one to write it again."
                )
        for name, data in (content | {SUMMARY: to_json(whole)}).items():
            # A training that is to continue takes a file of another time for another file.
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                write_file(folder, name, data)
    return whole


def _changes(path: Path, settings: dict[str, Any]) -> str:
    """Say how the settings differ from those in the summary at `path`, for an error's text."""
    try:
        changed = differences(json.loads(path.read_text(encoding="utf-8"))["config"], settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" ({changed})" if changed else ", made from other data"


def to_json(value: Any) -> bytes:
    """JSON as every data file is written: indented, characters as they are, a newline at the end.

    A list of whole numbers (token ids) stands on one line. Strings hold no line breaks in JSON, so none is touched.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return (NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n").encode()
