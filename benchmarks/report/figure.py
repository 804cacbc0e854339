"""The frame and the colours of plots: light, in the colours of Okabe and Ito, which colour-blind readers tell apart.

Every plot is a function of one suite's results and the PNG to write. Its foot gives its provenance.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exo_fast.benchmarks.harness.provenance import OURS, provenance

BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"
GREY, DARK = "#B3B3B3", "#333333"
SIZE = 8


@contextmanager
def figure(
    path: Path, results: dict, title: str, shape: tuple[int, int], size: tuple[float, float], **options: Any
) -> Iterator[Any]:
    """Make a new figure and give its panels (rows, columns); it is saved at the end with title and foot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": SIZE, "axes.edgecolor": "#777777", "axes.linewidth": 0.6}):
        made, panels = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained", **options)
        for panel in panels.flat:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(length=2, color="#777777")
        yield panels
        made.suptitle(textwrap.fill(title, width=int(size[0] * 13)), fontsize=11, x=0.01, ha="left")
        foot = textwrap.fill(provenance(results).replace("`", ""), width=int(size[0] * 19))
        made.supxlabel(foot, fontsize=6, color="#777777", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=130, metadata={"Software": None})
        pyplot.close(made)


def colour_of(style: str) -> str:
    """Return blue for ours, grey for a peer."""
    return BLUE if style.startswith(OURS) else GREY
