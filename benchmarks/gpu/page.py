"""The results in words and tables: the report, the tables of docs/gpu.md, the verdict, and the tuned configurations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from exo_fast.benchmarks.gpu.plan import CARD, DRY, GIB, STEPS, Shape
from exo_fast.benchmarks.harness.tables import markdown, rewrite

if TYPE_CHECKING:
    from exo_fast.kernels.tuned import Table

LABEL, NOT_YET = "gpu", "*Not measured yet.*"
TABLES = ("card", "errors", "tests", "steps", "kernels", "products", "host", "sanitizer", "training")
WORTH = 1.03  # a setting is advised from this gain on
SMALL_WORDS = 160


def words(row: dict) -> str:
    """Describe a row in one short line."""
    for kind in ("failed", "stopped", "skipped"):
        if kind in row:
            return f"{kind}: {row[kind]}"[:SMALL_WORDS]
    said = []
    if "seconds" in row:
        said.append(f"{1e3 * row['seconds']:.4g} ms")
    said += [f"{row[key]:.4g} {unit}" for key, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")) if key in row]
    if isinstance(row.get("errors"), dict):
        said.append("errors " + ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()))
    said += [f"{row[f'tests_{key}']} {key}" for key in ("passed", "failed", "skipped") if f"tests_{key}" in row]
    said += [f"{row[key]:,} {unit}" for key, unit in (("peak_mb", "MB"), ("row_tokens", "tokens")) if key in row]
    if "log-prob" in row:
        said.append(f"log-prob {row['log-prob']['rms']:.1e} rms, {row['log-prob']['mean']:+.1e} mean")
    if row.get("wrong"):
        said.append("WRONG")
    return ", ".join(said) or "done"


def of(results: dict, step: str) -> dict[str, dict]:
    """Return the rows of a step by name, without rows that were skipped, failed or stopped."""
    rows = results["steps"].get(step, {}).get("rows", {})
    return {name: row for name, row in rows.items() if "skipped" not in row and not lost(row)}


def lost(row: dict) -> bool:
    """Check whether a row has no result: it failed, or its time was up."""
    return "failed" in row or "stopped" in row


def wrong(results: dict) -> list[str]:
    """Return our faults and failures in words; an empty list if all is well. Too little memory is no fault."""
    found = []
    for name, step in results["steps"].items():
        if step["state"] == "failed":
            found.append(f"{name}: {step.get('why', 'failed')}")
        for row in step["rows"].values():
            method = row["name"].partition("/step/")[2]
            if method and not method.startswith("exo_fast"):
                continue  # a peer's fault
            if "failed" in row:
                if "out of memory" not in row["failed"]:
                    found.append(f"{name}, {row['name']}: {row['failed']}")
            elif row.get("wrong"):
                tests = [failure["test"].split("::")[-1] for failure in row.get("failures", [])]
                more = f"{row['tests_failed']} tests failed, such as {', '.join(tests[:3])}" if tests else words(row)
                found.append(f"{name}, {row['name']}: {more}")
    return found


def shapes(results: dict) -> tuple[Shape, ...]:
    """Return the shapes that were timed."""
    plan = DRY if results["dry_run"] else CARD
    return (*plan.shapes, plan.few)


def rate(results: dict) -> float | None:
    """Return the flop/s of the fastest bf16 product of the run, which floors are made of."""
    rows = [row for step in ("machine", "times") for name, row in of(results, step).items() if "product/" in name]
    return max((row["tflops"] * 1e12 for row in rows if row.get("tflops")), default=None)


def steps_of(results: dict, shape: Shape) -> list[tuple[str, dict]]:
    """Return (name, row) of the methods that were timed on a shape, the fastest first."""
    start = f"{shape.name}/step/"
    rows = [(name.removeprefix(start), row) for name, row in of(results, "times").items() if name.startswith(start)]
    return sorted(rows, key=lambda pair: pair[1]["seconds"])


def ours(row: dict) -> bool:
    return bool(row["method"].startswith("exo_fast"))


def fastest(results: dict, shape: Shape) -> dict[str, tuple[str, dict]]:
    """Return the fastest of ours, of the peers, and of the peers whose logits are float32, as far as there are any."""
    found: dict[str, tuple[str, dict]] = {}
    for name, row in steps_of(results, shape):
        if row.get("wrong"):
            continue
        kinds = ["ours"] if ours(row) else ["any", *(["float32"] if row["float32_logits"] else [])]
        for kind in kinds:
            found.setdefault(kind, (name, row))
    return found


# The tables.


def tables(results: dict | None) -> dict[str, str]:
    """Return the Markdown of each table by its name; NOT_YET for one that has no rows."""
    if results is None:
        return dict.fromkeys(TABLES, NOT_YET)
    made = {
        "card": _card, "errors": _errors, "tests": _tests, "steps": _steps, "kernels": _kernels, "products": _products,
        "host": _host, "sanitizer": _sanitizer, "training": _training,
    }  # fmt: skip
    return {name: made[name](results) or NOT_YET for name in TABLES}


def rewrite_page(path: Path, results: dict) -> None:
    """Write the tables between their marks in a page."""
    rewrite(path, LABEL, tables(results))


def _card(results: dict) -> str:
    rows = of(results, "machine")
    about = rows.get("versions", {})
    versions = {name: text for name, text in results["versions"].items() if text}
    lines = [["card", str(about.get("card", "no GPU"))], ["clocks", str(about.get("clocks", ""))]]
    lines += [["date, commit", f"{results['date']}, {results['commit']}"]]
    lines += [["versions", ", ".join(f"{name} {text}" for name, text in versions.items())]]
    lines += [[name, words(row)] for name, row in rows.items() if name != "versions"]
    return markdown(["", ""], lines, left=2) if rows else ""


def _errors(results: dict) -> str:
    lines = []
    for name, row in of(results, "slope").items():
        if "logit" in row:
            cells = [f"{row[way][kind]:+.1e}" for way in ("logit", "log-prob", "library") for kind in ("rms", "mean")]
            lines.append([name, *cells])
        elif "exponents" in row:
            exponents = [f"D^{row['exponents'][way]:.2f}" for way in ("logit", "log-prob", "library")]
            lines.append([name, *(cell for exponent in exponents for cell in (exponent, ""))])
    header = ["nats", "logit, rms", "mean", "log-prob, rms", "mean", "logit by the library, rms", "mean"]
    return markdown(header, lines) if lines else ""


def _tests(results: dict) -> str:
    rows = {name: row for name, row in of(results, "tests").items() if "tests_passed" in row}
    lines = [
        [
            name,
            *(str(row[f"tests_{key}"]) for key in ("passed", "failed", "skipped")),
            "yes" if row["time_was_up"] else "no",
        ]
        for name, row in rows.items()
    ]
    failures = [f"- `{failure['test']}`: {failure['words']}" for row in rows.values() for failure in row["failures"]]
    table = markdown(["tests/gpu", "passed", "failed", "skipped", "time was up"], lines) if lines else ""
    return "\n".join([table, *(["", *failures] if failures else [])])


def _steps(results: dict) -> str:
    """Every method on every shape: time, its ratio to the floor and to ours, memory and errors."""
    speed, lines = rate(results), []
    for shape in shapes(results):
        best = fastest(results, shape).get("ours")
        for name, row in steps_of(results, shape):
            worst = row["errors"]
            share = f"{shape.flops / speed / row['seconds']:.2f}" if speed else ""
            over = f"{row['seconds'] / best[1]['seconds']:.2f}" if best else ""
            lines.append(
                [
                    f"{shape.name}: {shape.tokens:,} × {shape.width:,} × {shape.vocab:,}",
                    f"**{name}**" if ours(row) else name,
                    f"{1e3 * row['seconds']:.2f}",
                    share,
                    over,
                    f"{row['peak_mb'] / 1e3:.2f}",
                    *(f"{worst[key]:.1e}" if key in worst else "" for key in ("logps", "dH", "dW")),
                    ("yes" if row["float32_logits"] else "no") + (", **wrong**" if row.get("wrong") else ""),
                ]
            )
    header = ["N × D × V", "method", "ms", "floor / time", "time / ours", "peak, GB", "log-probs, nats", "dH", "dW"]
    return markdown([*header, "float32 logits"], lines, left=2) if lines else ""


def _kernels(results: dict) -> str:
    lines = [
        [name.split("/")[0], "U stored" if row["store"] else "no store", row["config"], f"{row['rows']:,}",
         f"{1e3 * row['seconds']:.3f}", f"{row['tflops']:.1f}"]
        for name, row in of(results, "times").items() if "/linear_logsumexp/" in name
    ]  # fmt: skip
    return markdown(["shape", "", "configuration", "rows", "ms", "TFLOP/s"], lines, left=3) if lines else ""


def _products(results: dict) -> str:
    lines = [
        [
            name.split("/")[0],
            name.split("/")[2],
            f"{row['rows']:,}",
            f"{1e3 * row['seconds']:.3f}",
            f"{row['tflops']:.1f}",
        ]
        for name, row in of(results, "times").items()
        if "/product/" in name
    ]
    return markdown(["shape", "product", "rows", "ms", "TFLOP/s"], lines, left=2) if lines else ""


def _host(results: dict) -> str:
    rows, lines = of(results, "host"), []
    if "launches" in rows:
        counts = ", ".join(f"{name} {count}" for name, count in rows["launches"]["ours"].items())
        lines.append(["launches of ours", f"{rows['launches']['total']}: {counts}"])
    if "eager" in rows:
        lines.append(["eager, until queued", f"{1e3 * rows['eager']['queued_seconds']:.3f} ms"])
        lines.append(["eager, until done", f"{1e3 * rows['eager']['seconds']:.3f} ms"])
    if "graph" in rows:
        bits = "the same bits" if rows["graph"]["same_bits"] else "**other bits**"
        lines.append(["CUDA graph", f"{1e3 * rows['graph']['seconds']:.3f} ms, {bits}"])
    if "profile" in rows:
        found = rows["profile"]
        lines.append(
            ["in the profile", f"{found['launches']} launches in {found['span_us']} µs, {found['waited_us']} idle"]
        )
    return markdown(["N = 512", ""], lines, left=2) if lines else ""


def _sanitizer(results: dict) -> str:
    rows = of(results, "sanitizer")
    lines = [[name, row.get("summary", "")] for name, row in rows.items()]
    return markdown(["check", "result"], lines, left=2) if lines else ""


def _training(results: dict) -> str:
    lines = []
    for name, row in of(results, "align").items():
        if "losses" in row:
            loss = f"{row['losses'][0]:.4f} → {row['losses'][-1]:.4f}"
            cells = [f"{1e3 * row['seconds']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['peak_mb'] / 1e3:.2f}"]
            lines.append([name, loss, *cells, " ".join(map(str, row["compiled"])), ""])
        elif "row_tokens" in row:
            peak = f"{row.get('peak_mb', 0) / 1e3:.2f}"
            lines.append([name, "", "", "", peak, "", f"{row['row_tokens']:,}, ended by {row['ended_by']}"])
    header = ["training", "loss", "ms a step", "tokens / s", "peak, GB", "programs compiled", "longest row, tokens"]
    return markdown(header, lines, left=1) if lines else ""


def report(results: dict) -> str:
    """Return the report of a run: the verdict and all tables."""
    parts = ["# exo_fast on this GPU" if not results["dry_run"] else "# A dry run of exo-fast gpu", *verdict(results)]
    for name, table in tables(results).items():
        parts += [f"## {name.capitalize()}", table]
    return "\n\n".join(parts) + "\n"


# The verdict.


def verdict(results: dict) -> list[str]:
    """Return the run's findings in plain words: right numbers, speed, settings to choose, and open questions."""
    found = wrong(results)
    if results["dry_run"]:
        text = "A dry run: every step was gone through on the CPU. Its times mean nothing."
        return [text, *(f"WRONG: {what}" for what in found), *_unknown(results)]
    lines = [_right(results, found), *(f"  {what}" for what in found)]
    lines += [*_fast(results), *_settings(results), *_unknown(results)]
    return lines


