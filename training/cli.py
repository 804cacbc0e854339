"""`exo-fast STAGE ...`: the command line of all stages.

Stages are imported when called, so that `exo-fast --help` is instant and needs none of the training
dependencies. Started by torchrun or deepspeed it runs the same: `torchrun --nproc-per-node 2 -m
exo_fast.training.cli align …`.
"""

import argparse
import atexit
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from exo_fast.training.errors import InputError, RunError, Stopped
from exo_fast.version import __version__


@dataclass(frozen=True)
class Stage:
    """Where a stage's code is. With a config class, `function(config)`; without, `function(argv)` parses for itself."""

    summary: str
    module: str  # relative to exo_fast.training, or from exo_fast
    function: str
    config: str | None = None  # "module:Class" or "Class" of the same module

    def config_class(self) -> type:
        """The dataclass of the stage's fields."""
        module, _, name = self.config.rpartition(":")
        return getattr(_import(module or self.module), name)

    def code(self) -> ModuleType:
        """The module with the stage's function."""
        return _import(self.module)


def _import(module: str) -> ModuleType:
    return importlib.import_module(module if module.startswith("exo_fast.") else f"exo_fast.training.{module}")


STAGES: dict[str, Stage] = {
    "run": Stage("the stages of a recipe in order; continues where it was stopped", "run", "main"),
    "recipes": Stage("list, show or copy the recipes that come with exo_fast", "recipes", "main"),
    "prepare": Stage("a published data set's raw files to training data", "prepare", "prepare", "PrepareConfig"),
    "sft": Stage("supervised fine-tuning on prompts and completions", "sft", "sft", "SftConfig"),
    "generate": Stage("sample completions of prompts", "generate", "generate", "GenerateConfig"),
    "classifier": Stage("train a binary text classifier", "classifier", "classifier", "ClassifierConfig"),
    "reward-model": Stage("train a reward model on pairs", "reward_model", "reward_model", "RewardModelConfig"),
    "score": Stage("label completions with rewards or preferences", "score", "score", "ScoreConfig"),
    "pref-to-rw": Stage("preference pairs as candidates with rewards", "pref_to_rw", "pref_to_rw", "PrefToRwConfig"),
    "align": Stage("align a model on candidates with rewards or preferences", "align", "align", "config:AlignConfig"),
    "logprobs": Stage("log-probs of given completions under a model", "logprobs", "logprobs", "LogprobsConfig"),
    "evaluate": Stage("reward against KL of policies, as a table and a plot", "evaluate", "evaluate", "EvaluateConfig"),
    "memory": Stage("the memory that a training step needs, before it is tried", "exo_fast.benchmarks.memory", "main"),
    "bench": Stage("measure what exo_fast gains over the tools in use today", "exo_fast.benchmarks.cli", "main"),
    "demo": Stage("a real 135M model aligned on a CPU in minutes, with a report", "demo", "main"),
}


def run_stage(name: str, argv: Sequence[str]) -> int:
    """Run the stage `name` with the words of its command line; returns the exit status."""
    stage = STAGES[name]
    if stage.config is None:
        return getattr(stage.code(), stage.function)(argv) or 0

    import torch

    from exo_fast.training.deepspeed import announce_cpu

    if not torch.accelerator.is_available():
        announce_cpu()

    from exo_fast.training.arguments import parse_config

    config_class = stage.config_class()
    config = parse_config(
        config_class,
        argv,
        prog=f"exo-fast {name}",
        description=config_class.description,
        epilog=config_class.examples,
    )
    getattr(stage.code(), stage.function)(config)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit status: 0 (a stop by SIGTERM with everything saved included), 2 for input the user
    can fix, 1 for other failures, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="exo-fast",
        description="Align language models by EXO and DPO over K candidates per prompt.",
        epilog="stages:\n"
        + "\n".join(f"  {name:<14}{stage.summary}" for name, stage in STAGES.items())
        + "\n\n`exo-fast STAGE --help` shows a stage's options and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"exo-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts --local_rank before the stage; it is also in the environment.
    options = parser.parse_args([word for word in words if not word.startswith("--local_rank")])
    try:
        status = run_stage(options.stage, options.arguments)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"exo-fast {options.stage}: {stop}", flush=True)
        status = 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    except SystemExit as end:  # of argparse or a library, which say the status
        if argv is not None:
            raise
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"exo-fast {options.stage}: error: {_explain(error)}", file=sys.stderr)
        status = 2 if isinstance(error, InputError) else 1
    if argv is None:  # the end of the process; a test or a notebook may run several stages in one
        _leave_processes(status)
    return status


def _leave_processes(status: int) -> None:
    """End a process that talked to others without taking the interpreter apart, which gloo's threads do not survive.

    A thread may still be letting go of the last collective's tensors, and needs the interpreter for it; when that is
    being taken apart, the process aborts after all its work is done ("terminate called without an active exception").
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return
    try:
        torch.distributed.destroy_process_group()
        threading._shutdown()  # as the interpreter does: threads that must finish, then what is registered for the exit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # such as a pipe that nobody reads any more
        status = status or 1
        traceback.print_exc()
    finally:
        os._exit(status)


def _explain(error: Exception) -> str:
    if isinstance(error, InputError | RunError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("exo_fast"):
        return f"{error.name} is not installed; pip install 'exo_fast[train]' (for demo and bench: 'exo_fast[bench]')."
    return f"{type(error).__name__}: {error}\n(exo-fast --debug STAGE … shows the traceback)"


if __name__ == "__main__":
    sys.exit(main())
