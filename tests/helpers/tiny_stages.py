"""A command line with stages that take no time, for tests of `run`: they write, wait, fail and count."""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from exo_fast.training.errors import InputError


@dataclass
class MakeConfig:
    """Fields of a stage that writes `text` and the contents of `data` to output_dir/made.txt after `wait` seconds."""

    output_dir: str
    data: list[str] = field(default_factory=list)
    eval_data: str | None = None
    model: str | None = None
    text: str = "x"
    rate: float = 0.5
    seed: int = 7
    wait: float = 0.0
    fail_unless: str | None = None
    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {"all": ("output_dir",)}

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise InputError(f"rate={self.rate}: at most 1 is needed.")
        for path in self.data:
            if path.startswith("/") and not Path(path).exists():
                raise InputError(f"data={path!r}: no such file.")


def make(config: MakeConfig) -> None:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "attempts.txt").open("a") as file:
        file.write("begun\n")
    print(f"making {config.output_dir}", flush=True)
    time.sleep(config.wait)
    if config.fail_unless is not None and not Path(config.fail_unless).exists():
        print("the cause", file=sys.stderr)
        raise SystemExit(3)
    read = "".join(Path(path, "made.txt").read_text() for path in config.data)
    (folder / "made.txt").write_text(f"{read}{config.text} {config.seed}\n")


class Stage(NamedTuple):
    config: str | None

    def config_class(self) -> type:
        return MakeConfig


STAGES: dict[str, Any] = {"make": Stage("MakeConfig"), "show": Stage(None)}

if __name__ == "__main__":
    values = yaml.safe_load(Path(sys.argv[3]).read_text())
    make(MakeConfig(**{f.name: values[f.name] for f in dataclasses.fields(MakeConfig) if f.name in values}))
