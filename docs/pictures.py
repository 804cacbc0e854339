"""The pictures of docs/concepts.md: `python docs/pictures.py` draws them, and prints the numbers that the page quotes.

Masks, losses and errors are computed with exo_fast itself; nothing here is drawn from memory. Runs on a CPU in seconds,
and the same versions give the same pictures.

images/report-html.png is a browser's picture of the report.html of any short run:
`chromium --headless --hide-scrollbars --window-size=1200,1060 --screenshot=report-html.png report.html`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_fast.layout import Group, Packed, pack
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss
from exo_fast.masks import sees

IMAGES = Path(__file__).parent / "images"
PROMPT, CANDIDATES, PADDING = "#5b6b7f", ("#2f7ed8", "#e07b39", "#3a9d5d"), "#e9ecef"
INK, FAINT = "#263238", "#9aa5b1"
MB = 1e6

# The picture of schedules: the head of SmolLM2-135M, in bf16, and one step of 8,192 completion tokens.
TOKENS, HIDDEN, VOCABULARY, BUDGET = 8192, 576, 49152, 640 * 2**20


# ---- layout ----


def example_groups() -> list[Group]:
    """Two prompts; three candidates of the first, two of the second."""
    return [
        Group(prompt=[1] * 6, completions=[[2] * 3, [3] * 5, [4] * 4]),
        Group(prompt=[1] * 4, completions=[[2] * 4, [3] * 3]),
    ]


def seen(packed: Packed, row: int) -> Tensor:
    """(T, T) bool: which tokens of `row` see which, by the mask that models are given."""
    length = packed.input_ids.shape[1]
    segments = (packed.group_ids, packed.candidate_ids, packed.position_ids)
    index = torch.arange(length)
    return sees(*segments)(torch.tensor(row), 0, index[:, None], index)


def draw_layout(path: Path) -> None:
    """Ordinary rows, the row that shares the prompts, and its mask."""
    plt = pyplot()
    groups = example_groups()
    unshared = pack(groups, share_prompt=False)
    shared = pack(groups, row_length=sum(group.tokens() for group in groups))
    figure = plt.figure(figsize=(9.6, 5.4))
    left = figure.add_axes((0.02, 0.49, 0.46, 0.43))
    below = figure.add_axes((0.02, 0.04, 0.46, 0.31))
    right = figure.add_axes((0.57, 0.06, 0.41, 0.80))

    candidate_of_row = [k for group in groups for k in range(len(group.completions))]
    for row in range(len(unshared.input_ids)):
        for column, kind in enumerate(unshared.candidate_ids[row].tolist()):
            box(left, column, -row, colour_of(kind if kind < 1 else candidate_of_row[row] + 1))
    count = unshared.input_ids.numel()
    left.set_title(f"Ordinary rows: {len(unshared.input_ids)} × {unshared.input_ids.shape[1]} = {count} tokens run")
    fit(left, unshared.input_ids.shape[1], len(unshared.input_ids))

    length = shared.input_ids.shape[1]
    for column, (kind, position) in enumerate(
        zip(shared.candidate_ids[0].tolist(), shared.position_ids[0].tolist(), strict=True)
    ):
        box(below, column, 0, colour_of(kind))
        below.text(column + 0.5, -0.28, str(position), ha="center", va="center", fontsize=7.5, color=INK)
    below.text(0, -0.85, "numbers: position ids, which restart after the prompt", fontsize=9, color=INK, va="top")
    legend = [("prompt", PROMPT), *((f"candidate {k + 1}", colour) for k, colour in enumerate(CANDIDATES))]
    for i, (name, colour) in enumerate([*legend, ("padding", PADDING)]):
        x, y = 7.5 * (i % 4), -2.5 - 1.25 * (i // 4)
        box(below, x, y, colour)
        below.text(x + 1.3, y + 0.45, name, fontsize=8.5, color=INK, va="center")
    below.set_title(f"Shared prompts: 1 × {length} = {length} tokens run")
    below.set_xlim(-0.2, length + 0.2)
    below.set_ylim(-3.9, 1.2)
    below.axis("off")

    mask = seen(shared, 0)
    kinds = shared.candidate_ids[0].tolist()
    for query in range(length):
        for key in range(length):
            if mask[query, key]:
                box(right, key, -query, colour_of(kinds[key]))
    for start in boundaries(shared):
        right.plot([start, start], [1, 1 - length], color=FAINT, lw=0.6)
        right.plot([0, length], [1 - start, 1 - start], color=FAINT, lw=0.6)
    right.set_title("The mask of that row", pad=18)
    right.text(length / 2, 1.5, "key: the token that is seen →", ha="center", va="bottom", fontsize=9, color=INK)
    right.text(-0.9, -length / 2 + 1, "← query: the token that sees", ha="center", va="center", rotation=90, fontsize=9)
    right.set_xlim(0, length)
    right.set_ylim(1 - length, 1)
    right.set_aspect("equal")
    right.set_xticks([])
    right.set_yticks([])
    save(figure, path)


def boundaries(packed: Packed) -> list[int]:
    """Return the places in the first row at which a prompt or a candidate begins."""
    kinds = torch.stack([packed.group_ids[0], packed.candidate_ids[0]])
    return [0, *((kinds[:, 1:] != kinds[:, :-1]).any(0).nonzero().flatten() + 1).tolist()]


def colour_of(kind: int) -> str:
    """The colour of a token by its candidate id: −1 padding, 0 prompt, 1… candidates."""
    return PADDING if kind < 0 else PROMPT if kind == 0 else CANDIDATES[kind - 1]


# ---- schedules ----


def schedules() -> dict[str, list[tuple[str, float, dict[str, float]]]]:
    """Return the vocabulary-sized memory of each schedule over time, in MB: (phase, its share of the width, parts).

    From the shapes alone. Full logits: in bf16, their float32 copy, the log-softmax, which is kept, and in the backward
    pass two gradients of its size, of `gather` and of the log-softmax; dW in bf16. Ours: the scratch that the memory
    budget allows at most, and dW in float32.
    """
    logits = TOKENS * VOCABULARY * 2 / MB
    wide = 2 * logits
    weight = VOCABULARY * HIDDEN * 4 / MB
    scratch = BUDGET / MB
    dw, chunk = "dW", "scratch, at most the memory budget"
    one, copy, gradient = "logits, bf16", "float32 copy, log-softmax", "their gradients, float32"
    return {
        "Full logits": [
            ("project", 1.0, {one: logits}),
            ("log-softmax", 1.0, {one: logits, copy: 2 * wide}),
            ("the model's\nother work", 0.6, {copy: wide}),
            ("backward", 1.2, {copy: wide, gradient: 2 * wide}),
            ("dH, dW", 1.2, {one: logits, dw: weight / 2}),
        ],
        "Two passes (linear_logprobs)": [
            ("log-probs,\nchunk by chunk", 1.8, {chunk: scratch}),
            ("the loss", 0.8, {}),
            ("logits again, dH,\ndW, chunk by chunk", 2.4, {chunk: scratch, dw: weight}),
        ],
        "One pass (linear_group_loss)": [
            ("log-probs, loss,\ndH, dW,\ngroup by group", 2.0, {chunk: scratch, dw: weight}),
            ("the model's\nother work", 1.4, {dw: weight}),
            ("backward:\nscale\ndH, dW", 1.4, {dw: weight}),
        ],
    }


def draw_schedules(path: Path) -> None:
    """The memory of each schedule over time."""
    plt = pyplot()
    colours = {
        "logits, bf16": "#e07b39",
        "float32 copy, log-softmax": "#c0392b",
        "their gradients, float32": "#8e44ad",
        "scratch, at most the memory budget": "#2f7ed8",
        "dW": "#3a9d5d",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 4.3), sharey=True)
    for axis, (name, phases) in zip(axes, schedules().items(), strict=True):
        at, highest, centre = 0.0, 0.0, 0.0
        for phase, width, parts in phases:
            bottom = 0.0
            for part, size in parts.items():
                axis.bar(at, size, width, bottom, align="edge", color=colours[part], edgecolor="white", lw=0.8)
                bottom += size
            if bottom > highest:
                highest, centre = bottom, at + width / 2
            if len(phases) > 3:
                axis.text(at + width / 2, -120, phase, ha="right", va="top", fontsize=8, color=INK, rotation=35)
            else:
                axis.text(at + width / 2, -120, phase, ha="center", va="top", fontsize=8, color=INK)
            at += width
        axis.set_title(name, fontsize=10.5)
        axis.text(centre, highest + 90, f"peak {highest / 1000:.1f} GB", ha="center", fontsize=10, color=INK)
        axis.set_xlim(0, at)
        axis.set_xticks([])
        axis.grid(axis="y", color="#eef1f4")
        axis.set_axisbelow(True)
    axes[0].set_ylim(0, 5400)
    axes[0].set_ylabel("vocabulary-sized memory, MB")
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()],
        list(colours),
        loc="lower center",
        ncol=5,
        frameon=False,
        fontsize=8.5,
        columnspacing=1.2,
        handlelength=1.2,
    )
    figure.subplots_adjust(left=0.07, right=0.99, top=0.92, bottom=0.28, wspace=0.06)
    save(figure, path)


# ---- reverse and forward KL ----


def target() -> tuple[Tensor, Tensor]:
    """401 completions on a line and the reward's distribution over them: a high peak and a lower, broader one."""
    line = torch.linspace(-6, 6, 401, dtype=torch.float64)
    density = 0.65 * gaussian(line, -2.2, 0.55) + 0.35 * gaussian(line, 2.4, 0.8)
    return line, density / density.sum()


