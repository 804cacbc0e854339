"""The end of an `exo-fast` process."""

import sys

import pytest
from killing import run

SCRIPT = """
import atexit, socket, sys
import torch
import torch.distributed as dist
from exo_fast.training import cli
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
