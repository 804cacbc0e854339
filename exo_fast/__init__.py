"""exo_fast: aligning language models by EXO and DPO over K candidates per prompt.

The losses are in `exo_fast.loss`, the log-probabilities under them in `exo_fast.logprobs`, and the definitions
everything is checked against in `exo_fast.reference`. Nothing is imported here, so that importing one part
never pays for another.
"""

from pathlib import Path

from exo_fast.version import __version__ as __version__

# A checkout has training/, benchmarks/ and kernels/ beside this folder, where an installed package has them inside: so
# a copied tree works by PYTHONPATH alone.
if not (Path(__file__).parent / "training").exists():
    __path__.append(str(Path(__file__).resolve().parents[1]))
