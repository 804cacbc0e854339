"""`exo-fast STAGE ...`: the command line of all stages.

Stages are imported when called, so that `exo-fast --help` is instant and needs none of the training
dependencies. Started by torchrun or deepspeed it runs the same: `torchrun --nproc-per-node 2 -m
exo_fast.training.cli align …`.

A stage ends early by an exception of `errors.py`. Only `main` turns it into a message and an exit status. A stage
passes its result to `terminal.give_result`. Only `main` knows of --json.
"""

import argparse
import atexit
import contextlib
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from exo_fast.training import terminal
from exo_fast.training.errors import InputError, RunError, Stopped
from exo_fast.version import __version__

# The values of transformers' field --debug in a training stage. Without a value, --debug is our flag.
FIELD_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
INTERRUPTED, PIPE_CLOSED = 130, 141  # the exit statuses a shell reports: 128 + SIGINT, 128 + SIGPIPE

FLAGS = {
    "--debug": "show the traceback of an error",
    "--json": "print the result as one JSON object on stdout, and all else to stderr",
}
EPILOG = """\
`exo-fast STAGE --help` shows a stage's options and examples; --debug and --json may stand after the stage too.

exit status:
  0    done; also stopped by SIGTERM with everything saved, where the same command continues
  1    the run failed: no memory or disk, a number that is not finite, a check or a comparison that was not passed
  2    the command, a recipe, data or a model cannot be used as it is, or a package is missing; the message says the fix
  130  stopped by Ctrl-C
  141  who read the output went away, as `head` does; the work is done all the same
`run` ends with the status of the stage that failed: 128 + n for one that signal n ended."""


@dataclass(frozen=True)
class Stage:
    """The place of a stage's code. With a config class, `function(config)` returns the result. Without one,
    `function(argv)` parses with the module's `parser()`, gives its result, and returns an exit status."""

    summary: str
    module: str  # relative to exo_fast.training, or from exo_fast
    function: str
    config: str | None = None  # the class in `module`

    def config_class(self) -> type:
        """Return the dataclass of the stage's fields."""
        return getattr(_import(self.module), self.config)

    def code(self) -> ModuleType:
        """Return the module with the stage's function."""
        return _import(self.module)

    def parser(self, prog: str) -> argparse.ArgumentParser:
        """Return the parser of all the stage's options."""
        if self.config is None:
            return self.code().parser()
        from exo_fast.training.arguments import StageParser

        return StageParser(self.config_class(), show_all=True, prog=prog)


def _import(module: str) -> ModuleType:
    return importlib.import_module(module if module.startswith("exo_fast.") else f"exo_fast.training.{module}")


STAGES: dict[str, Stage] = {
    "run": Stage("the stages of a recipe in order; continues where it was stopped", "pipeline.run", "main"),
    "recipes": Stage("list, show or copy the recipes that come with exo_fast", "pipeline.library", "main"),
    "prepare": Stage("a published data set's raw files to training data", "stages.prepare", "prepare", "PrepareConfig"),
    "sft": Stage("supervised fine-tuning on prompts and completions", "stages.sft", "sft", "SftConfig"),
    "generate": Stage("sample completions of prompts", "stages.generate", "generate", "GenerateConfig"),
    "classifier": Stage("train a binary text classifier", "stages.classifier", "classifier", "ClassifierConfig"),
    "reward-model": Stage("train a reward model on pairs", "stages.reward_model", "reward_model", "RewardModelConfig"),
    "score": Stage("label completions with rewards or preferences", "stages.score", "score", "ScoreConfig"),
    "pref-to-rw": Stage(
        "preference pairs as candidates with rewards", "stages.pref_to_rw", "pref_to_rw", "PrefToRwConfig"
    ),
    "align": Stage("align a model on candidates with rewards or preferences", "stages.align", "align", "AlignConfig"),
    "logprobs": Stage("log-probs of given completions under a model", "stages.logprobs", "logprobs", "LogprobsConfig"),
    "evaluate": Stage(
        "reward against KL of policies, as a table and a plot", "stages.evaluate", "evaluate", "EvaluateConfig"
    ),
    "memory": Stage("the memory that a training step needs, before it is tried", "memory.command", "main"),
    "bench": Stage("measure what exo_fast gains over the tools in use today", "exo_fast.benchmarks.cli", "main"),
    "gpu": Stage("test, time and tune the kernels on this GPU", "exo_fast.benchmarks.gpu.command", "main"),
    "demo": Stage("a real 135M model aligned on a CPU in minutes, with a report", "demo", "main"),
    "doctor": Stage("what is installed, what would run here and whether its numbers are right", "cli.doctor", "main"),
    "completion": Stage("a script that completes these commands in a shell", "cli.completion", "main"),
}


