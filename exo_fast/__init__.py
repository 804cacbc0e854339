"""exo_fast: aligning language models by EXO and DPO over K candidates per prompt.

The losses are in `exo_fast.loss`, the log-probabilities under them in `exo_fast.logprobs`, and the definitions
everything is checked against in `exo_fast.reference`. Nothing is imported here, so that importing one part
never pays for another.
"""

from exo_fast.version import __version__ as __version__
