"""The recipes that come with exo_fast: found, copied without overwriting, and every value in them accepted."""

from pathlib import Path

import pytest

from exo_fast.training.cli.command import STAGES
from exo_fast.training.errors import InputError
from exo_fast.training.pipeline import check, library, process
from exo_fast.training.pipeline.recipe import read_recipe

CHAINS = {  # of several stages, each with the variables that name raw data and the number of its stages
    "imdb": (("raw",), 14),
    "tldr": (("filtered", "comparisons"), 12),
    "hh": (("raw",), 11),
    "custom": (("sft_data", "preferences"), 10),
}
LOSSES = ["exo-rw", "dpo-rw", "exo-pref", "dpo-pref"]


def test_list_show_and_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert library.main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in CHAINS:
        assert f"\n{name} " in f"\n{listed}"
    assert all(len(line) > 20 for line in listed.splitlines())

    assert library.main(["show", "imdb"]) == 0
    text = capsys.readouterr().out
    assert text == (library.FOLDER / "imdb.yaml").read_text(encoding="utf-8")

    monkeypatch.chdir(tmp_path)
    assert library.main(["copy", "imdb"]) == 0
    assert (tmp_path / "imdb.yaml").read_text(encoding="utf-8") == text
    (tmp_path / "imdb.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"imdb\.yaml is there already"):
        library.main(["copy", "imdb"])
    assert (tmp_path / "imdb.yaml").read_text() == "mine"
    assert library.main(["copy", "imdb.yaml", "new/other.yaml"]) == 0
    assert (tmp_path / "new" / "other.yaml").read_text(encoding="utf-8") == text
    with pytest.raises(InputError, match="'imbd': there is none of this name; did you mean 'imdb'"):
        library.main(["show", "imbd"])


@pytest.mark.parametrize("name", CHAINS)
def test_every_stage_accepts_its_options(name: str, tmp_path: Path) -> None:
    raw, count = CHAINS[name]
    settings = {variable: str(tmp_path / variable) for variable in raw} | {"output": str(tmp_path / "out")}
    recipe = read_recipe(library.FOLDER / f"{name}.yaml", STAGES, settings)
    stages = [{"name": stage.name, "stage": stage.stage, "options": stage.options} for stage in recipe.stages]
    assert len(stages) == count
    # In this process, where `run` takes another: the training libraries take seconds to load.
    assert check.check(process.CLI_MODULE, stages, recipe.defaults)["error"] is None


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_is_connected_and_compares_the_losses_alike(name: str) -> None:
    recipe = read_recipe(library.FOLDER / f"{name}.yaml", STAGES)
    stages = {stage.name: stage for stage in recipe.stages}
    needed = {need for stage in recipe.stages for need in stage.needs}
    assert set(stages) - needed == {"evaluate"}  # nothing is made that nothing reads
    assert stages["evaluate"].needs[-4:] == LOSSES
    alike = [
        {key: value for key, value in stages[loss].options.items() if key not in ("loss_type", "data", "output_dir")}
        for loss in LOSSES
    ]
    assert [stages[loss].options["loss_type"] for loss in LOSSES] == LOSSES
    sampled = stages["samples"].options
    for options, loss in zip(alike, LOSSES, strict=True):  # as many prompts, as the original counts them
        groups = sampled["return_num"] // options["num_contrastive"] if loss.endswith("-rw") else 1
        for split in ("train", "eval"):
            options[f"per_device_{split}_batch_size"] /= groups
    assert all(options == alike[0] for options in alike)
    for stage in (stages["exo-rw"], stages["evaluate"]):
        assert stage.options["temperature"] == sampled["temperature"]
        assert stage.options["max_seq_len"] == sampled["max_seq_len"]