def _right(results: dict, found: list[str]) -> str:
    if found:
        return "WRONG or failed, so do not train with it before this is understood:"
    rows = [row for row in of(results, "tests").values() if "tests_passed" in row]
    tests = sum(row["tests_passed"] for row in rows)
    passed = f"{tests} tests passed, and " if tests else ""
    return f"RIGHT: {passed}every number that was compared with float64 is within its limit."


def _fast(results: dict) -> list[str]:
    speed, lines = rate(results), []
    for shape in shapes(results):
        best = fastest(results, shape)
        if "ours" not in best:
            continue
        name, row = best["ours"]
        text = f"FAST, {shape.tokens:,} tokens, D {shape.width:,}, V {shape.vocab:,}: "
        text += f"{1e3 * row['seconds']:.2f} ms ({name})"
        if speed:
            text += f", {shape.flops / speed / row['seconds']:.0%} of the rate of this card's fastest product"
        for kind, who in (("float32", "the fastest peer with float32 logits"), ("any", "the fastest of all peers")):
            if kind in best:
                other, theirs = best[kind]
                text += f"; {theirs['seconds'] / row['seconds']:.2f} times as fast as {who}, {other}"
        lines.append(text + ".")
    return lines


def _settings(results: dict) -> list[str]:
    """Return the settings that would be faster than the defaults, from the timings and the training steps."""
    lines = []
    for shape in shapes(results):
        rows = {name: row for name, row in steps_of(results, shape) if ours(row)}
        usual = rows.get("exo_fast")
        kept = [(row["seconds"], row["budget"]) for row in rows.values() if row.get("schedule") == "kept"]
        if usual and kept and usual["seconds"] > WORTH * min(kept)[0]:
            budget = min(budget for seconds, budget in kept if seconds <= 1.01 * min(kept)[0])
            gain = usual["seconds"] / min(kept)[0]
            text = f"SET, at {shape.name}: --memory_budget {budget // GIB}GiB (a number of bytes in Python)"
            lines.append(f"{text}, {gain:.2f} times as fast as the default.")
    sdpa, flex = (of(results, "align").get(f"exo_fast, {attention}") for attention in ("sdpa", "flex_attention"))
    if sdpa and flex:
        better, worse, name = (
            (flex, sdpa, "flex_attention") if flex["seconds"] < sdpa["seconds"] else (sdpa, flex, "sdpa")
        )
        lines.append(f"SET: attn_implementation={name}, {worse['seconds'] / better['seconds']:.2f} times as fast here.")
    if (made := tuned(results)) is not None:
        lines.append(f"SET: EXO_FAST_TUNED to the folder of {made.target}.json, which has the fastest configurations.")
    return lines


