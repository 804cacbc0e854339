"""The steps that time: every configuration, product, schedule and peer (times), and the host beside the device (host).

Each time comes with its errors: a method that rounds its logits is faster because it does less.
"""

from __future__ import annotations

import collections
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exo_fast.backends import products
from exo_fast.backends import triton as backend
from exo_fast.benchmarks.gpu.plan import GIB, Cases, Run, Shape, Unavailable
from exo_fast.benchmarks.methods import peers, problems
from exo_fast.head import Head
from exo_fast.kernels import linear_logsumexp
from exo_fast.kernels.launch import Config
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss, linear_group_loss

WARM_UP_MS, TIMED_MS = 25, 150
CPU_CALLS = 2
ERROR_ROWS = 256
OURS_LIMIT = 5e-3  # of our errors in bf16; peers that round their logits get the ten times wider limit of the op suite
# The peers of the first look at each shape, and of the second.
FIRST_PEERS = ("full-logits", "torch-chunked", "liger-ce", "cce-exact")
OTHER_PEERS = ("full-logits-compiled", "full-logits-fp32", "liger-cute", "cce", "quack", "checkpoint")
HOST_CALLS = 20
KERNELS_SHOWN = 40


def timed(call: Callable[[], object]) -> dict:
    """Return the median of a call's seconds, and its 10th and 90th percentile on a GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        ms = do_bench(call, warmup=WARM_UP_MS, rep=TIMED_MS, quantiles=[0.5, 0.1, 0.9])
        median, *spread = (value * 1e-3 for value in ms)
        return {"seconds": median, "spread": spread}
    call()
    return {"seconds": statistics.median(problems.seconds_of(call) for _ in range(CPU_CALLS))}


def times(run: Run) -> Cases:
    """All shapes in a first look, then all of them again, so that an early end leaves out the least important."""
    shapes = (*run.plan.shapes, run.plan.few)
    for first in (True, False):
        for shape in shapes:
            yield from of_shape(run, shape, first)


def of_shape(run: Run, shape: Shape, first: bool) -> Cases:
    """The cases of one shape; its tensors are made when the first of them runs."""

    @functools.cache
    def inputs() -> problems.Inputs:
        problem = problems.Problem(shape.width, shape.vocab, "bf16", 2, run.plan.completion, shape.tokens)
        return problems.make(problem, run.plan.device)

    def method(name: str, call: peers.Operation | str, **about: Any) -> tuple[str, Callable[[], dict]]:
        return f"{shape.name}/step/{name}", lambda: step(run, shape, inputs(), name, call) | about

    if first:
        for name in ("logits, bf16", "logits", "dH", "dW"):
            yield f"{shape.name}/product/{name}/N{shape.tokens}", functools.partial(product, inputs, name, shape.tokens)
        yield method("exo_fast", ours(), schedule="default", budget=None)
        for peer in FIRST_PEERS:
            yield method(peer, peer)
        return
    for config in linear_logsumexp.configs(run.target, "bf16"):
        for store in (True, False):
            name = f"{shape.name}/linear_logsumexp/{'store' if store else 'no store'}/{config}"
            yield name, functools.partial(configuration, run, shape, inputs, config, store)
    for budget in run.plan.budgets:
        gib = budget // GIB
        yield method(f"exo_fast, kept, {gib} GiB", ours("kept", budget), schedule="kept", budget=budget)
        yield method(f"exo_fast, chunked, {gib} GiB", ours("chunked", budget), schedule="chunked", budget=budget)
    yield method("exo_fast, two passes", ours("two-pass"), schedule="two-pass", budget=None)
    for peer in OTHER_PEERS:
        yield method(peer, peer)
    for rows in run.plan.products:
        if rows < shape.tokens:
            for name in ("logits", "dH", "dW"):
                yield f"{shape.name}/product/{name}/N{rows}", functools.partial(product, inputs, name, rows)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ours(schedule: str | None = None, budget: int | None = None) -> peers.Operation:
    """Return our loss by one of its schedules (None: the table's), as a method that `problems.run` takes. In a dry run
    the kernels run on the CPU, so the backend is named."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor, rewards: Tensor,
            **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        if schedule == "two-pass":
            logps = linear_logprobs(hidden, weight, targets, memory_budget=budget, backend="triton")
            sums = peers.sequence_logps(logps, cu_seqlens).view_as(ref_logps)
            return group_loss(sums, ref_logps, rewards, **options), sums.detach()
        before, backend.SCHEDULE = backend.SCHEDULE, schedule
        try:
            given = (hidden, weight, targets, cu_seqlens, ref_logps, rewards)
            return linear_group_loss(*given, memory_budget=budget, backend="triton", **options)
        finally:
            backend.SCHEDULE = before

    return run


def step(run: Run, shape: Shape, inputs: problems.Inputs, name: str, call: peers.Operation | str) -> dict:
    """Return time, memory and errors of one forward and backward pass of the group loss by a method."""
    device, is_ours = run.plan.device, callable(call)
    if not is_ours and (why := peers.unavailable(call, "bf16", device)):
        raise Unavailable(why)
    method = name.split(",")[0]
    found: dict[str, Any] = {"method": method, "float32_logits": peers.float32_logits(method, "bf16")}
    with peers.settings(method, "bf16", device):
        few = problems.few_rows(inputs, min(ERROR_ROWS, len(inputs.hidden)))
        found["errors"] = problems.errors(call, "group_loss", "both", few)
        limit = OURS_LIMIT if is_ours else problems.TOLERANCE["bf16"]
        found["wrong"] = not all(error <= limit for error in found["errors"].values())  # True for NaN
        given = inputs.require("both")

        def once() -> None:
            for leaf in given.leaves:
                leaf.grad = None
            problems.run(call, "group_loss", given)[0].backward()

        once()
        for leaf in given.leaves:
            leaf.grad = None
        peak = problems.Peak()
        once()
        found["peak_mb"] = round(peak.mb(), 1)
        found |= timed(once)
    return {**found, "tflops": round(shape.flops / found["seconds"] / 1e12, 3)}


def product(inputs: Callable[[], problems.Inputs], name: str, rows: int) -> dict:
    """Time one of the library's products as the schedules make it: logits and dW in float32, dW added to."""
    hidden, weight = inputs().hidden[:rows], inputs().weight
    floats = functools.partial(torch.empty, dtype=torch.float32, device=weight.device)
    if name == "logits, bf16":
        out = hidden.new_empty(rows, len(weight))
        call = functools.partial(torch.mm, hidden, weight.T, out=out)
    elif name == "logits":
        call = functools.partial(products.matmul, hidden, weight.T, floats(rows, len(weight)))
    else:
        u = torch.rand(rows, len(weight), device=weight.device).to(weight.dtype)
        if name == "dH":
            call = functools.partial(products.matmul, u, weight, floats(hidden.shape))
        else:
            call = functools.partial(products.add_matmul, floats(weight.shape).zero_(), u.T, hidden)
    found = timed(call)
    return {**found, "rows": rows, "tflops": round(2 * rows * weight.numel() / found["seconds"] / 1e12, 3)}


def configuration(run: Run, shape: Shape, inputs: Callable[[], problems.Inputs], config: Config, store: bool) -> dict:
    """Time `linear_logsumexp` in one configuration, alone or with U stored, which is all of the forward pass."""
    given = inputs()
    limit = max(run.plan.budgets) // 4
    rows = min(shape.tokens, max(1, limit // (2 * shape.vocab))) if store else shape.tokens
    made = backend.Rows(given.hidden[:rows], Head(given.weight), given.targets[:rows])
    logps = made.floats(made.n)
    key = ("linear_logsumexp", made.target.name, made.dtype, made.width)
    before = backend.configured.get(key)
    backend.configured[key] = config
    try:
        if store:
            chunk = backend.Kept(made, made.n)
            found = timed(lambda: chunk.fill(made, logps))
        else:
            found = timed(lambda: backend.product_statistics(made, logps))
    finally:
        del backend.configured[key]
        if before is not None:
            backend.configured[key] = before
    exact = given.hidden[:8].double() @ given.weight.double().T
    exact = exact.gather(1, given.targets[:8, None]).squeeze(1) - exact.logsumexp(1)
    error = (logps[:8].double() - exact).abs().max().item()
    about = {"store": store, "D": shape.width, "dtype": "bf16", "rows": rows, "constants": config.constants}
    about |= {"num_warps": config.num_warps, "num_stages": config.num_stages, "config": str(config)}
    rate = round(2 * rows * given.weight.numel() / found["seconds"] / 1e12, 3)
    return {**found, **about, "tflops": rate, "errors": {"logps": error}, "wrong": not error < 1e-3}


# Step 5.


def host(run: Run) -> Cases:
    """A step on few rows: the time until it is queued, until it is done, in a CUDA graph, and what runs in it."""
    shape = run.plan.few
    problem = problems.Problem(shape.width, shape.vocab, "bf16", 2, run.plan.completion, shape.tokens)

    @functools.cache
    def given() -> problems.Inputs:
        made = problems.make(problem, run.plan.device).require("both")
        if run.plan.device == "cpu":
            return made
        return replace(made, cu_seqlens=made.cu_seqlens.pin_memory())  # a captured copy reads them in every replay

    def once() -> tuple[Tensor, ...]:
        loss, _ = problems.run(ours(), "group_loss", given())
        return loss, *torch.autograd.grad(loss, given().leaves)

    yield "launches", lambda: launches(once)
    yield "eager", lambda: enqueued(once)
    yield "graph", lambda: captured(run, once)
    yield "profile", lambda: profiled(run, once)


def launches(once: Callable[[], object]) -> dict:
    """Count the launches of our kernels in one step, by name."""
    counts: collections.Counter[str] = collections.Counter()
    original = backend.launch

    def counted(kernel: Any, *arguments: Any, **named: Any) -> None:
        counts[kernel.__name__] += 1
        original(kernel, *arguments, **named)

    once()
    backend.launch = counted
    try:
        once()
    finally:
        backend.launch = original
    return {"ours": dict(counts), "total": sum(counts.values())}


def enqueued(once: Callable[[], object]) -> dict:
    """Return the median seconds until a step is queued, and until it is done."""
    once()
    queued, done = [], []
    for _ in range(HOST_CALLS if torch.cuda.is_available() else CPU_CALLS):
        problems.synchronize()
        begun = time.perf_counter()
        once()
        queued.append(time.perf_counter() - begun)
        problems.synchronize()
        done.append(time.perf_counter() - begun)
    return {"queued_seconds": statistics.median(queued), "seconds": statistics.median(done)}


def captured(run: Run, once: Callable[[], tuple[Tensor, ...]]) -> dict:
    """Return the seconds of a replay of the step as one CUDA graph, and whether it gives the bits of the eager step."""
    if run.plan.device != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    want = once()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = once()
    found = timed(graph.replay)
    torch.cuda.synchronize()
    equal = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return {**found, "same_bits": equal, "wrong": not equal}


def profiled(run: Run, once: Callable[[], object]) -> dict:
    """Return what runs on the device in one step, by name, and how long the device waits in between. On a CPU it counts
    operations."""
    from torch.profiler import ProfilerActivity, profile

    on_device = run.plan.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    once()
    problems.synchronize()
    with profile(activities=activities) as prof:
        once()
        problems.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    events = sorted((e for e in prof.events() if e.device_type == kind), key=lambda event: event.time_range.start)
    if not events:
        raise Unavailable("the profiler saw nothing on the device")
    totals: dict[str, list[float]] = {}
    for event in events:
        totals.setdefault(event.name, []).append(event.time_range.elapsed_us())
    ends, waited = events[0].time_range.start, 0.0
    for event in events:
        waited += max(0.0, event.time_range.start - ends)
        ends = max(ends, event.time_range.end)
    ordered = sorted(totals.items(), key=lambda item: -sum(item[1]))
    return {
        "launches": len(events),
        "span_us": round(ends - events[0].time_range.start, 1),
        "waited_us": round(waited, 1),
        "kernels": [{"name": name[:80], "count": len(us), "us": round(sum(us), 1)} for name, us in
                    ordered[:KERNELS_SHOWN]],
    }  # fmt: skip