def gaussian(line: Tensor, centre: float | Tensor, width: float | Tensor) -> Tensor:
    """A normal density, not normalised on the line."""
    return torch.exp(-0.5 * ((line - centre) / width) ** 2) / width


def best_fits() -> dict[str, dict[str, Any]]:
    """The one-peaked policy that each loss likes best: its centre, width, mean reward, and mass in the valley.

    The policies are normal, so they cannot equal the target. All completions are candidates of one group, the
    reference is uniform, the reward is log p. A grid of centres and widths gives the least `exo_fast.loss.group_loss`.
    """
    line, p = target()
    centres, widths = torch.meshgrid(
        torch.linspace(-4, 4, 161, dtype=torch.float64), torch.linspace(0.3, 4, 75, dtype=torch.float64), indexing="ij"
    )
    policies = gaussian(line, centres.reshape(-1, 1), widths.reshape(-1, 1))
    policies = policies / policies.sum(1, keepdim=True)
    reference = torch.full_like(policies, -torch.tensor(float(len(line))).log().item())
    rewards = p.log().expand_as(policies)
    fits = {}
    for loss_type in ("exo-rw", "dpo-rw"):
        losses = group_loss(
            policies.clamp_min(1e-300).log(), reference, rewards,
            loss_type=loss_type, beta_pi=1.0, beta_r=1.0, reduction="none",
        )  # fmt: skip
        best = int(losses.argmin())
        q = policies[best]
        fits[loss_type] = {
            "q": q,
            "centre": centres.reshape(-1)[best].item(),
            "width": widths.reshape(-1)[best].item(),
            "reward": (q * p.log()).sum().item(),
            "valley": q[(line > -0.8) & (line < 0.8)].sum().item(),
        }
    fits["target"] = {"valley": p[(line > -0.8) & (line < 0.8)].sum().item(), "reward": (p * p.log()).sum().item()}
    return fits


