"""report.html: its contents, hostile text that stays text, and its look in a real browser."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_rows

from exo_fast.training.pipeline import run
from exo_fast.training.reports import html
from exo_fast.training.reports.curves import METRICS, MOST_POINTS, charts, number, thin
from exo_fast.training.reports.rendering import UPLOT
from exo_fast.training.stages.align import AlignConfig, align

Settings = Callable[..., dict[str, Any]]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'> & \"quoted\" 'so'"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0 "
    "--host-resolver-rules=MAP\t*\t~NOTFOUND"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium")


def browse(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """Open `page` in a browser that has no network; return its output and the lines of its console."""
    flags = [flag.replace("\t", " ") for flag in FLAGS.split(" ")]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text outside style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)


def drawn(parsed: Tags) -> list[list[dict[str, Any]]]:
    """The curves of each plot of a page."""
    return [json.loads(found["data-curves"]) for _, found in parsed.tags if "data-curves" in found]


def count(curves: list[dict[str, Any]]) -> int:
    """Return the number of points of a plot's curves."""
    return sum(len(values) for curve in curves for values in curve["points"][1:])


def points_of(history: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of logged values of each title's metric, held out and in training."""
    names = {name for entry in history for name in entry}
    return {
        title: sum(name in entry for entry in history) + sum(f"eval_{name}" in entry for entry in history)
        for name, title in METRICS.items()
        if {name, f"eval_{name}"} & names
    }


@pytest.fixture(scope="module")
def hostile_run(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished alignment whose output directory, samples, warnings and configuration hold hostile text."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "data"
    data.mkdir()
    (data / "train.json").write_text(json.dumps(make_rows(16)))
    (data / "test.json").write_text(json.dumps(make_rows(4, seed=1)))
    output = folder / "a <b>run & 'more'"
    options = {"data": str(data), "max_seq_len": 64, "max_gen_len": 16, "loss_type": "exo-rw", "learning_rate": 3e-3}
    options |= {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "epoch"}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "engine": "torch", "run_name": HOSTILE}
    cache = str(folder / "cache")
    align(AlignConfig(model_name_or_path=tiny_llama, output_dir=str(output), reference_cache_dir=cache, **options))
    samples = json.loads((output / "samples.json").read_text())
    samples["rows"][0]["prompt"] = samples["rows"][0]["texts"][0]["text"] = HOSTILE
    (output / "samples.json").write_text(json.dumps(samples))
    summary = json.loads((output / "summary.json").read_text())
    summary["warnings"] = {HOSTILE: 2}
    (output / "summary.json").write_text(json.dumps(summary))
    html.write(output)
    return output


def history_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_what_the_page_shows(hostile_run: Path) -> None:
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert len(page) < 2**20
    parsed, summary = Tags(page), json.loads((hostile_run / "summary.json").read_text())
    words = " ".join(parsed.words)
    assert f"{summary['steps']} optimizer steps" in words
    for kind in ("torch", "transformers", "deepspeed", "exo_fast"):
        assert f"{kind} {summary['versions'][kind]}" in words
    for name in summary["config"]:
        assert name in words
    samples = json.loads((hostile_run / "samples.json").read_text())
    numbers = [text["numbers"] for row in samples["rows"] for text in row["texts"]]
    assert len(numbers) == 16
    for found in numbers:
        for name in ("reward", "log-ratio", "log-prob"):
            assert f"{name} {number(found[name])}" in words
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert {"./checkpoint-4", "./checkpoint-8", "./summary.json", "./README.md"} <= set(links)
    assert all((hostile_run / link).exists() for link in links)
    history = history_of(hostile_run)
    assert [count(curves) for curves in drawn(parsed)] == list(points_of(history).values())
    steps, losses = drawn(parsed)[0][0]["points"]
    assert steps == [entry["step"] for entry in history if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in history if "loss" in entry], rel=1e-7)


def test_fields_that_were_set_are_marked(hostile_run: Path) -> None:
    rows = re.findall(r'<tr class="changed"><td>(\w+)</td>', (hostile_run / "report.html").read_text())
    assert {"learning_rate", "loss_type", "logging_steps", "max_gen_len"} <= set(rows)
    assert not {"beta_pi", "lora_r", "per_device_eval_batch_size", "debug", "seed"} & set(rows)