def run_stage(name: str, argv: Sequence[str]) -> int:
    """Run the stage `name` with the words of its command line; returns the exit status."""
    stage = STAGES[name]
    if stage.config is None:
        return getattr(stage.code(), stage.function)(argv) or 0

    import torch

    from exo_fast.training.processes import announce_cpu

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
    function = getattr(stage.code(), stage.function)
    terminal.give_result(function(config))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit status: 0 (a stop by SIGTERM with everything saved included), 2 for errors
    that the user can fix, 1 for other failures, 130 for Ctrl-C, 141 for output that nobody reads any more.

    Without `argv` it reads the process's command line, and the process is about to end. With it, argparse raises
    SystemExit: a test or a notebook may run several stages.
    """
    if argv is not None:
        return _main(argv)
    terminal.sturdy_streams()
    try:
        status = _main(sys.argv[1:])
    except SystemExit as end:  # from argparse or a library, with the status
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:  # while a message was printed
        status = INTERRUPTED
    if (lost := terminal.lost_output()) is not None:
        if isinstance(lost, BrokenPipeError):
            status = status or PIPE_CLOSED
        else:
            print(f"exo-fast: what it printed is not all written: {lost.strerror}", file=sys.stderr)
            status = status or 1
    _leave_processes(status)
    return status


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="exo-fast",
        description="Align language models by EXO and DPO over K candidates per prompt.",
        epilog="\n".join(["stages:", *(f"  {name:<14}{stage.summary}" for name, stage in STAGES.items()), "", EPILOG]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"exo-fast {__version__}")
    for flag, what in FLAGS.items():
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    # The deepspeed launcher puts --local_rank before the stage; it is also in the environment.
    options = parser.parse_args([word for word in argv if not word.startswith("--local_rank")])
    flags, arguments = _take_flags(options.arguments)
    debug, as_json = options.debug or "--debug" in flags, options.json or "--json" in flags
    try:
        with terminal.results_only() if as_json else contextlib.nullcontext():
            return _run_or_stop(options.stage, arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not terminal.has_reader(sys.stdout):
            return PIPE_CLOSED
        if debug:
            traceback.print_exc()
        else:
            begun = f"exo-fast {options.stage}: {terminal.paint('error:', 'red', sys.stderr)}"
            print(f"{begun} {_explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) or _is_missing_package(error) else 1


def _run_or_stop(name: str, arguments: Sequence[str]) -> int:
    """Run a stage as `run_stage` does. If it stopped because it was asked to, that is its result."""
    try:
        return run_stage(name, arguments)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"exo-fast {name}: {stop}", flush=True)
        terminal.give_result({"stopped": str(stop)})
        return 0


def _take_flags(words: Sequence[str]) -> tuple[set[str], list[str]]:
    """Return our flags among the words after the stage, and the other words."""
    followers = [*words[1:], ""]
    ours = [
        word in FLAGS and not (word == "--debug" and following in FIELD_DEBUG)
        for word, following in zip(words, followers, strict=False)
    ]
    return (
        {word for word, is_ours in zip(words, ours, strict=True) if is_ours},
        [word for word, is_ours in zip(words, ours, strict=True) if not is_ours],
    )


def _leave_processes(status: int) -> None:
    """End a process that used collectives without finalising the interpreter, which gloo's threads do not survive.

    A thread may still be freeing the last collective's tensors, and needs the interpreter for it. If that is being
    finalised, the process aborts after all its work is done ("terminate called without an active exception").
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return
    try:
        torch.distributed.destroy_process_group()
        threading._shutdown()  # as the interpreter does: wait for threads, then run the exit functions
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        status = status or 1
        traceback.print_exc()
    finally:
        os._exit(status)


def _is_missing_package(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and not (error.name or "exo_fast").startswith("exo_fast")


def _explain(error: Exception) -> str:
    if isinstance(error, InputError | RunError):
        return str(error)
    if _is_missing_package(error):
        from exo_fast.training.cli.installed import command_for, distribution_of

        package = distribution_of(str(getattr(error, "name", "")))
        return f"{package} is not installed: {command_for(package)}"
    return f"{type(error).__name__}: {error}\n(exo-fast --debug STAGE … shows the traceback)"