def draw_divergences(path: Path) -> None:
    """The target and the two fits."""
    plt = pyplot()
    line, p = target()
    fits = best_fits()
    step = (line[1] - line[0]).item()
    figure, axis = plt.subplots(figsize=(8.2, 3.7))
    axis.fill_between(line, p / step, color="#dfe4ea", label="target p, the reward's distribution")
    axis.axvspan(-0.8, 0.8, 0, 0.68, color="#f8f1e3", zorder=0)
    axis.text(0, 0.56, "few good\ncompletions", ha="center", va="top", fontsize=9, color=INK)
    for loss_type, colour, label in (
        ("exo-rw", CANDIDATES[0], "EXO, reverse KL: goes where p is high, and keeps off the valley"),
        ("dpo-rw", CANDIDATES[1], "DPO, forward KL: covers all of p, and the valley with it"),
    ):
        axis.plot(line, fits[loss_type]["q"] / step, color=colour, lw=2.2, label=label)
    axis.set_xlim(-6, 6)
    axis.set_ylim(0, 0.86)
    axis.set_xlabel("completions, on a line")
    axis.set_ylabel("probability density")
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    figure.tight_layout()
    save(figure, path)


# ---- precision ----

LENGTHS = (16, 64, 256, 1024, 4096)


def rounding_errors(sequences: int = 64) -> dict[str, dict[int, float]]:
    """Median error of a sequence log-prob against float64, in nats, by length and by how the logits are kept.

    bf16 hidden states and head; the logits spread like a model's that is fairly sure of its tokens (standard deviation
    4, targets drawn from the softmax).
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, width, longest = 1024, 64, LENGTHS[-1]
    weight = torch.randn(vocabulary, width, generator=generator).bfloat16()
    errors: dict[str, list[Tensor]] = {"logits in bf16": [], "logits in float32": []}
    for _ in range(sequences):
        hidden = (torch.randn(longest, width, generator=generator) * 4 / width**0.5).bfloat16()
        exact_logits = hidden.double() @ weight.double().T
        targets = torch.multinomial(exact_logits.softmax(-1), 1, generator=generator).squeeze(1)
        exact = exact_logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        ours = linear_logprobs(hidden, weight, targets)
        errors["logits in bf16"].append((rounded.double() - exact).cumsum(0))
        errors["logits in float32"].append((ours.double() - exact).cumsum(0))
    return {
        name: {length: torch.stack(sums)[:, length - 1].abs().median().item() for length in LENGTHS}
        for name, sums in errors.items()
    }


def draw_precision(path: Path) -> None:
    """Error of a sequence log-prob over its length."""
    plt = pyplot()
    errors = rounding_errors()
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    colours = {"logits in bf16": CANDIDATES[1], "logits in float32": CANDIDATES[0]}
    for name, by_length in errors.items():
        axis.plot(list(by_length), list(by_length.values()), "o-", color=colours[name], lw=2, label=name)
        axis.annotate(
            f"{by_length[LENGTHS[-1]]:.1g} nats", (LENGTHS[-1], by_length[LENGTHS[-1]]), (0, 8),
            textcoords="offset points", ha="right", fontsize=9, color=INK,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(2e-7, 20)
    axis.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axis.set_xlabel("tokens of the completion")
    axis.set_ylabel("error of its log-prob, nats")
    axis.grid(color="#eef1f4")
    axis.legend(frameon=False, loc="center right")
    figure.tight_layout()
    save(figure, path)


# ---- drawing ----


def pyplot() -> Any:
    """matplotlib without a screen, with plain axes. Imported here: a test computes the numbers without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return plt


def box(axis: Any, x: float, y: float, colour: str) -> None:
    """One token."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, color=colour, lw=0))


def fit(axis: Any, columns: int, rows: int) -> None:
    axis.set_xlim(-0.2, columns + 0.2)
    axis.set_ylim(0.8 - rows, 1.2)
    axis.axis("off")


def save(figure: Any, path: Path) -> None:
    """Save as PNG, without the date and versions that would make two runs differ."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


PICTURES: dict[str, Callable[[Path], None]] = {
    "concepts-layout.png": draw_layout,
    "concepts-schedules.png": draw_schedules,
    "concepts-divergences.png": draw_divergences,
    "concepts-precision.png": draw_precision,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, draw in PICTURES.items():
        draw(IMAGES / name)
    for name, fit_ in best_fits().items():
        print(name, {key: round(value, 3) for key, value in fit_.items() if isinstance(value, float)})
    for name, by_length in rounding_errors().items():
        print(name, {length: f"{error:.2g}" for length, error in by_length.items()})
