"""`exo-fast STAGE ...`: the command line of all stages.

Stages are imported when called, so that `exo-fast --help` is instant and needs none of the training
dependencies. Started by torchrun or deepspeed it runs the same: `torchrun --nproc-per-node 2 -m
exo_fast.training.cli align …`.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from exo_fast.training.errors import InputError
from exo_fast.version import __version__

ALIGN_DESCRIPTION = """\
Align a language model by EXO or DPO on K candidate completions per prompt.

Every field may stand in a YAML recipe (--config) and on the command line, which wins."""

ALIGN_EXAMPLES = """\
examples:
  exo-fast align --config recipes/align.yaml
  exo-fast align --config recipes/align.yaml --loss_type exo-rw --num_contrastive 4 --output_dir runs/exo-rw
  exo-fast align --model_name_or_path models/sft --data data/rw --lora_r 16 --learning_rate 1e-4
  exo-fast align --config recipes/align.yaml --resume_from_checkpoint auto
  torchrun --nproc-per-node 2 -m exo_fast.training.cli align --config recipes/align.yaml --zero_stage 3
  deepspeed --module exo_fast.training.cli align --config recipes/align.yaml
  tensorboard --logdir runs/align
"""


def _align(argv: Sequence[str]) -> int:
    import torch

    from exo_fast.training.deepspeed import announce_cpu

    if not torch.accelerator.is_available():
        announce_cpu()

    from exo_fast.training.align import align
    from exo_fast.training.arguments import parse_config
    from exo_fast.training.config import AlignConfig

    config = parse_config(
        AlignConfig, argv, prog="exo-fast align", description=ALIGN_DESCRIPTION, epilog=ALIGN_EXAMPLES
    )
    align(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _demo(argv: Sequence[str]) -> int:
    from exo_fast.training.demo import main as demo

    return demo(argv) or 0


STAGES: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "align": (_align, "align a model on candidates with rewards or preferences"),
    "demo": (_demo, "a real 135M model aligned on a CPU in minutes, with a report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit status: 0, 2 for input the user can fix, 1 for other failures, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="exo-fast",
        description="Align language models by EXO and DPO over K candidates per prompt.",
        epilog="stages:\n"
        + "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in STAGES.items())
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
        return STAGES[options.stage][0](options.arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"exo-fast {options.stage}: error: {_explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _explain(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("exo_fast"):
        return f"{error.name} is not installed; pip install 'exo_fast[train]' (for the demo: 'exo_fast[demo]')."
    return f"{type(error).__name__}: {error}\n(exo-fast --debug STAGE … shows the traceback)"


if __name__ == "__main__":
    sys.exit(main())
