"""benchmarks/suites/scaling.py: its curves, and the exponents it fits to them."""

import pytest

from exo_fast.benchmarks.suites import scaling


def test_names_are_unique_and_every_curve_has_points() -> None:
    cases = scaling.cases()
    assert len({str(case) for case in cases}) == len(cases)
    curves: dict[tuple, set[int]] = {}
    for case in cases:
        curves.setdefault((case.axis, case.method, case.precision, case.width), set()).add(case.size)
        assert case.tokens % (case.candidates * case.op.completion) == 0
    assert all(len(sizes) > 1 for sizes in curves.values())
    ours = {axis: sizes for (axis, method, *_), sizes in curves.items() if method == "exo_fast"}
    assert (min(ours["N"]), max(ours["N"])) == (2048, 131072)
    assert (min(ours["V"]), max(ours["V"])) == (32768, 262144)
    assert ours["K"] == {2, 4, 8, 16}


def test_exponent() -> None:
    sizes = [2048, 8192, 131072]
    assert scaling.exponent(sizes, [3 * n**1.02 for n in sizes]) == pytest.approx(1.02)
    assert scaling.exponent(sizes, [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_summary_fits_each_curve() -> None:
    def row(case: scaling.Case, seconds: float, scratch: float) -> dict:
        return {**vars(case), "seconds": seconds, "baseline_seconds": seconds * 0.9, "scratch_mb": scratch}

    small = scaling.SMALL
    rows = [row(scaling.Case("N", "exo_fast", *small, "fp32", 2, n), n * 1e-3, 200.0) for n in (2048, 4096, 8192)]
    rows += [row(scaling.Case("V", "exo_fast", 256, v, "fp32", 2, 4096), v * 1e-4, v * 1e-3) for v in (2**15, 2**16)]
    rows += [row(scaling.Case("N", "cce", *small, "fp32", 2, 2048), 2.0, 400.0)]  # one point is no curve
    rows += [{**vars(scaling.Case("N", "cce", *small, "fp32", 2, 4096)), "skipped": "does not fit"}]
    fits = {(fit["axis"], fit["method"]): fit for fit in scaling.summary(rows)["fits"]}
    assert set(fits) == {("N", "exo_fast"), ("V", "exo_fast")}
    n, v = fits["N", "exo_fast"], fits["V", "exo_fast"]
    assert (n["time"], n["time_over_floor"], n["memory"]) == (1.0, 0.0, 0.0)
    assert (n["from"], n["to"], n["vocab"]) == (2048, 8192, small[1])
    assert (v["time"], v["memory"], v["vocab"]) == (1.0, 1.0, None)
