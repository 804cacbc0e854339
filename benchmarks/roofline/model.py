"""The work of each kernel and each schedule on a GPU, and its predicted time: arithmetic, nothing is measured.

A `Launch` is one kernel or one library product: its flops, its bytes of device memory, its bytes between L2 and the
multiprocessors, its exponentials. Four ceilings of the board bound its time from below (`floor`). `predict` takes
library products on NVIDIA's boards from NVIDIA's own model (`nvidia.py`), and for all else applies shares of the peaks
that were published for similar kernels (`BOARDS`). A `Schedule` is a list of launches for one
forward and backward pass of the group loss. Block sizes come from the kernels themselves.

The model of memory:
- A library product reads each operand and writes its result once; `dW +=` reads and writes a float32 (V, D).
- `linear_logsumexp`: every program reads BLOCK_N + BLOCK_V rows of D for a tile, through L2. GROUP row blocks walk the
  vocabulary side by side, so W comes from memory once for each GROUP·BLOCK_N rows, and H once (the rows in flight,
  at most 17 MB, stay in L2).
- Elementwise kernels stream: their reads and writes go through device memory.

The model of a tile: products on the tensor cores, then an epilogue of one exponential and EPILOGUE other float32
instructions a logit. Two programs on a multiprocessor hide each other's epilogue and pipeline fill; alone, a program
pays both, added up. A loop over the vocabulary that is one with the loop over D (`flattened`) fills its pipeline once:
the operands of the next tile arrive during the epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from exo_fast.backends.rows import whole_tiles
from exo_fast.benchmarks.roofline import nvidia
from exo_fast.kernels import linear_logprobs_backward, linear_logsumexp, logits_to_grad
from exo_fast.kernels.launch import Config
from exo_fast.kernels.targets import TARGETS, Target

MIB = 2**20
EPILOGUE = 8  # float32 instructions a logit beside the exponential: scale, mask, shift, sum, maximum or conversion
LIBRARY_FILL = 64  # columns of the reduction that a library product loses while its pipeline fills
L2 = 0.75  # share of the L2 rate that a kernel reaches
REGISTERS = 110  # of a thread of `linear_logsumexp`, beside its sums, in certified binaries
LAUNCH = 5e-6  # seconds: the shortest predicted launch
CANDIDATES, COMPLETION = 4, 64  # the groups of benchmarks/suites/op.py


@dataclass(frozen=True)
class Head:
    """A model's vocabulary projection."""

    model: str
    width: int
    vocab: int


HEADS = (
    Head("Llama-3-8B", 4096, 128256),
    Head("Qwen3-0.6B", 1024, 151936),
    Head("Gemma-3-270m", 640, 262144),
)
TOKENS = (2048, 8192, 32768)


@dataclass(frozen=True)
class Board:
    """The bounds of a launch beside the peaks of `Target`, and the assumed shares of the peaks."""

    target: Target
    memory: float  # bytes of device memory
    l2_bytes: float  # of the cache that all multiprocessors share (MI300X: Infinity Cache)
    l2: float  # bytes/s between L2 and the multiprocessors (MI300X: Infinity Cache, its L2 being one for each die)
    flops_per_clock: int  # dense bf16, of one multiprocessor
    lanes: int  # float32 instructions a clock of one multiprocessor
    library: float  # share of peak of a library product, where `heuristics` is None
    triton: float  # share of peak of a Triton product
    stream: float  # share of bandwidth of an elementwise kernel
    exponentials_per_clock: int = 16  # of one multiprocessor
    heuristics: str | None = None  # its name in NVIDIA's model of products, which then gives the times of the library's
    resident: tuple[tuple[str, int], ...] = ()  # configuration of linear_logsumexp -> certified programs at once

    @property
    def name(self) -> str:
        return self.target.board

    @property
    def clocks(self) -> float:
        """Return the clocks a second of all multiprocessors together, at the clock of the data sheet's peak."""
        return self.target.flops / self.flops_per_clock

    @property
    def exponentials(self) -> float:
        """Return the exponentials a second."""
        return self.clocks * self.exponentials_per_clock


