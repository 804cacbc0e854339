"""Recipes, the command line, and the errors if they are wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tree import ROOT

from exo_fast.training.arguments import parse_config
from exo_fast.training.cli.command import main
from exo_fast.training.errors import InputError
from exo_fast.training.options import parse_size
from exo_fast.training.stages.align import AlignConfig
from exo_fast.training.trainer import compat
from exo_fast.training.trainer.deepspeed import default_zero_stage

REQUIRED = ["--model_name_or_path", "m", "--data", "d"]


def recipe(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\ndata: d\n" + text)
    return ["--config", str(path)]


def test_recipe_values_are_taken_as_written_and_the_command_line_wins(tmp_path: Path) -> None:
    words = recipe(
        tmp_path,
        """
        learning_rate: 1e-6          # a string to YAML 1.1
        share_prompt: off            # a boolean to YAML 1.1
        loss_type: dpo-rw
        bf16: true
        memory_budget: 64MB
        lora_target_modules: [q_proj, v_proj]
        lr_scheduler_kwargs: {num_cycles: 2}
        save_total_limit: null
        output_dir: "a b"
        beta_pi: 0.3
        """.replace("        ", ""),
    )
    config = parse_config(AlignConfig, [*words, "--beta_pi", "0.2", "--gradient_checkpointing", "--zero_stage", "3"])
    assert (config.learning_rate, config.share_prompt, config.bf16, config.loss_type) == (1e-6, "off", True, "dpo-rw")
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (config.save_total_limit, config.output_dir) == (None, "a b")
    assert (config.beta_pi, config.memory_budget_bytes) == (0.2, 64_000_000)
    assert config.activation_checkpointing if compat.ACTIVATION_CHECKPOINTING else config.gradient_checkpointing
    assert config.deepspeed["zero_optimization"]["stage"] == 3
    assert config.label_smoothing == 1e-3


def test_defaults_are_the_originals() -> None:
    config = parse_config(AlignConfig, REQUIRED)
    assert (config.learning_rate, config.lr_scheduler_type, config.num_train_epochs) == (1e-6, "cosine", 1)
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (0.9, 0.95, 0, 1)
    assert parse_config(AlignConfig, [*REQUIRED, "--loss_type", "dpo-pref"]).label_smoothing == 0
    assert parse_config(AlignConfig, [*REQUIRED, "--engine", "torch"]).deepspeed is None


BAD_RECIPES = {
    "unknown key": (
        "num_contrastve: 2",
        r"recipe.yaml: line 3: unknown key 'num_contrastve'; did you mean 'num_contrastive'",
    ),
    "set twice": ("beta_pi: 1\nbeta_pi: 2", "line 4: key 'beta_pi' is set twice"),
    "wrong type": ("max_seq_len: long", "recipe.yaml: argument --max_seq_len.*invalid int value: 'long'"),
    "wrong choice": ("loss_type: exo", r"recipe.yaml: argument --loss_type.*invalid choice: 'exo'"),
    "not YAML": ("a: [", "recipe.yaml: not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(AlignConfig, recipe(tmp_path, text))


def test_recipe_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="a mapping of field names to values"):
        parse_config(AlignConfig, ["--config", str(tmp_path / "list.yaml")])
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read: No such file"):
        parse_config(AlignConfig, ["--config", str(tmp_path / "none.yaml")])


BAD_VALUES = {
    "no model": ({"model_name_or_path": None}, "model_name_or_path=None: name the model"),
    "no such model": ({"model_name_or_path": "./none"}, "model_name_or_path='./none': no such directory"),
    "no data": ({"data": None}, "data=None: name the training data"),
    "one candidate": ({"num_contrastive": 1}, "num_contrastive=1: at least 2"),
    "no room": ({"max_seq_len": 64, "max_gen_len": 64}, "max_seq_len=64: must be larger than max_gen_len=64"),
    "no completion": ({"max_gen_len": 0}, "max_gen_len=0: at least 1"),
    "beta_pi": ({"beta_pi": 0.0}, "beta_pi=0.0: a positive number"),
    "beta_r nan": ({"beta_r": float("nan")}, "beta_r=nan: a finite number"),
    "temperature": ({"temperature": -1.0}, "temperature=-1.0: a number from 1e-06 to 1e"),
    "smoothing of rewards": ({"loss_type": "exo-rw", "label_smoothing": 0.1}, "label_smoothing=0.1: exo-rw takes"),
    "smoothing too large": ({"label_smoothing": 1.0}, r"label_smoothing=1.0: a number in \[0, 1\)"),
    "exo without smoothing": ({"label_smoothing": 0.0}, "label_smoothing=0.0: exo-pref needs at least 1e-30"),
    "the other smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: that is transformers'"),
    "fp16": ({"fp16": True}, "fp16=True: .* use bf16"),
    "stage": ({"zero_stage": 4}, "zero_stage=4: 0, 1, 2 or 3"),
    "offload": ({"zero_stage": 0, "offload": True}, "offload=True: needs zero_stage 1, 2 or 3"),
    "offload without": ({"engine": "torch", "offload": True}, "offload=True: needs engine=deepspeed"),
    "budget": ({"memory_budget": "lots"}, "memory_budget='lots': a size is needed"),
    "sampling": ({"train_sampling_strategy": "batch_rebalance"}, "random, sequential or group_by_length"),
    "precision": (
        {"matmul_precision": "tf32", "use_cpu": True},
        "matmul_precision='tf32': ieee or bf16 is needed on CPU",
    ),
    "backend": ({"backend": "none"}, "backend='none' is not known"),
    "lora": ({"lora_r": -1}, "lora_r=-1"),
    "empty batches": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: at least 1"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: at least 1"),
    "uphill": ({"learning_rate": -1e-6}, "learning_rate=-1e-06: a number of at least 0"),
    "no epochs": ({"num_train_epochs": 0}, "num_train_epochs=0: a positive number"),
    "what transformers refuses": ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
}


@pytest.mark.parametrize(("values", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AlignConfig(**{"model_name_or_path": "m", "data": "d", "output_dir": str(tmp_path), **values})


def test_default_zero_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"on_cpu": True, "bf16": False, "offload": False}
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert default_zero_stage(**alone) == 0
    for name, value in (("on_cpu", False), ("bf16", True), ("offload", True)):
        assert default_zero_stage(**{**alone, name: value}) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert default_zero_stage(**alone) == 2


def test_zero_stage_is_settled_by_the_configuration(tmp_path: Path) -> None:
    values = {"model_name_or_path": "m", "data": "d", "output_dir": str(tmp_path), "use_cpu": True, "engine": "torch"}
    assert AlignConfig(**values).zero_stage == 0
    assert AlignConfig(**values, bf16=True).zero_stage == 2
    assert AlignConfig(**values, zero_stage=3).zero_stage == 3


def test_sizes() -> None:
    assert [parse_size(text) for text in ("1000", "512MB", "1.5 GiB", "2kb")] == [1000, 512 * 10**6, 3 * 2**29, 2000]
    for text in ("", "MB", "-1MB", "1 XB", "0"):
        with pytest.raises(InputError, match="a size is needed"):
            parse_size(text)


def test_the_recipe_in_the_repository_is_valid() -> None:
    config = parse_config(AlignConfig, ["--config", str(ROOT / "recipes" / "align.yaml")])
    assert config.loss_type == "exo-rw"


def test_exit_status_and_messages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["align", *REQUIRED, "--beta_p", "1"]) == 2
    assert "error: unknown option '--beta_p'; did you mean '--beta_pi'?" in capsys.readouterr().err
    assert main(["--debug", "align", *REQUIRED, "--beta_pi", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["align", *REQUIRED, "--output_dir", str(tmp_path / "o"), "--data", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "none: no such file or directory" in error
    assert "Traceback" not in error
    with pytest.raises(SystemExit, match="2"):
        main(["unknown"])


def test_help_shows_ours_first_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["align", "--help"])
    text = capsys.readouterr().out
    assert text.index("--model_name_or_path") < text.index("--loss_type") < text.index("--learning_rate")
    assert "exo-fast align --config recipes/align.yaml" in text
    assert "--torch_compile_mode" not in text
    with pytest.raises(SystemExit, match="0"):
        main(["align", "--help-all"])
    assert "--torch_compile_mode" in capsys.readouterr().out


def test_the_front_page_needs_no_training_dependencies() -> None:
    program = (
        "import sys\nfrom exo_fast.training.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "align" in done.stdout
    assert "demo" in done.stdout