def test_samples_are_those_of_the_trained_model(hostile_run: Path) -> None:
    """All four held-out prompts are shown: their log-ratios average to the KL that the last evaluation gave."""
    samples = json.loads((hostile_run / "samples.json").read_text())
    ratios = [text["numbers"]["log-ratio"] for row in samples["rows"] for text in row["texts"]]
    assert samples["split"] == "eval"
    evaluation = [entry for entry in history_of(hostile_run) if "eval_kl" in entry][-1]
    assert abs(evaluation["eval_kl"]) > 0.05
    assert -sum(ratios) / len(ratios) == pytest.approx(evaluation["eval_kl"], rel=1e-4)


def test_nothing_outside_the_file_is_named(hostile_run: Path) -> None:
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    parsed = Tags(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "form", "base", "b" * 2)
        assert not [name for name in attributes if name in ("src", "srcset", "style") or name.startswith("on")]
        if "href" in attributes:
            assert re.fullmatch(r"(\./|#)[^:]*", attributes["href"])
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "url(" not in page
    assert "@import" not in page


def test_the_same_run_gives_the_same_page(hostile_run: Path) -> None:
    before = (hostile_run / "report.html").read_bytes()
    assert html.main([str(hostile_run)]) == 0
    assert (hostile_run / "report.html").read_bytes() == before


@needs_browser
def test_a_browser_shows_every_point_and_runs_nothing_hostile(hostile_run: Path, tmp_path: Path) -> None:
    dom, console = browse(hostile_run / "report.html", tmp_path / "profile", "--dump-dom")
    assert console == []  # a refusal of the policy would be here too
    assert re.search(r"<title>exo-fast align: [^<]*</title>", dom)
    assert "<title>owned" not in dom
    figures = re.findall(r"<figure>.*?</figure>", dom, re.DOTALL)
    assert [re.search(r"<figcaption>(.*?)</figcaption>", figure)[1] for figure in figures] == list(
        points_of(history_of(hostile_run))
    )
    assert all("<canvas" in figure for figure in figures)


def browse_with(page: Path, script: str, folder: Path) -> str:
    """The title that `script` gave a copy of the page whose policy allows a second script."""
    content = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    (folder / "page.html").write_text(content.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dom, console = browse(folder / "page.html", folder / "profile", "--dump-dom", "--virtual-time-budget=3000")
    assert console == []
    return unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1])


@needs_browser
def test_a_browser_draws_every_point(hostile_run: Path, tmp_path: Path) -> None:
    script = """
    const counts = [...document.querySelectorAll(".plot")].map(({plot}) =>
      plot.data.slice(1).flat().filter((value) => value != null).length);
    document.title = JSON.stringify(counts);
    """
    found = json.loads(browse_with(hostile_run / "report.html", script, tmp_path))
    assert found == list(points_of(history_of(hostile_run)).values())


@needs_browser
def test_values_are_shown_under_the_pointer(hostile_run: Path, tmp_path: Path) -> None:
    """The page's own script, run by a browser on a copy of the page whose policy allows a second one, that points."""
    script = """
    setTimeout(() => {
      const over = document.querySelector(".plot .u-over"), box = over.getBoundingClientRect();
      over.dispatchEvent(new MouseEvent("mouseenter", {clientX: box.right - 1, clientY: box.top + 20, bubbles: true}));
      over.dispatchEvent(new MouseEvent("mousemove", {clientX: box.right - 1, clientY: box.top + 20, bubbles: true}));
      setTimeout(() => {
        const cells = document.querySelector(".plot").querySelectorAll(".u-series");
        const texts = [...cells].map((cell) => [...cell.children].map((one) => one.textContent).join(" "));
        document.title = texts.slice(1).join(" · ");
      }, 500);
    }, 500);
    """
    history = history_of(hostile_run)
    training = [entry["loss"] for entry in history if "loss" in entry][-1]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    shown = browse_with(hostile_run / "report.html", script, tmp_path)
    assert shown == f"training {number(training)} @ 8 · held out {number(held_out)} @ 8"


