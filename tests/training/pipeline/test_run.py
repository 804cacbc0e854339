"""Recipes of several stages: read, checked before anything runs, run once, stopped and continued."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exo_fast.training.errors import InputError
from exo_fast.training.pipeline import process, records, run
from exo_fast.training.pipeline import recipe as pipeline
from exo_fast.training.pipeline.recipe import PlannedStage, read_recipe

STAGES = ("make", "align")

CHAIN = """
variables: {{output: {output}, text: hello}}
defaults: {{seed: 3}}
stages:
  - name: first
    stage: make
    options: {{text: "${{text}}", output_dir: "${{output}}/first"}}
  - name: second-${{word}}
    stage: make
    for: {{word: [a, b]}}
    options: {{text: "${{word}}", data: ["${{output}}/first"], output_dir: "${{output}}/second-${{word}}"}}
  - name: alone
    stage: make
    options: {{output_dir: "${{output}}/alone"}}
"""


@pytest.fixture
def tiny_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny_stages` can be imported here and in the processes that are started."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a recipe, with {output} replaced."""

    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text.format(output=tmp_path / "out"))
        return path

    return write_recipe


def attempts(folder: Path) -> int:
    return len((folder / "attempts.txt").read_text().splitlines())


def test_values_are_filled_in_with_their_types(write: Callable[[str], Path]) -> None:
    recipe = read_recipe(
        write(
            """
variables: {{output: {output}, rate: 1e-6, list: [1, two], base: "${{output}}/x", off: off}}
stages:
  - stage: make
    options: {{rate: "${{rate}}", data: "${{list}}", text: "at ${{rate}} ${{base}}", share: "${{off}}",
               output_dir: "${{base}}", nothing: null, yes: true, no: no}}
"""
        ),
        STAGES,
        {"rate": "0.5"},
    )
    out = str(recipe.output)
    assert recipe.stages[0].name == "make"
    assert recipe.stages[0].options == {
        "rate": 0.5,
        "data": [1, "two"],
        "text": f"at 0.5 {out}/x",
        "share": "off",
        "output_dir": f"{out}/x",
        "nothing": None,
        "yes": True,
        "no": "no",
    }
    assert type(pipeline.fill("${a}", {"a": 1e-6}, "")) is float


def test_a_loop_makes_a_stage_of_each_combination(write: Callable[[str], Path]) -> None:
    recipe = read_recipe(
        write(
            """
variables: {{output: {output}, losses: [exo-rw, dpo-rw]}}
stages:
  - name: "${{loss}}-${{seed}}"
    stage: align
    for: {{loss: "${{losses}}", seed: [0, 1]}}
    options: {{seed: "${{seed}}", output_dir: "${{output}}/${{loss}}-${{seed}}"}}
  - name: evaluate
    stage: make
    options:
      policies: ["exo=${{output}}/exo-rw-0", "exo=${{output}}/exo-rw-1/checkpoint-3"]
      reference: "a:{output}/dpo-rw-0x"
      output_dir: "${{output}}/evaluate"
"""
        ),
        STAGES,
    )
    assert [stage.name for stage in recipe.stages[:-1]] == ["exo-rw-0", "exo-rw-1", "dpo-rw-0", "dpo-rw-1"]
    assert [stage.options["seed"] for stage in recipe.stages[:-1]] == [0, 1, 0, 1]
    assert recipe.stages[-1].needs == ["exo-rw-0", "exo-rw-1"]  # and not dpo-rw-0, a part of another name