def _unknown(results: dict) -> list[str]:
    lines = []
    for name in STEPS:
        step = results["steps"].get(name)
        state = "was not run" if step is None else step["state"]
        if state != "done":
            why = f": {step['why']}" if step and "why" in step else ""
            lines.append(f"NOT KNOWN, {STEPS[name].question}: {name} {state}{why}.")
    for name, row in results["steps"].get("machine", {"rows": {}})["rows"].items():
        if name.startswith("import/") and "skipped" in row:
            lines.append(f"NOT USABLE, {name.removeprefix('import/')}: {row['skipped']}.")
    return lines


# The tuned table.


def tuned(results: dict) -> Table | None:
    """Return the choices that this run makes for its target, as `kernels/tuned/` holds them: the fastest configuration
    of `linear_logsumexp` and the faster schedule at each D; None if no configuration was timed.

    fp16 gets the choices of bf16: operands are as large, and the tensor cores as fast.
    """
    from exo_fast.kernels.launch import Config
    from exo_fast.kernels.tuned import Row, Schedule, Table, ranges

    about = of(results, "machine").get("versions")
    large = {shape.name for shape in (DRY if results["dry_run"] else CARD).shapes}
    timed = [row for name, row in of(results, "times").items() if name.split("/")[0] in large and not row.get("wrong")]
    rows = []
    for dtype, store in (("bf16", False), ("bf16", True), ("fp16", False)):
        best: dict[int, dict] = {}
        for row in timed:
            if (
                row.get("store") is store
                and row["seconds"] < best.get(row["D"], row | {"seconds": math.inf})["seconds"]
            ):
                best[row["D"]] = row
        configs = {D: Config(row["constants"], row["num_warps"], row["num_stages"]) for D, row in best.items()}
        rows += [Row("linear_logsumexp", dtype, store, up_to, config) for up_to, config in ranges(configs)]
    if not rows or about is None:
        return None
    faster = {}
    for shape in shapes(results):
        found = [row for _, row in steps_of(results, shape) if row.get("schedule") in ("kept", "chunked")]
        if shape.name in large and len({row["schedule"] for row in found}) == 2:
            faster[shape.width] = found[0]["schedule"]  # the fastest comes first
    source = {
        "kind": "measurement", "card": about["card"]["name"] if "card" in about else "no card: a dry run",
        "torch": results["versions"]["torch"], "triton": results["versions"]["triton"], "date": results["date"][:10],
        "command": results["command"],
    }  # fmt: skip
    schedules = tuple(Schedule("bf16", up_to, schedule) for up_to, schedule in ranges(faster))
    return Table(about["target"], source, tuple(rows), schedules)
