"""Every command line of docs/distributed.md is one: the launcher's words, the stage's, and the estimates'."""

import re
import shlex

import pytest
from deepspeed.launcher import runner as deepspeed_launcher
from torch.distributed.run import get_args_parser
from tree import ROOT

from exo_fast.training.arguments import parse_config
from exo_fast.training.cli.command import STAGES
from exo_fast.training.memory import command as memory

PAGE = (ROOT / "docs" / "distributed.md").read_text()
LAUNCHERS = ("exo-fast", "torchrun", "deepspeed", "srun")


def commands() -> list[str]:
    """Lines of the page's bash blocks that start a stage, with their continuations."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, flags=re.M):
        text = text.replace(f"${name} ", f"{value} ")
    lines = text.splitlines()
    return [" ".join(line.split()) for line in lines if line.split(" ")[0] in LAUNCHERS]


def stage_words(command: str) -> list[str]:
    """The stage and its options, after the launcher has accepted its own."""
    words = shlex.split(command, comments=True)
    if words[0] == "srun":
        words = words[1:]
    program, *rest = words
    if program == "exo-fast":
        return rest
    if program == "torchrun":
        found = get_args_parser().parse_args(rest)
        module, rest = found.training_script, found.training_script_args
    else:
        found = deepspeed_launcher.parse_args(rest)
        module, rest = found.user_script, found.user_args
    assert found.module
    assert module == "exo_fast.training.cli"
    return rest


def alone(words: list[str], command: str) -> list[str]:
    """The words without --sequence_parallel, which must divide the launcher's processes, of which a test has one."""
    if "--sequence_parallel" not in words:
        return words
    at = words.index("--sequence_parallel")
    processes = re.search(r"--nproc-per-node (\d+)", command)[1]
    assert int(processes) % int(words[at + 1]) == 0
    return words[:at] + words[at + 2 :]


def test_the_page_has_a_line_for_each_launcher() -> None:
    assert {command.split()[0] for command in commands()} == set(LAUNCHERS)


@pytest.mark.parametrize("command", commands())
def test_command_lines_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stage, *words = stage_words(command)
    if stage == "memory":
        assert memory.parser().parse_args(words).device == "cuda"
    else:
        config = parse_config(STAGES[stage].config_class(), alone(words, command))
        assert config.output_dir