ONE = "variables: {{output: {output}}}\nstages: [{{stage: make, %s}}]"
BAD = {
    "unknown stage": ("variables: {{output: o}}\nstages: [{{stage: aling, options: {{}}}}]", "did you mean 'align'"),
    "no output": ("variables: {{}}\nstages: [{{stage: make, options: {{}}}}]", "output is needed"),
    "unknown key": (ONE % "option: {{}}", "stage 1: unknown key 'option'; did you mean 'options'"),
    "no options": (ONE % "name: a", "stage 'a': options is missing"),
    "no output_dir": (ONE % "options: {{}}", "stage 'make': options need an output_dir"),
    "unknown variable": (
        ONE % "options: {{output_dir: '${{outptu}}/a'}}",
        "outptu} is not defined; did you mean 'outp",
    ),
    "bad name": (ONE % "name: a/b, options: {{output_dir: a}}", "stage 'a/b': a name of letters"),
    "bad loop": (ONE % "for: {{a: 3}}, options: {{output_dir: a}}", "for: a needs a list of values, not 3"),
    "bad processes": (ONE % "processes: 0, options: {{output_dir: a}}", "processes=0: a whole number"),
    "same name": (ONE % "for: {{a: [1, 2]}}, options: {{output_dir: 'o/${{a}}'}}", "'make': two stages have this name"),
    "same output": (ONE % "name: '${{a}}', for: {{a: [1, 2]}}, options: {{output_dir: o}}", "same as that of '1'"),
    "output around the records": (ONE % "options: {{output_dir: {output}}}", "where `run` keeps its records"),
    "output above all": (ONE % "options: {{output_dir: /}}", "where `run` keeps its records"),
    "read before it is made": (
        "variables: {{output: o}}\nstages:\n"
        "- {{name: a, stage: make, options: {{data: o/b/x.json, output_dir: o/a}}}}\n"
        "- {{name: b, stage: make, options: {{output_dir: o/b}}}}",
        "stage 'a' reads o/b, which the later stage 'b' makes",
    ),
    "no YAML": ("a: [", "not valid YAML"),
    "a list as a name": ("? [a]\n: b", "line 1: a name is needed before the colon"),
    "an alias bomb": (
        "a: &a [x, x, x, x, x, x]\n"
        + "".join(
            f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in itertools.pairwise("abcdefgh")
        ),
        "more than 100,000 values",
    ),
    "text that doubles": (
        "variables: {{output: o, a: xxxxxxxxxx, "
        + ", ".join(f"{after}: '" + f"${{{{{before}}}}}" * 9 + "'" for before, after in itertools.pairwise("abcdefgh"))
        + "}}",
        "a text of more than 1,000,000 characters",
    ),
    "a loop without end": (
        ONE % ("options: {{}}, for: {{" + ", ".join(f"{name}: [1, 2, 3, 4, 5]" for name in "abcdefg") + "}}"),
        "more than 10,000 combinations",
    ),
    "no stages": ("variables: {{output: o}}", "stages: a list of stages"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_with_a_recipe_is_said(write: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml: .*") as error:
        read_recipe(write(text), STAGES)
    assert message in str(error.value)


def test_a_variable_that_is_set_must_exist(write: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="--set outptu: no such variable; did you mean 'output'"):
        read_recipe(write(CHAIN), STAGES, {"outptu": "x"})


@pytest.mark.usefixtures("tiny_stages")
def test_options_are_checked_before_the_first_stage(write: Callable[[str], Path], tmp_path: Path) -> None:
    bad = {
        "rate: 2": "stage 'alone': rate=2.0: at most 1 is needed",
        "rtae: 2": "stage 'alone': unknown field 'rtae' of make; did you mean 'rate'",
        "data: [/no/such]": "stage 'alone': data='/no/such': no such file",
        "data: ['{output}/none']": "none': no such file",
        "rate: fast": "stage 'alone': argument --rate: invalid float value: 'fast'",
    }
    for option, message in bad.items():
        recipe = write(CHAIN.replace('"${{output}}/alone"', f'"${{{{output}}}}/alone", {option}'))
        with pytest.raises(InputError) as error:
            run.run_recipe(recipe, cli_module="tiny_stages")
        assert message in str(error.value)
    with pytest.raises(InputError, match="defaults: no stage of this recipe has a field 'sede'"):
        run.run_recipe(write(CHAIN.replace("seed: 3", "sede: 3")), cli_module="tiny_stages")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny_stages")
def test_what_is_done_is_skipped_and_what_changed_is_redone_on_request(
    write: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folders = [out / name for name in ("first", "second-a", "second-b", "alone")]
    recipe = write(CHAIN)

    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert (out / "second-b" / "made.txt").read_text() == "hello 3\nb 3\n"
    assert "making" in (out / ".run" / "second-a.log").read_text()
    assert "[2/4] second-a (make)" in capfd.readouterr().out
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert "[4/4] alone: done before" in capfd.readouterr().out
    assert [attempts(folder) for folder in folders] == [1, 1, 1, 1]
    summary = json.loads((out / ".run" / "run.json").read_text())
    assert [row["state"] for row in summary["stages"]] == ["done before"] * 4

    # A stage that changed: nothing is run or removed until that is asked for, and then no more than depends on it.
    changed = {"settings": {"text": "goodbye"}, "cli_module": "tiny_stages"}
    with pytest.raises(
        InputError, match=r"\'first\' is done, but text was \'hello\' and is now \'goodbye\'.*--redo first"
    ):
        run.run_recipe(recipe, **changed)
    assert run.run_recipe(recipe, redo=["first"], **changed) == 0
    assert (out / "second-b" / "made.txt").read_text() == "goodbye 3\nb 3\n"
    assert [attempts(folder) for folder in folders] == [1, 1, 1, 1]
    assert json.loads((out / ".run" / "run.json").read_text())["stages"][-1]["state"] == "done before"

    capfd.readouterr()
    assert run.run_recipe(recipe, show=True, **changed) == 0
    assert "done in 0 s  (after first)" in capfd.readouterr().out

    # Output that was deleted is made again; what another hand put there is not removed.
    (out / "alone" / "made.txt").unlink()
    (out / "alone" / "attempts.txt").unlink()
    (out / "alone").rmdir()
    assert run.run_recipe(recipe, only=["al*"], **changed) == 0
    assert (out / "alone" / "made.txt").exists()
    (out / ".run" / "alone.json").unlink()
    with pytest.raises(InputError, match="alone was not made by this recipe, so it is left alone"):
        run.run_recipe(recipe, redo=["second-*", "alone"], **changed)
    assert all(folder.exists() for folder in folders)


@pytest.mark.usefixtures("tiny_stages")
def test_data_that_a_late_stage_would_miss_is_missed_at_once(
    write: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    text = CHAIN.replace('"${{output}}/alone"', '"${{output}}/alone", eval_data: "hh/pref:${{raw}}"')
    recipe = write(text.replace("text: hello", "text: hello, raw: {output}/../raw"))
    elsewhere = {"settings": {"raw": "no/such"}, "cli_module": "tiny_stages"}
    with pytest.raises(InputError, match="stage 'alone': eval_data: hh/pref:no/such: no such file or directory"):
        run.run_recipe(recipe, **elsewhere)
    assert not (tmp_path / "out" / "first").exists()
    assert run.run_recipe(recipe, show=True, **elsewhere) == 0
    assert run.run_recipe(recipe, only=["first"], **elsewhere) == 0
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    (tmp_path / "raw").rmdir()  # what is done needs its data no more
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert "[4/4] alone: done before" in capfd.readouterr().out


@pytest.mark.usefixtures("tiny_stages")
def test_another_output_dir_of_a_stage_that_failed_is_not_ours_to_remove(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    text = CHAIN.replace('"${{output}}/alone"', '"${{output}}/alone", fail_unless: /no/such')
    assert run.run_recipe(write(text), cli_module="tiny_stages") == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").write_text("mine")
    recipe = write(text.replace('"${{output}}/alone"', f'"{tmp_path}/mine"'))
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 3
    with pytest.raises(InputError, match="mine was not made by this recipe, so it is left alone"):
        run.run_recipe(recipe, redo=["alone"], cli_module="tiny_stages")
    assert (tmp_path / "mine" / "kept.txt").exists()


@pytest.mark.usefixtures("tiny_stages")
def test_a_failed_stage_is_named_and_the_same_command_continues(
    write: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cause = tmp_path / "cause"
    recipe = write(CHAIN.replace("data:", f"fail_unless: {cause}, data:"))
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 3
    said = capfd.readouterr()
    log = tmp_path / "out" / ".run" / "second-a.log"
    assert f"[2/4] second-a failed: exit status 3. What it said is in {log}" in said.err
    assert "the cause" in log.read_text()
    with pytest.raises(InputError, match="--only second-b: it reads the output of first, which is not done"):
        run.run_recipe(recipe, only=["second-b"], redo=["first"], cli_module="tiny_stages")
    with pytest.raises(InputError, match="--only third: no such stage"):
        run.run_recipe(recipe, only=["third"], cli_module="tiny_stages")
    cause.touch()
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert attempts(tmp_path / "out" / "first") == 1
    assert attempts(tmp_path / "out" / "second-a") == 2


@pytest.mark.usefixtures("tiny_stages")
def test_killed_between_a_stages_end_and_the_record_of_it(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is started once more, and says by itself that it is finished; what it made is the recipe's still."""
    recipe, original = write(CHAIN), records.Records.write

    def killed(self: records.Records, name: str, record: records.Record) -> None:
        if record.done:
            raise KeyboardInterrupt
        original(self, name, record)

    with monkeypatch.context() as patch:
        patch.setattr(records.Records, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run_recipe(recipe, cli_module="tiny_stages")
    made = tmp_path / "out" / "first" / "made.txt"
    before = made.read_text()
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert (attempts(made.parent), made.read_text()) == (2, before)
    assert run.run_recipe(recipe, redo=["first"], cli_module="tiny_stages") == 0
    assert (attempts(made.parent), made.read_text()) == (1, before)


@pytest.mark.usefixtures("tiny_stages")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_takes_its_stage_with_it(
    write: Callable[[str], Path], tmp_path: Path, number: int
) -> None:
    recipe = write(CHAIN.replace("text: hello", "text: hello, wait: 60").replace("data:", 'wait: "${{wait}}", data:'))
    code = (
        "from pathlib import Path; from exo_fast.training.pipeline.run import run_recipe; "
        f"run_recipe(Path({str(recipe)!r}), cli_module='tiny_stages')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = tmp_path / "out" / "second-a" / "attempts.txt"
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.wait(timeout=60)
    with records.Records(read_recipe(recipe, STAGES)).lock():  # which the stage held, too
        pass
    assert not (begun.parent / "made.txt").exists()
    assert run.run_recipe(recipe, settings={"wait": "0"}, cli_module="tiny_stages") == 0
    assert attempts(tmp_path / "out" / "first") == 1
    assert (begun.parent / "made.txt").exists()


def test_the_command_of_a_stage(tmp_path: Path) -> None:
    config, tail = tmp_path / "c.yaml", ["sft", "--config", str(tmp_path / "c.yaml")]
    assert process.stage_command(PlannedStage("a", "sft", {}), config) == [
        sys.executable,
        "-m",
        process.CLI_MODULE,
        *tail,
    ]
    several = process.stage_command(PlannedStage("a", "sft", {}, processes=2), config)
    assert several[1:3] == ["-m", "torch.distributed.run"]
    assert several[-8:] == ["--standalone", "--nproc-per-node", "2", "-m", process.CLI_MODULE, *tail][-8:]
    launched = process.stage_command(PlannedStage("a", "sft", {}, launcher=["deepspeed", "--module"]), config)
    assert launched == ["deepspeed", "--module", process.CLI_MODULE, *tail]


@pytest.mark.usefixtures("tiny_stages")
def test_the_small_model_is_fetched_when_a_stage_uses_it(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(CHAIN.replace("data:", 'model: "${{smollm2}}/x", data:'))
    asked = []
    monkeypatch.setattr(run.downloads, "get_model", lambda cache: asked.append(cache) or Path("/models/small"))
    assert run.run_recipe(recipe, only=["first"], cli_module="tiny_stages") == 0
    assert asked == []
    assert run.run_recipe(recipe, cli_module="tiny_stages") == 0
    assert len(asked) == 1
    assert "model: /models/small/x" in (tmp_path / "out" / ".run" / "second-a.yaml").read_text()
    assert "/models/small" not in (tmp_path / "out" / ".run" / "second-a.json").read_text()


@pytest.mark.parametrize(
    "spelling", ["out/a", "./out/a", "out/a/train.json", "x=out/a", "{cwd}/out/a", "imdb/sft:out/a"]
)
def test_a_stage_needs_what_it_names_by_any_spelling(tmp_path: Path, spelling: str) -> None:
    other = {"data": "other/out/a", "output_dir": "out/b"}
    reader = {"data": spelling.format(cwd=Path.cwd()), "output_dir": "out/c"}
    stages = [{"stage": "pref-to-rw", "options": {"data": "d", "output_dir": "./out/a"}, "name": "a"}]
    stages += [
        {"stage": "pref-to-rw", "options": options, "name": options["output_dir"][-1]} for options in (other, reader)
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"variables": {"output": "out"}, "stages": stages}))
    assert [stage.needs for stage in read_recipe(recipe, ["pref-to-rw"]).stages] == [[], [], ["a"]]
