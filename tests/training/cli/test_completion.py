"""Completion, in a real bash: stages, options, choices and file names, from the stages' own parsers."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exo_fast.training.cli import completion
from exo_fast.training.cli.command import STAGES, main
from exo_fast.training.cli.installed import command_for

shtab = pytest.importorskip("shtab", reason="pip install 'exo_fast[completion]'")

# Completes the last of the words it is given, as bash does when Tab is pressed, and prints what is offered.
PRESS_TAB = r"""
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=$((${#COMP_LINE}))
function=$(complete -p exo-fast | sed -E 's/.* -F ([^ ]+).*/\1/')
"$function" "$1" "${@: -1}" "${@: -2:1}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def parser() -> completion.argparse.ArgumentParser:
    return completion.whole_parser()


@pytest.fixture(scope="module")
def script(parser: completion.argparse.ArgumentParser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "exo-fast.bash"
    path.write_text(shtab.complete(parser, shell="bash"))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("al", {"align"}),
        ("", {*STAGES}),
        ("--js", {"--json"}),
        ("align --loss_t", {"--loss_type"}),
        ("align --loss_type ", {"exo-pref", "exo-rw", "dpo-pref", "dpo-rw"}),
        ("align --loss_type dpo", {"dpo-pref", "dpo-rw"}),
        ("align --data d --learning_r", {"--learning_rate"}),
        ("align --torch_compile_b", {"--torch_compile_backend"}),
        ("align --deb", {"--debug"}),
        ("align --config my", {"my.yaml"}),
        ("align --output_dir fol", {"folder"}),
        ("prepare --js", {"--json"}),
        ("run my", {"my.yaml"}),
        ("run my.yaml --re", {"--redo"}),
        ("recipes s", {"show"}),
        ("recipes show im", {"imdb"}),
        ("bench st", {"step"}),
        ("bench op --qu", {"--quick"}),
        ("memory --engine ", {"deepspeed", "torch"}),
        ("completion z", {"zsh"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bash_offers(script: Path, words: str, offered: set[str], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folio").touch()  # no directory
    command = ["bash", "--norc", "-c", PRESS_TAB, "bash", str(script), "exo-fast", *words.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=30, check=True)
    found = set(done.stdout.split())
    assert done.stderr == ""
    assert found >= offered if words == "" else found == offered


def test_every_field_of_every_stage_is_completed_in_one_spelling(parser: completion.argparse.ArgumentParser) -> None:
    (stages,) = (action for action in parser._actions if action.dest == "stage")
    assert stages.choices.keys() == STAGES.keys()
    for name, stage in STAGES.items():
        options = [word for action in stages.choices[name]._actions for word in action.option_strings]
        assert {"--json", "--debug"} <= set(options)
        assert len(options) == len(set(options))
        if stage.config is not None:
            fields = {f"--{field.name}" for field in dataclasses.fields(stage.config_class()) if field.init}
            assert fields <= set(options)
            assert not {field.replace("_", "-") for field in fields if "_" in field} & set(options)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_of_all_shells_name_the_stages(shell: str, parser: completion.argparse.ArgumentParser) -> None:
    script = shtab.complete(parser, shell=shell)
    assert all(word in script for word in ("reward-model", "exo-rw", "loss_type"))
    if shutil.which(shell) is not None and shell in ("bash", "zsh", "fish"):
        check = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=30)
        assert (check.returncode, check.stderr) == (0, "")


def test_without_shtab_the_command_that_adds_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert f"not installed: {command_for('shtab')}\n" in capsys.readouterr().err


def test_help_says_where_the_script_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["completion", "--help"])
    text = capsys.readouterr().out
    assert all(f"exo-fast completion {shell} > ~/" in text for shell in completion.SHELLS)
