"""Comparison at equal KL: planted differences are found, absent ones are not claimed, intervals hold what they say."""

from pathlib import Path

import numpy as np
import pytest

from exo_fast.training.reports.frontier import Measurement, compare, describe, find_pairs, plot_frontier, win_rates


def world(
    random: np.random.Generator,
    *,
    above: float = 0.0,
    seeds: int = 3,
    prompts: int = 60,
    samples: int = 4,
    seed_spread: float = 0.03,
    kls: tuple[tuple[float, ...], ...] = ((1, 3, 6), (0.7, 2, 5)),
    labels: tuple[str, ...] = ("exo-rw", "dpo-rw"),
) -> tuple[list[Measurement], Measurement]:
    """Policies whose reward is 0.1·√KL, `above` more for the first label; prompts, seeds and samples vary."""
    ease, steepness = random.normal(0, 0.3, prompts), random.normal(0.1, 0.05, prompts)

    def measure(label: str, seed: int, step: int, kl: float, extra: float) -> Measurement:
        mean = ease + steepness * np.sqrt(kl) + extra
        rewards = mean[:, None] + random.normal(0, 0.4, (prompts, samples))
        ratios = random.normal(kl, 0.5 * np.sqrt(kl) + 1e-6, (prompts, samples)) if kl else np.zeros((prompts, samples))
        return Measurement(label, seed, step, rewards, ratios)

    reference = measure("SFT", 0, 0, 0.0, 0.0)
    found = []
    for label in labels:
        first = label.startswith("exo")
        for seed in range(seeds):
            luck = random.normal(0, seed_spread)
            for step, kl in enumerate(kls[0 if first else 1], 1):
                kl = kl * np.exp(random.normal(0, 0.05))
                found.append(measure(label, seed, step, kl, above * first + luck))
    return found, reference


def test_a_planted_difference_is_found_with_its_sign_and_no_difference_is_not_claimed() -> None:
    for above, words in ((0.3, "lies above"), (-0.3, "lies below"), (0.0, "cannot be told apart from")):
        measurements, reference = world(np.random.default_rng(1), above=above)
        found = compare(measurements, reference, "exo-rw", "dpo-rw")
        assert f"exo-rw {words} dpo-rw at equal KL here" in found.verdict
        assert found.verdict.endswith("nats, 3 seeds.")
        assert found.difference.low < above < found.difference.high
        assert found.kl_range == pytest.approx((1, 5), rel=0.25)


def test_equal_kl_is_what_is_compared() -> None:
    """DPO goes much further here and gains more; at equal KL the two are the same."""
    measurements, reference = world(np.random.default_rng(2), kls=((0.5, 1, 2), (1, 6, 12)), prompts=300)
    gains = {m.label: describe(m, reference)["gain"] for m in measurements}  # the last checkpoint of each
    assert gains["dpo-rw"] - gains["exo-rw"] > 0.1
    assert "cannot be told apart" in compare(measurements, reference, "exo-rw", "dpo-rw").verdict


@pytest.mark.parametrize(("seed_spread", "seeds"), [(0.0, 3), (0.1, 3), (0.0, 1)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(seed_spread: float, seeds: int) -> None:
    random, covered, worlds = np.random.default_rng(3), 0, 100
    for _ in range(worlds):
        measurements, reference = world(random, above=0.05, seed_spread=seed_spread, seeds=seeds, prompts=40)
        found = compare(measurements, reference, "exo-rw", "dpo-rw", resamples=200).difference
        covered += found.low <= 0.05 <= found.high
    assert 0.88 * worlds <= covered  # 95 of 100 are claimed; 88 or fewer would happen once in 300 such tests


def test_curves_are_straight_lines_by_kl_whatever_the_order_of_steps() -> None:
    def exact(label: str, seed: int, step: int, kl: float, reward: float) -> Measurement:
        return Measurement(label, seed, step, np.full((5, 2), reward), np.full((5, 2), kl))

    reference = exact("SFT", 0, 0, 0.0, 0.0)
    dpo = [exact("dpo-rw", 0, 1, 1.0, 1.0), exact("dpo-rw", 0, 2, 3.0, 1.0)]
    # KL 1, 3, 2 after steps 1, 2, 3; the mean of the curve from 1 to 3 is (1 + 2)/2·½ + (2 + 0)/2·½.
    exo = [exact("exo-rw", 0, 1, 1.0, 1.0), exact("exo-rw", 0, 2, 3.0, 0.0), exact("exo-rw", 0, 3, 2.0, 2.0)]
    found = compare([*exo, *dpo], reference, "exo-rw", "dpo-rw", resamples=20)
    assert found.kl_range == (1.0, 3.0)
    assert found.difference.value == pytest.approx(1.25 - 1.0, abs=1e-3)
    assert "lies above" in found.verdict
    assert "With one seed the interval holds for these runs" in found.verdict


def test_policies_that_did_not_reach_one_kl_are_compared_from_the_sft_model_and_it_is_said() -> None:
    measurements, reference = world(np.random.default_rng(4), kls=((6, 8), (0.5, 1)))
    found = compare(measurements, reference, "exo-rw", "dpo-rw")
    assert found.kl_range[0] == 0
    assert "do not overlap in KL" in found.verdict
    still = [m for m in measurements if m.label == "exo-rw"]
    still += [Measurement("dpo-rw", 0, 1, m.rewards, -m.log_ratios) for m in still[:1]]
    assert "share no range of KL" in compare(still, reference, "exo-rw", "dpo-rw").verdict


def test_numbers_of_one_model() -> None:
    reference = Measurement("SFT", 0, 0, np.array([[0.0, 1.0], [3.0, 1.0]]), np.zeros((2, 2)))
    policy = Measurement("exo", 0, 5, np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert win_rates(policy.rewards, reference.rewards).tolist() == [0.75, 0.5]
    found = describe(policy, reference)
    assert (found["reward"], found["gain"], found["kl"], found["win_rate"]) == (1.0, -0.25, 2.5, 0.625)
    assert found["kl_standard_error"] == pytest.approx(1.0)
    assert found["win_rate_interval"][0] <= 0.625 <= found["win_rate_interval"][1]


def test_pairs_are_exo_against_dpo_with_the_same_target() -> None:
    assert find_pairs(["dpo-rw", "exo-rw", "exo-pref", "mine"]) == [("exo-rw", "dpo-rw")]
    assert find_pairs(["exo-rw-k4", "dpo-rw", "dpo-rw-k4"]) == [("exo-rw-k4", "dpo-rw-k4")]


@pytest.mark.parametrize("labels", [("exo-rw", "dpo-rw", "exo-pref", "dpo-pref"), ("mine",)])
def test_the_plot_is_written(tmp_path: Path, labels: tuple[str, ...]) -> None:
    measurements, reference = world(np.random.default_rng(5), labels=labels, above=0.05, prompts=100)
    plot_frontier(measurements, reference, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
