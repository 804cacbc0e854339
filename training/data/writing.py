"""Write rows and JSON to files."""

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
    """Check whether this process is the only one, or rank 0 of a launcher's processes."""
    return os.environ.get("RANK", "0") == "0"


def write_rows(config: Any, files: dict[str, list[Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Write lists of rows to `config.output_dir` by file name, and summary.json. All ranks have the same rows; rank 0
    writes. Returns the summary with the config, the files' sha256 and the version.

    Raises InputError, before anything is written, if one of the files exists with other content.
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
            # A training that continues takes a file with a new time for another file.
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
    """Return the JSON of a data file: indented, characters as they are, a newline at the end.

    A list of whole numbers (token ids) fills one line. JSON strings hold no line breaks, so no string is changed.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return (NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n").encode()