# Sources of every number: docs/gpu-analysis.md.
BOARDS = (
    Board(
        TARGETS["sm_80"],
        80e9,
        40e6,
        7.2e12,
        2048,
        64,
        library=0.75,
        triton=0.73,
        stream=0.85,
        heuristics="A100_SXM_80GB",
    ),
    Board(
        TARGETS["sm_90"], 80e9, 50e6, 9.4e12, 4096, 128, library=0.70, triton=0.60, stream=0.82, heuristics="H100_SXM"
    ),
    Board(
        TARGETS["sm_100"], 180e9, 126e6, 19.0e12, 8192, 128, library=0.68, triton=0.53, stream=0.87, heuristics="B200"
    ),
    Board(TARGETS["gfx942"], 192e9, 256e6, 17.2e12, 2048, 64, library=0.52, triton=0.40, stream=0.74),
)
H200 = replace(
    BOARDS[1], target=replace(TARGETS["sm_90"], board="H200", bandwidth=4.8e12), memory=141e9, heuristics="H200_SXM"
)


@dataclass(frozen=True)
class Launch:
    """One kernel or library product. Bytes are device memory unless they are `cached`."""

    name: str
    kind: str  # "library" or "triton" product, or "stream"
    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    cached: float = 0.0  # between L2 and the multiprocessors
    exponentials: float = 0.0
    fill: float = 1.0  # share of a tile that lies inside the matrix × share of its time with a full pipeline
    busy: float = 1.0  # share of the multiprocessors at work
    alone: bool = False  # one program on a multiprocessor: its epilogue is not hidden
    shape: tuple[str, int, int, int] | None = None  # of a library product: its layout in `nvidia.py`, m, n, depth
    logits: float = 0.0  # bytes of `read` and `written` that are logits, U or their gradient
    passes: int = 1  # dependent launches that it represents
    count: int = 1  # times it is launched in a schedule

    @property
    def bytes(self) -> float:
        return self.read + self.written


def ceilings(launch: Launch, board: Board) -> dict[str, float]:
    """Return the seconds that each resource needs at its peak."""
    return {
        "products": launch.flops / board.target.flops,
        "memory": launch.bytes / board.target.bandwidth,
        "L2": launch.cached / board.l2,
        "exponentials": launch.exponentials / board.exponentials,
    }


def floor(launch: Launch, board: Board) -> tuple[float, str]:
    """Return (the least seconds of any implementation of these flops and bytes, the ceiling that binds)."""
    found = ceilings(launch, board)
    bound = max(found, key=found.__getitem__)
    return found[bound], bound


def predict(launch: Launch, board: Board) -> float:
    """Return the seconds by NVIDIA's model of products, or at the board's assumed shares of its peaks."""
    needed = ceilings(launch, board)
    needed["memory"] /= board.stream
    needed["L2"] /= launch.busy * L2
    if launch.shape and board.heuristics:
        needed["products"] = max(needed["products"], nvidia.product(board.heuristics, *launch.shape).seconds)
    elif launch.kind != "stream":
        needed["products"] /= (board.library if launch.kind == "library" else board.triton) * launch.fill * launch.busy
    seconds = max(needed.values())
    if launch.kind == "triton":
        clocks = 1 / board.exponentials_per_clock + EPILOGUE / board.lanes
        epilogue = launch.exponentials * clocks / board.clocks / launch.busy
        seconds = seconds + epilogue if launch.alone else max(seconds, epilogue)
    return max(seconds, LAUNCH * launch.passes)


# The launches. bf16 operands (2 bytes), float32 logits (4 bytes), n rows.


def product(name: str, m: int, n: int, depth: int, read: float, written: float, logits: float = 0.0) -> Launch:
    """Return the launch of a library product (m, depth) · (depth, n), named by its result: logits, dH or dW."""
    fill, shape = depth / (depth + LIBRARY_FILL), (name.split()[-1], m, n, depth)
    return Launch(name, "library", 2 * m * n * depth, read, written, fill=fill, shape=shape, logits=logits)


