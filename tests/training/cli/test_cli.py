"""The command line itself: how a process ends, what it says on which stream, and --json and --debug."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import environment, run

from exo_fast.training import terminal
from exo_fast.training.cli import command as cli
from exo_fast.training.cli.command import _take_flags, main

CLI = [sys.executable, "-m", "exo_fast.training.cli"]

SCRIPT = """
import atexit, socket, sys
import torch
import torch.distributed as dist
from exo_fast.training.cli import command as cli
from exo_fast.training.errors import InputError

class Remains:
    def __del__(self):
        print("taken apart")

def run_stage(name, argv):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    cli.kept = dist.group.WORLD, Remains()  # DeepSpeed keeps the group too
    atexit.register(print, "finished")
    for _ in range(5000):
        dist.all_reduce(torch.zeros(1000), async_op=True)
    if argv:
        raise {"wrong": InputError("no such thing"), "exit": SystemExit(3)}[argv[0]]
    return 0

cli.run_stage = run_stage
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("words", "status"), [([], 0), (["wrong"], 2), (["exit"], 3)])
def test_a_process_with_collectives_under_way_ends_in_order(words: list[str], status: int) -> None:
    done = run([sys.executable, "-c", SCRIPT, "sft", *words])
    assert done.returncode == status, done.stderr  # SIGABRT where the interpreter is taken apart under gloo's threads
    assert done.stdout == "finished\n"
    assert ("error: no such thing" in done.stderr) == (words == ["wrong"])


# A stage of our own, in a module of its own: `{body}` is what it does when it is imported or called.
STAGE = """
import sys
from exo_fast.training.cli import command as cli
cli.STAGES["mine"] = cli.Stage("of this test", "exo_fast.mine", "main")
cli._import = lambda module: __import__("mine")
sys.exit(cli.main())
"""