@needs_browser
@pytest.mark.parametrize("width", [1280, 500], ids=["desktop", "phone"])
def test_a_picture_of_the_page_is_not_blank(hostile_run: Path, tmp_path: Path, width: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install pillow (comes with matplotlib)")
    picture = tmp_path / "page.png"
    browse(hostile_run / "report.html", tmp_path / "p", f"--screenshot={picture}", f"--window-size={width},1200")
    shown = image.open(picture).convert("RGB")
    assert shown.size == (width, 1200)
    assert shown.getcolors(50) is None  # there are more
    lines = [shown.crop((0, y, width, y + 1)).getextrema() for y in range(1200)]
    assert sum(any(low < high for low, high in channels) for channels in lines) > 800  # most have something on them
    margin = shown.crop((width - 6, 0, width, 1200))  # nothing sticks out to the right
    assert len(margin.getcolors()) == 1


# Around a run


def test_a_page_that_is_missing_is_made_again(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(engine="torch", num_train_epochs=1)
    align(AlignConfig(**options))
    output = Path(options["output_dir"])
    assert f"the report is {output / 'report.html'}" in capsys.readouterr().out
    first = (output / "report.html").read_bytes()
    (output / "report.html").unlink()
    (output / "README.md").write_text("what a person wrote")
    align(AlignConfig(**options))
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert (output / "report.html").read_bytes() == first
    assert (output / "README.md").read_text() == "what a person wrote"


def test_a_report_that_cannot_be_written_loses_no_training(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    options = settings(engine="torch", num_train_epochs=1)
    output = Path(options["output_dir"])
    (output / "report.html").mkdir(parents=True)  # in its way
    (output / "report.html" / "x").touch()
    summary = align(AlignConfig(**options))
    assert json.loads((output / "summary.json").read_text())["steps"] == summary["steps"] == 4
    assert (output / "model.safetensors").is_file()
    assert "report.html was not written" in caplog.text


def test_warnings_of_a_run_are_in_its_summary(settings: Settings, tiny_bloom: str) -> None:
    options = settings(engine="torch", num_train_epochs=1, model_name_or_path=tiny_bloom)
    summary = align(AlignConfig(**options))
    (message,) = [text for text in summary["warnings"] if "cannot share their prompt" in text]
    assert "cannot share their prompt" in Path(options["output_dir"], "report.html").read_text()
    assert summary["warnings"][message] == 1


def test_the_command_is_told_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    from exo_fast.training import cli
    from exo_fast.training.reports.facts import command_line

    words = ["align", "--hub_token", "hf_1", "--data", "a b", "--hub_token=hf_2", "--hub-token", "hf_3", "--bf16"]
    monkeypatch.setattr("sys.argv", ["/opt/bin/exo-fast", *words])
    told = command_line()
    assert told == "exo-fast align --hub_token HIDDEN --data 'a b' --hub_token=HIDDEN --hub-token HIDDEN --bf16"
    monkeypatch.setattr("sys.argv", [cli.__file__.replace("__init__", "__main__"), "align"])
    assert command_line() == "python -m exo_fast.training.cli align"
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest", "x"])
    assert command_line() is None


# A recipe


def test_a_recipe_gets_one_page(
    hostile_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    stages = [f"{{name: {name}, stage: make, options: {{text: x, output_dir: {output}/{name}}}}}" for name in "abc"]
    recipe.write_text(f"variables: {{output: {output}}}\nstages: [{', '.join(stages)}]\n")
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert f"the report is {output / 'report.html'}" in capsys.readouterr().out
    # What a training, an evaluation and a sampling leave, where these stages have left nothing.
    for name in ("summary.json", "trainer_state.json", "samples.json"):
        shutil.copy(hostile_run / name, output / "a" / name)
    (output / "b" / "results.json").write_text(json.dumps(RESULTS))
    (output / "b" / "frontier.png").write_bytes(b"a picture")
    (output / "c" / "test.json").write_text(json.dumps([{"prompt": HOSTILE, "completions": ["x"], "rewards": [0.5]}]))
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0  # nothing to do but the page
    page = (output / "report.html").read_text(encoding="utf-8")
    parsed = Tags(page)
    words = " ".join(parsed.words)
    assert "8 optimizer steps" in words
    assert "exo-rw lies above" in words
    assert "reward 0.5" in words
    assert sum(map(count, drawn(parsed))) == sum(points_of(history_of(hostile_run)).values())
    pictures = [found["src"] for tag, found in parsed.tags if tag == "img"]
    assert pictures == ["data:image/png;base64," + base64.b64encode(b"a picture").decode()]
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert sum(tag == "section" for tag, _ in parsed.tags) == 3


def _model(label: str, seed: int, step: int | None, kl: float, reward: float) -> dict[str, Any]:
    numbers = {"kl": kl, "kl_standard_error": 0.1, "reward": reward, "reward_standard_error": 0.2, "gain": reward}
    return {"label": label, "seed": seed, "step": step, "gain_interval": [-1.0, 1.0], **numbers}


RESULTS = {
    "finding": "exo-rw lies above dpo-rw.",
    "models": [_model("SFT", 0, 0, 0, 0.1)]
    + [_model(label, 0, step, step / 3, step / 10) for label in ("exo-rw", "dpo-rw") for step in (3, 6)],
    "end_of_training": [
        {"label": label, "runs": 1}
        | {k: v for n in ("reward", "gain", "win_rate", "kl") for k, v in ((n, 0.5), (f"{n}_interval", [0.1, 0.9]))}
        for label in ("exo-rw", "dpo-rw")
    ],
}


# Plots


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[5003] = (5003.0, 99.0)
    points[7001] = (7001.0, -99.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept)
    assert {points[0], points[5003], points[7001], points[-1]} <= set(kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


ODD = {
    "none": [],
    "one": [(1, 2.0)],
    "equal": [(1, 3.0), (2, 3.0)],
    "zeros": [(1, 0.0), (2, 0.0)],
    "not finite": [(1, float("nan")), (2, float("inf")), (3, 1.0)],
    "tiny": [(1, 1e-300), (2, 2e-300)],
    "huge": [(1, -1e300), (2, 1e300)],
}


@pytest.mark.parametrize("points", ODD.values(), ids=ODD.keys())
def test_values_that_are_not_finite_are_left_out_and_counted(points: list[tuple[float, float]]) -> None:
    (chart,) = charts([{"step": step, "loss": value} for step, value in points]) or [{"curves": [], "lost": 0}]
    finite = [point for point in points if math.isfinite(point[1])]
    assert [list(zip(*curve["points"], strict=True)) for curve in chart["curves"]] == ([finite] if finite else [])
    assert chart["lost"] == len(points) - len(finite)


@needs_browser
def test_a_browser_draws_any_values(hostile_run: Path, tmp_path: Path) -> None:
    shutil.copy(hostile_run / "summary.json", tmp_path / "summary.json")
    for name, points in ODD.items():
        history = [{"step": step, "loss": value} for step, value in points]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        _, console = browse(html.write(tmp_path), tmp_path / "profile", "--dump-dom")
        assert console == [], name


def test_the_chart_library_is_the_one_that_its_note_names() -> None:
    """uPlot is npm's, unchanged; the note gives its version, its source and the hashes of its files."""
    note = (UPLOT / "README.md").read_text()
    named = dict(re.findall(r"^\| ([\w.]+) \| ([0-9a-f]{64}) \|$", note, re.MULTILINE))
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in UPLOT.iterdir()}
    del there["README.md"]
    assert named == there
    version = re.search(r"uPlot ([\d.]+)", note)[1]
    assert f"(v{version})" in (UPLOT / "uPlot.iife.min.js").read_text()[:100]


def test_a_long_run_stays_small(hostile_run: Path, tmp_path: Path) -> None:
    """20,000 logged steps and samples as long as they may be: a page below 1 MB, and below 400 kB without them."""
    for name in ("summary.json", "samples.json"):
        shutil.copy(hostile_run / name, tmp_path / name)
    entry = next(entry for entry in history_of(hostile_run) if "loss" in entry)
    history = [{**entry, "step": step, "loss": 1 + (step * 7919 % 1000) / 1000} for step in range(1, 20_001)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    samples = json.loads((tmp_path / "samples.json").read_text())
    for row in samples["rows"]:
        row["texts"] = [{"text": "<" * 2000, "numbers": {"reward": 1.0}}] * 8
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    page = html.write(tmp_path)
    assert page.stat().st_size < 2**20
    assert f"of 20,000 points {MOST_POINTS} are drawn" in page.read_text()
    (tmp_path / "samples.json").unlink()
    assert html.write(tmp_path).stat().st_size < 400_000