def logits_product(head: Head, n: int) -> Launch:
    """Return the product that makes float32 logits from bf16 operands."""
    z = 4 * n * head.vocab
    return product("product, logits", n, head.vocab, head.width, 2 * (n + head.vocab) * head.width, z, z)


def hidden_product(head: Head, n: int) -> Launch:
    """Return the product for dH of n rows from U or ∂L/∂z in bf16; float32 result."""
    u = 2 * n * head.vocab
    return product("product, dH", n, head.width, head.vocab, u + 2 * head.vocab * head.width, 4 * n * head.width, u)


def weight_product(head: Head, n: int, first: bool) -> Launch:
    """Return the product for dW += of n rows into float32; the first chunk only writes."""
    u, dw = 2 * n * head.vocab, 4 * head.vocab * head.width
    read = u + 2 * n * head.width + (0 if first else dw)
    return product("product, dW", head.vocab, head.width, n, read, dw, u)


def stream(name: str, read: float, written: float, exponentials: float = 0.0, logits: float | None = None) -> Launch:
    """Return the launch of an elementwise kernel."""
    moved = read + written if logits is None else logits
    return Launch(name, "stream", 0.0, read, written, exponentials=exponentials, logits=moved)


def default_config(board: Board, width: int, store: bool = False) -> Config:
    """Return the launch configuration of `linear_logsumexp`."""
    return linear_logsumexp.config(board.target, "bf16", width, store)


def programs_at_once(board: Board, config: Config) -> int:
    """Return how many programs of `linear_logsumexp` share a multiprocessor: the certified number, else as many as
    their operand tiles and registers allow. On sm_100 sums lie in tensor memory."""
    if str(config) in dict(board.resident):
        return dict(board.resident)[str(config)]
    threads = config.num_warps * board.target.warp_size
    sums = config.constants["BLOCK_N"] * config.constants["BLOCK_V"] // threads
    registers = min(board.target.max_registers, REGISTERS + (sums if board.target.name != "sm_100" else 0))
    return max(
        1,
        min(
            board.target.shared_memory_sm // linear_logsumexp.shared_memory(config, board.target, 2),
            board.target.registers // (threads * registers),
        ),
    )