def run_mine(folder: Path, body: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`exo-fast WORDS` where the stage `mine` is a module with this body."""
    (folder / "mine.py").write_text(body)
    command = [sys.executable, "-c", STAGE, *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=folder, env={**environment(), **(env or {})}
    )


# How errors end


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("from exo_fast.training.errors import InputError\ndef main(argv): raise InputError('x=1: no')", 2, "x=1: no"),
        ("from exo_fast.training.errors import RunError\ndef main(argv): raise RunError('disk full')", 1, "disk full"),
        ("def main(argv): return 1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import flash_attn_of_nowhere", 2, "flash_attn_of_nowhere is not installed: pip install 'flash-attn-of-now"),
    ],
    ids=["input", "run", "bug", "package"],
)
def test_errors_have_a_traceback_only_with_debug(tmp_path: Path, body: str, status: int, said: str) -> None:
    plain = run_mine(tmp_path, body, "mine")
    assert (plain.returncode, plain.stdout) == (status, "")
    assert plain.stderr.startswith("exo-fast mine: error: ")
    assert said in plain.stderr
    assert "Traceback" not in plain.stderr
    for words in (["--debug", "mine"], ["mine", "--debug"]):
        debugged = run_mine(tmp_path, body, *words)
        assert debugged.returncode == status
        assert debugged.stderr.startswith("Traceback")


def test_a_stop_by_sigterm_is_a_good_end_and_a_result(tmp_path: Path) -> None:
    body = "from exo_fast.training.errors import Stopped\ndef main(argv): raise Stopped('step 3 is saved')"
    plain = run_mine(tmp_path, body, "mine")
    assert (plain.returncode, plain.stdout) == (0, "exo-fast mine: step 3 is saved\n")
    asked = run_mine(tmp_path, body, "mine", "--json")
    assert (asked.returncode, json.loads(asked.stdout)) == (0, {"stopped": "step 3 is saved"})


@pytest.mark.parametrize("moment", ["{}", "def main(argv):\n    {}"], ids=["import", "run"])
def test_ctrl_c_is_130_without_a_traceback(tmp_path: Path, moment: str) -> None:
    interrupted = moment.format("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    done = run_mine(tmp_path, interrupted, "mine")
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("words", ["recipes list", "recipes list --json", "recipes --help", "--help"])
def test_a_reader_that_goes_away_is_no_error(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written: what `| head -1` does is a race
    env = environment()
    env.pop("PYTHONUNBUFFERED", None)  # with it argparse itself hears of it, and keeps it to itself
    command = [*CLI, *words.split()]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, env=env)
    finally:
        os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Error" not in done.stderr
    assert "--json" in words or done.stderr == ""


def test_a_pipe_that_breaks_elsewhere_is_an_error(tmp_path: Path) -> None:
    body = "import os\ndef main(argv):\n    r, w = os.pipe(); os.close(r); os.write(w, b'x')"
    done = run_mine(tmp_path, body, "mine")
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')")
    done = subprocess.run(
        [*CLI, "align", "--data", "x"], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 2
    assert done.stderr == "exo-fast align: error: pyyaml is not installed: pip install 'exo_fast[train]'\n"


def test_the_front_page_says_the_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {status:<5}" in text for status in (0, 1, 2, 130, 141))


# The page


def test_the_page_has_every_command_status_and_variable() -> None:
    root = Path(cli.__file__).resolve().parents[2]
    page = root / "docs" / "cli.md"
    if not page.is_file():
        pytest.skip("needs a checkout: the page is not installed")
    text = page.read_text(encoding="utf-8")
    examples = dict(re.findall(r"^\| `([a-z-]+)` \| S? ?\|.*`exo-fast (.+)` \|$", text, re.MULTILINE))
    assert examples.keys() == cli.STAGES.keys()
    assert all(example.split()[0] == name for name, example in examples.items())
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == {0, 1, 2, 130, 141}
    folders = ("exo_fast", "kernels", "training")
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in (root / folder).rglob("*.py")]
    names = {name for source in sources for name in re.findall(r'environ[^\n"]{0,20}"([A-Z_]{3,})"', source)}
    assert {"EXO_FAST_CACHE", "EXO_FAST_AUTOTUNE", "TRITON_INTERPRET"} <= names
    missing = names - {"PATH"} - set(re.findall(r"`([A-Z_]+)`", text))
    assert missing == set()


# --json and --debug


def test_flags_may_stand_after_the_stage_and_the_field_debug_is_kept() -> None:
    assert _take_flags(["--data", "x", "--json", "--debug"]) == ({"--json", "--debug"}, ["--data", "x"])
    assert _take_flags(["--debug", "underflow_overflow"]) == (set(), ["--debug", "underflow_overflow"])
    assert _take_flags(["--debug", "--data", "x"]) == ({"--debug"}, ["--data", "x"])


NOISE = """
import os, subprocess, sys
from exo_fast.training.terminal import give_result
def main(argv):
    print("of Python")
    sys.stdout.buffer.write(b"of bytes\\n")
    os.write(1, b"of a library\\n")
    subprocess.run(["echo", "of a child"])
    give_result({"loss": float("nan"), "gain": float("-inf"), "path": __import__("pathlib").Path("a/b"), "é": [1, 0.5]})
    return 1
"""


@pytest.mark.parametrize("words", [["--json", "mine"], ["mine", "--json"]])
def test_json_leaves_stdout_to_the_result(tmp_path: Path, words: list[str]) -> None:
    done = run_mine(tmp_path, NOISE, *words)
    assert done.returncode == 1  # a result may be a bad one
    assert json.loads(done.stdout) == {"loss": None, "gain": None, "path": "a/b", "é": [1, 0.5]}
    assert done.stdout.count("\n") == 1
    assert sorted(done.stderr.split("\n")[:-1]) == ["of Python", "of a child", "of a library", "of bytes"]
    plain = run_mine(tmp_path, NOISE, "mine")
    assert "of Python" in plain.stdout
    assert "null" not in plain.stdout


def test_of_several_processes_the_first_gives_the_result(tmp_path: Path) -> None:
    assert run_mine(tmp_path, NOISE, "mine", "--json", env={"RANK": "0"}).stdout.startswith('{"loss": null')
    assert run_mine(tmp_path, NOISE, "mine", "--json", env={"RANK": "1"}).stdout == ""


def test_json_of_a_stage_is_its_summary_and_a_pipe_gets_no_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    words = ["pref-to-rw", "--data", "data", "--output_dir", "out", "--json"]
    done = run([*CLI, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "written to out" in done.stderr
    assert "\x1b" not in done.stderr
    assert main([*words, "--output_dri", "x"]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert "did you mean '--output_dir'" in refused.err


def test_flags_are_no_keys_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("json: true\n")
    assert main(["pref-to-rw", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "line 1: unknown key 'json'." in capsys.readouterr().err


def test_json_of_the_commands_that_are_no_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert {"hh", "imdb"} <= {entry["name"] for entry in listed}
    assert main(["recipes", "show", "hh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("# Anthropic-HH")
    assert main(["recipes", "copy", "hh", str(tmp_path), "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["path"]).is_file()
    assert main(["bench", "op", "--list", "--quick", "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert cases[0]["case"].startswith("op/exo_fast/")
    assert {entry["skipped"] is None for entry in cases} >= {True}


def test_json_of_a_list_of_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text("[]")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"variables: {{output: {tmp_path / 'out'}}}\nstages:\n"
        f"  - {{name: a, stage: pref-to-rw, options: {{data: {tmp_path / 'data'}, output_dir: '${{output}}/a'}}}}\n"
        f"  - {{name: b, stage: pref-to-rw, options: {{data: '${{output}}/a', output_dir: '${{output}}/b'}}}}\n"
    )
    assert main(["run", str(recipe), "--list", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["stages"]
    assert (first["name"], first["state"], first["needs"]) == ("a", "to do", [])
    assert (second["stage"], second["needs"]) == ("pref-to-rw", ["a"])


# Colours


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    controller, screen = pty.openpty()
    with os.fdopen(screen, "w") as terminal_stream, open(os.devnull, "w") as file:
        assert terminal.paint("x", "red", terminal_stream) == "\x1b[31mx\x1b[0m"
        assert terminal.paint("x", "red", file) == "x"
        monkeypatch.setenv("TERM", "dumb")
        assert terminal.paint("x", "red", terminal_stream) == "x"
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert terminal.paint("x", "green", file) == "\x1b[32mx\x1b[0m"
        monkeypatch.setenv("NO_COLOR", "1")
        assert terminal.paint("x", "green", file) == terminal.paint("x", "red", terminal_stream) == "x"
    os.close(controller)


def test_an_error_is_red(tmp_path: Path) -> None:
    body = "def main(argv): raise ValueError('the end')"
    done = run_mine(tmp_path, body, "mine", env={"FORCE_COLOR": "1"})
    assert "exo-fast mine: \x1b[31merror:\x1b[0m ValueError: the end" in done.stderr
    assert "\x1b" not in run_mine(tmp_path, body, "mine").stderr


# Output that cannot be written

LONG_WORK = """
import sys
from pathlib import Path
def main(argv):
    print("begun", flush=True)
    print("warned", file=sys.stderr, flush=True)
    sys.stdout.buffer.write(b"bytes\\n")
    sys.stdout.buffer.flush()
    print("r\\xe9sultat \\u2713 \\udcff", flush=True)
    Path("saved").touch()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_characters_that_a_stream_has_no_bytes_for_end_no_run(tmp_path: Path, unbuffered: str) -> None:
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered}
    done = run_mine(tmp_path, LONG_WORK, "mine", env=env)
    assert (done.returncode, done.stdout) == (0, "begun\nbytes\nr\\xe9sultat \\u2713 \\udcff\n")
    assert (tmp_path / "saved").exists()
    body = "from exo_fast.training.terminal import give_result\ndef main(argv): give_result({'d': 'r\\xe9 \\udcff'})"
    asked = run_mine(tmp_path, body, "mine", "--json", env=env)
    assert (asked.returncode, json.loads(asked.stdout)) == (0, {"d": "r\xe9 \udcff"})


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("place", "status"), [("no reader", 141), ("/dev/full", 1), ("closed", 0)])
def test_output_that_is_lost_loses_no_work(tmp_path: Path, place: str, status: int, unbuffered: str) -> None:
    (tmp_path / "mine.py").write_text(LONG_WORK)
    if place == "no reader":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full" if place == "/dev/full" else os.devnull, os.O_WRONLY)
    command = [sys.executable, "-c", STAGE, "mine"]
    if place == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    env = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(command, stdout=writer, stderr=writer, timeout=60, cwd=tmp_path, env=env)
    finally:
        os.close(writer)
    assert done.returncode == status
    assert (tmp_path / "saved").exists()


def test_a_disk_that_is_full_under_stdout_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def main(argv): print('x')")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", STAGE, "mine"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert done.returncode == 1
    assert done.stderr == "exo-fast: what it printed is not all written: No space left on device\n"


def test_warnings_that_a_run_listens_to_are_shown_as_ever(tmp_path: Path) -> None:
    body = (
        "from exo_fast.training.reports import facts as run_facts\n"
        "import logging\n"
        "def main(argv):\n"
        "    with run_facts.heard_warnings() as heard:\n"
        "        logging.getLogger('exo_fast.mine').warning('a warning of ours')\n"
        "        logging.getLogger('transformers').warning('one of transformers')\n"
        "    print(heard)\n"
    )
    done = run_mine(tmp_path, body, "mine")
    assert done.stdout == "{'a warning of ours': 1, 'one of transformers': 1}\n"
    assert done.stderr.count("a warning of ours") == done.stderr.count("one of transformers") == 1