def linear_logsumexp_launch(
    board: Board, head: Head, n: int, store: bool, config: Config | None = None, flattened: bool | None = None
) -> Launch:
    """Return the launch for the log-probs of n rows; with `store` also U in bf16. The configuration is the library's,
    and the loop the kernel's, if they are None."""
    config = default_config(board, head.width, store) if config is None else config
    flattened = linear_logsumexp.flatten(board.target) if flattened is None else flattened
    rows, columns, depth = (config.constants[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D"))
    walks = math.ceil(n / (linear_logsumexp.GROUP * rows))
    tiles = math.ceil(n / rows) * math.ceil(head.vocab / columns)
    ranges = linear_logsumexp.splits(board.target, n, head.vocab, config)
    blocks = math.ceil(head.vocab / columns)
    even = blocks / (ranges * math.ceil(blocks / ranges))  # the longest range takes the time
    alone = programs_at_once(board, config) == 1
    drained = config.num_stages - 1 if alone and not flattened else 0
    u = 2 * n * head.vocab if store else 0
    partial = 12 * n * ranges  # written, and read by `merge`
    return Launch(
        "linear_logsumexp" + (", U stored" if store else ""),
        "triton",
        flops=2 * n * head.width * head.vocab,
        read=2 * head.width * (n + walks * head.vocab) + 8 * n + partial,
        written=u + partial + 16 * n,
        cached=2 * head.width * tiles * (rows + columns),
        exponentials=n * head.vocab,
        fill=full(n, rows) * (head.width / (head.width + drained * depth)),
        busy=busy(math.ceil(n / rows) * ranges, board) * even,
        alone=alone,
        logits=u,
        passes=2,  # with `merge`
    )


def pilot_launch(head: Head, n: int) -> Launch:
    """Return the launch for each row's target logit, the shift that U is formed with."""
    return stream("target_shift", 4 * n * head.width + 8 * n, 4 * n, logits=0.0)


def gather_launch(head: Head, n: int) -> Launch:
    """Return the launch for row statistics and target logits from float32 logits."""
    z = 4 * n * head.vocab
    return stream("logsumexp_gather", z + 8 * n, 12 * n, n * head.vocab, z)


def gradient_launch(board: Board, head: Head, n: int, itemsize: int = 2) -> Launch:
    """Return the launch from float32 logits to ∂L/∂z, written in `itemsize` bytes."""
    config = logits_to_grad.configs(board.target, "fp32")[0]
    z, u = 4 * n * head.vocab, itemsize * n * head.vocab
    statistics = 20 * n * math.ceil(head.vocab / config.constants["BLOCK"])
    return stream("logits_to_grad", z + statistics, u, n * head.vocab, z + u)


def group_loss_launch(n: int) -> Launch:
    """Return the launch for losses and coefficients of the groups."""
    sequences = max(1, n // COMPLETION)
    return stream("group_loss", 4 * n + 16 * sequences, 4 * n + 8 * sequences, logits=0.0)


def finish_hidden(head: Head, n: int) -> Launch:
    """Return the launch that makes dH of n rows in bf16 from the float32 product and the head's rows at the targets."""
    return stream("finish_hidden", 6 * n * head.width, 2 * n * head.width, logits=0.0)


def scale_hidden(head: Head, n: int) -> Launch:
    """Return the launch for c·scale/s on H."""
    return stream("scale_hidden", 2 * n * head.width, 2 * n * head.width, logits=0.0)


def add_targets(head: Head, n: int) -> Launch:
    """Return the launch that puts back in dW the rounding loss at the targets, if no two of n rows share one."""
    return stream("add_targets", 6 * n * head.width, 4 * n * head.width, logits=0.0)


def flagged_launches() -> Launch:
    """Return the launch that recomputes rows whose shift was too small: two kernels and a merge, which find no such
    rows."""
    return replace(stream("flagged rows", 0, 0), passes=3)


def cast_weight(head: Head) -> Launch:
    """Return the launch that casts dW from float32 to the head's dtype."""
    return stream("cast dW", 4 * head.vocab * head.width, 2 * head.vocab * head.width, logits=0.0)


# The schedules.


@dataclass(frozen=True)
class Schedule:
    """Forward and backward of the group loss over n rows."""

    name: str
    launches: tuple[Launch, ...]
    scratch: float  # bytes of vocabulary-sized buffers held at once, beside dW and its float32 sums
    chunks: int = 1

    @property
    def flops(self) -> float:
        return sum(launch.flops * launch.count for launch in self.launches)

    @property
    def bytes(self) -> float:
        return sum(launch.bytes * launch.count for launch in self.launches)

    @property
    def logits(self) -> float:
        """Return the bytes of logits, U and gradients of logits that cross device memory."""
        return sum(launch.logits * launch.count for launch in self.launches)

    def resident(self, head: Head) -> float:
        """Return the bytes of the scratch, the head, its gradient and the gradient's float32 sums."""
        return self.scratch + 8 * head.vocab * head.width

    def seconds(self, board: Board) -> float:
        return sum(predict(launch, board) * launch.count for launch in self.launches)


def kept_row(head: Head) -> int:
    """Return the bytes of the memory budget for a row of U in bf16, its float32 dH and its scaled H."""
    return 2 * head.vocab + 6 * head.width


def chunked_row(head: Head) -> int:
    """Return the bytes of the memory budget for a row of float32 logits, their bf16 gradient and dH."""
    return 6 * head.vocab + 6 * head.width


def rows_of_budget(budget: int, row: int, tokens: int) -> tuple[int, int]:
    """Return (chunks, rows of each) if a row needs `row` bytes of the memory budget."""
    if budget < row:
        raise ValueError(f"a budget of {budget} bytes holds no row of {row}: give a larger --budget")
    chunks = math.ceil(tokens / whole_tiles(budget // row, tokens))
    return chunks, math.ceil(tokens / chunks)


def full_logits(board: Board, head: Head, tokens: int, budget: int) -> Schedule:
    """Return the original's schedule: all bf16 logits, cast to float32, log_softmax, gather, and autograd back through
    them.

    The backward pass holds log-probs, their gradient and the logits' gradient, 12 bytes a logit.
    """
    v, d, z = head.vocab, head.width, tokens * head.vocab
    operands = 2 * (tokens + v) * d
    launches = (
        product("logits", tokens, v, d, operands, 2 * z, 2 * z),
        stream("to float32", 2 * z, 4 * z),
        stream("log_softmax", 4 * z, 4 * z, z),
        group_loss_launch(tokens),
        stream("gather, backward", 0, 4 * z),
        stream("log_softmax, backward", 8 * z, 4 * z, z),
        stream("to bf16", 4 * z, 2 * z),
        product("dH", tokens, d, v, 2 * z + 2 * v * d, 2 * tokens * d, 2 * z),
        product("dW", v, d, tokens, 2 * z + 2 * tokens * d, 2 * v * d, 2 * z),
    )
    return Schedule("full logits", launches, 12 * z)


def in_chunks(
    name: str, head: Head, tokens: int, budget: int, row: int, forward: Callable[[int], list[Launch]]
) -> Schedule:
    """Return a schedule in chunks: `forward` makes U or ∂L/∂z of a chunk in bf16, then come both products, and dW to
    bf16 at the end."""
    chunks, n = rows_of_budget(budget, row, tokens)
    every = [replace(launch, count=chunks) for launch in (*forward(n), hidden_product(head, n), finish_hidden(head, n))]
    sums = [weight_product(head, n, first=True), replace(weight_product(head, n, first=False), count=chunks - 1)]
    return Schedule(name, (*every, *sums, cast_weight(head)), n * row, chunks)


def chunked(board: Board, head: Head, tokens: int, budget: int) -> Schedule:
    """Return the schedule with float32 logits by the library, read twice and turned into a bf16 gradient: 6 bytes a
    logit held, 6·N·D·V flops."""

    def forward(n: int) -> list[Launch]:
        return [
            logits_product(head, n),
            gather_launch(head, n),
            group_loss_launch(n),
            gradient_launch(board, head, n),
            add_targets(head, n),
        ]

    return in_chunks("chunked", head, tokens, budget, chunked_row(head), forward)


def kept(board: Board, head: Head, tokens: int, budget: int, config: Config | None = None) -> Schedule:
    """Return the schedule in which `linear_logsumexp` leaves U in bf16: 2 bytes a logit held, 6·N·D·V flops."""

    def forward(n: int) -> list[Launch]:
        return [
            pilot_launch(head, n),
            linear_logsumexp_launch(board, head, n, True, config),
            flagged_launches(),
            group_loss_launch(n),
            scale_hidden(head, n),
            add_targets(head, n),
        ]

    return in_chunks("kept", head, tokens, budget, kept_row(head), forward)


def recomputed(board: Board, head: Head, tokens: int, budget: int) -> Schedule:
    """Return the schedule of `linear_logprobs` and any loss on log-probs: log-probs first, U again in backward.
    8·N·D·V flops."""

    def forward(n: int) -> list[Launch]:
        return [linear_logsumexp_launch(board, head, n, store=True), scale_hidden(head, n), add_targets(head, n)]

    backward = in_chunks("two-pass", head, tokens, budget, kept_row(head), forward)
    first = [linear_logsumexp_launch(board, head, tokens, store=False), group_loss_launch(tokens)]
    return replace(backward, launches=(*first, *backward.launches))


def backward_launches(board: Board, head: Head, n: int) -> list[Launch]:
    """Return the launches for dH and dW without vocabulary-sized scratch: 4·N·D·V flops each, one program on a
    multiprocessor."""
    config = linear_logprobs_backward.config(board.target, "bf16", head.width)
    block, across, depth = (config.constants[name] for name in ("BLOCK_OWN", "BLOCK_OTHER", "BLOCK_D"))
    launches = []
    for name, own, other in (("dH", n, head.vocab), ("dW", head.vocab, n)):
        programs = math.ceil(own / block)
        tiles = programs * math.ceil(other / across)
        sums = 8 * block * head.width * tiles  # the float32 gradient, read and written for every tile
        in_flight = min(board.target.multiprocessors, programs)
        in_memory = 8 * own * head.width if 4 * in_flight * block * head.width <= board.l2_bytes / 2 else sums
        walks = math.ceil(programs / board.target.multiprocessors)
        launches.append(
            Launch(
                f"linear_logprobs_backward, {name}",
                "triton",
                flops=4 * n * head.width * head.vocab,
                read=2 * head.width * (own + walks * other) + in_memory / 2,
                written=in_memory / 2,
                cached=2 * head.width * tiles * (block + 2 * across) + sums,
                exponentials=n * head.vocab,
                fill=full(own, block) * head.width / (head.width + (config.num_stages - 1) * depth),
                busy=busy(programs, board),
                alone=True,
            )
        )
    return launches


def full(length: int, block: int) -> float:
    """Return the share of the blocks that lies inside the matrix."""
    return length / (math.ceil(length / block) * block)


def busy(programs: int, board: Board) -> float:
    """Return the share of the multiprocessors at work, over all waves of programs."""
    count = board.target.multiprocessors
    return programs / (math.ceil(programs / count) * count)


def fused(board: Board, head: Head, tokens: int, budget: int) -> Schedule:
    """Return the schedule without a budget for logits: log-probs, then dH and dW from recomputed tiles. 10·N·D·V flops,
    no byte of logits."""
    launches = (
        linear_logsumexp_launch(board, head, tokens, store=False),
        group_loss_launch(tokens),
        stream("clear dH and dW", 0, 4 * (tokens + head.vocab) * head.width, logits=0.0),
        *backward_launches(board, head, tokens),
        add_targets(head, tokens),
        finish_hidden(head, tokens),
        cast_weight(head),
    )
    return Schedule("fused", launches, 4 * tokens * head.width)


SCHEDULES = (full_logits, chunked, kept, recomputed, fused)


def launches(board: Board, head: Head, tokens: int) -> list[Launch]:
    """Return every kernel and product of the schedules once, on all tokens."""
    return [
        linear_logsumexp_launch(board, head, tokens, store=False),
        linear_logsumexp_launch(board, head, tokens, store=True),
        logits_product(head, tokens),
        gather_launch(head, tokens),
        gradient_launch(board, head, tokens),
        group_loss_launch(tokens),
        hidden_product(head, tokens),
        weight_product(head, tokens, first=True),
        *backward_launches(board, head, tokens),
    ]


def stream_traffic(board: Board, budget: int) -> list[dict]:
    """Return the bytes a logit that the memory-bound kernels move, and the least of any implementation, for the worst
    head.

    The least is each logit read once, each gradient written once, targets, statistics and coefficients once a row.
    """
    config = logits_to_grad.configs(board.target, "fp32")[0]
    found = []
    for kernel, what, read, written, bias in (
        ("logsumexp_gather", "float32 logits", 4, 0, False),
        ("logits_to_grad", "float32 logits to a bf16 gradient", 4, 2, False),
        ("logits_to_grad", "the same, and the bias gradient", 4, 2, True),
        ("logits_to_grad", "float32 logits in place", 4, 4, False),
        ("logits_to_grad", "the same, and the bias gradient", 4, 4, True),
    ):
        worst = None
        for head in HEADS:
            _, n = rows_of_budget(budget, chunked_row(head), 8192)
            logits = n * head.vocab
            least = (read + written) * logits + 20 * n + (4 * head.vocab if bias else 0)
            moved = (read + written) * logits + 20 * n
            if written:
                moved += 20 * n * (math.ceil(head.vocab / config.constants["BLOCK"]) - 1)
            if bias:  # the partial sums of the row blocks, written and read, and their total
                moved += 8 * head.vocab * logits_to_grad.row_blocks(n, config) + 4 * head.vocab
            row = {"kernel": kernel, "what": what, "moved": moved / logits, "least": least / logits}
            if worst is None or row["least"] / row["moved"] < worst["least"] / worst["moved"]:
                worst = row
        found.append(worst)
    return found
