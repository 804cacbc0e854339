"""README.md of a training's output directory: the model card, for the Hub and for everyone who gets the model.

It is made from summary.json and trainer_state.json, and says how the model was made and from which files. It claims
only known facts: a base model in a local directory has no name on the Hub, and the licence comes from the base model's
own card or is left out. Local paths are shortened to their last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from exo_fast.data.selection import left_out_lines
from exo_fast.training.files import write_file
from exo_fast.training.reports.curves import History, metric_rows, number
from exo_fast.training.reports.rendering import TEMPLATES, plain

NAME = "README.md"
PAPER = "https://arxiv.org/abs/2402.00856"
CITATION = """\
@inproceedings{ji2024towards,
  title={Towards Efficient Exact Optimization of Language Model Alignment},
  author={Ji, Haozhe and Lu, Cheng and Niu, Yilin and Ke, Pei and Wang, Hongning and Zhu, Jun and Tang, Jie and Huang, Minlie},
  booktitle={International Conference on Machine Learning},
  year={2024}
}"""  # noqa: E501 - the same as in the README
# Data sets of the registry that are also on the Hub.
HUB_DATASETS = {"hh": "Anthropic/hh-rlhf", "tldr": "openai/summarize_from_feedback", "imdb": "stanfordnlp/imdb"}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

POLICY = """\
With K candidates y_k of a prompt x, the policy's distribution over them is q = softmax(β_π · (log π(y|x) − log
π_ref(y|x))), β_π = {beta_pi}. {loss} The reference is {reference}."""
REWARD_TARGET = "The target p is softmax(reward / β_r), β_r = {beta_r}."
BEST_TARGET = (
    "The target p has 1 − ε on the candidate of the highest reward and ε/(K − 1) on each other, ε = {epsilon:g}."
)
LOSSES = {
    "exo": "EXO minimises the reverse KL, Σ_k q_k (log q_k − log p_k), averaged over prompts.",
    "dpo": "DPO minimises the forward KL, here its cross-entropy −Σ_k p_k log q_k, averaged over prompts.",
}
METHODS = {
    "sft": "Supervised fine-tuning: the mean of −log π(token | before) over the tokens of the completions, with EOS.",
    "reward-model": "A reward model: −log σ(r(x, y_chosen) − r(x, y_rejected)), Bradley and Terry's loss. The model's "
    "one logit is the reward.",
    "classifier": "A binary classifier: the cross-entropy of σ(logit). The model's one logit is the log-odds.",
}
TASKS = {"align": "text-generation", "sft": "text-generation"}  # other stages: text-classification


def write(folder: Path) -> Path:
    """Make README.md of the training in `folder`; return its path. Raises OSError or ValueError if summary.json or
    trainer_state.json is missing or broken."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    adapter = (folder / "adapter_config.json").is_file()
    return write_file(folder, NAME, str(card(summary, history, folder.absolute().name, adapter=adapter)).encode())


def card(summary: Mapping[str, Any], history: History, name: str, *, adapter: bool) -> ModelCard:
    """Return the card of the model `name`, with its metadata."""
    config, stage, processes = summary["config"], summary["stage"], summary.get("processes", 1)
    rows = metric_rows(history)
    held_out = [row for row in rows if row[1] == "held out"]
    return ModelCard.from_template(
        metadata(summary, adapter=adapter),
        template_path=str(TEMPLATES / "card.md.j2"),
        plain=plain,
        name=name,
        adapter=adapter,
        base=_code(_portable(config["model_name_or_path"])),
        stage=stage,
        **_loaded_by(summary, name, adapter=adapter),
        method=method(config, stage),
        results=[(title, cells) for title, _, cells in held_out or rows],
        held_out=bool(held_out),
        data=_data(summary),
        left_out=left_out_lines(summary.get("data", {})),
        command="exo-fast" if processes == 1 else f"torchrun --nproc-per-node {processes} -m exo_fast.training.cli",
        recipe=_recipe(summary),
        versions=_versions(summary),
        paper=PAPER,
        citation=CITATION,
    )


def metadata(summary: Mapping[str, Any], *, adapter: bool) -> ModelCardData:
    """Return the metadata that the Hub reads from a card. Unknown entries are left out."""
    config, stage = summary["config"], summary["stage"]
    base, datasets = _base_on_hub(config["model_name_or_path"]), _hub_datasets(config)
    tags = ["exo_fast", stage, *([config["loss_type"]] if "loss_type" in config else [])]
    if stage == "align":
        tags.append(f"arxiv:{PAPER.rpartition('/')[2]}")
    known: dict[str, Any] = {
        "base_model": base,
        "datasets": datasets,
        "license": _license(config["model_name_or_path"]),
    }
    if base is not None:
        known["base_model_relation"] = "adapter" if adapter else "finetune"
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASKS.get(stage, "text-classification"),
        tags=[*tags, *(["lora"] if adapter else [])],
        **{name: value for name, value in known.items() if value},
    )


def method(config: Mapping[str, Any], stage: str) -> str:
    """Return the objective in words and symbols."""
    if stage in METHODS:
        return METHODS[stage]
    family, _, kind = config["loss_type"].partition("-")
    target = REWARD_TARGET if kind == "rw" else BEST_TARGET
    loss = f"{LOSSES[family]} {target.format(beta_r=config['beta_r'], epsilon=config['label_smoothing'] or 0)}"
    reference = config.get("ref_name_or_path")
    shown = "the model before training" if reference is None else _code(_portable(reference))
    return POLICY.format(beta_pi=config["beta_pi"], loss=loss, reference=shown).replace("\n", " ")


def _loaded_by(summary: Mapping[str, Any], name: str, *, adapter: bool) -> dict[str, str]:
    """Return the package and the class that load the model, and the place to load it from."""
    generates = TASKS.get(summary["stage"]) == "text-generation"
    auto_class = "AutoModelForCausalLM" if generates else "AutoModelForSequenceClassification"
    place = (summary.get("hub") or {}).get("repository") or summary["config"].get("hub_model_id") or name
    package, auto_class = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", auto_class)
    if not re.fullmatch(r"[\w./ -]+", place):  # it could end the code block, or a string in it
        place = "path/to/the/model"
    return {"package": package, "auto_class": auto_class, "place": place}


def _data(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return split, name, rows, bytes and sha256 of each split."""
    rows = []
    for split, counts in summary.get("data", {}).items():
        known = summary.get("data_files", {}).get(split, {})
        count, size = number(counts.get("examples", counts.get("rows"))), number(known.get("bytes"))
        rows.append((split, plain(_portable(known.get("name", ""))), count, size, known.get("sha256", "")))
    return rows


def _recipe(summary: Mapping[str, Any]) -> str:
    """Return the fields that were set, as YAML that the stage takes."""
    config = summary["config"]
    left_out = ("hub_token", "resume_from_checkpoint", "disable_tqdm", "run_name")
    fields = {
        name: _portable(config[name]) for name in summary.get("changed", ()) if name in config and name not in left_out
    }
    if fields.get("report_to") == []:
        fields["report_to"] = "none"  # as it is written in a recipe
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def _versions(summary: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in summary.get("versions", {}).items() if found)
    commit = f", commit {summary['commit']}" if summary.get("commit") else ""
    return (
        f"{summary['steps']:,} steps in {summary['train_seconds']:,.0f} s on {summary['device']}. {versions}{commit}."
    )


def _base_on_hub(name: str) -> str | None:
    """Return the base model's name on the Hub; None for a directory."""
    return None if Path(name).exists() or not HUB_NAME.fullmatch(name) else name


def _hub_datasets(config: Mapping[str, Any]) -> list[str]:
    names = [str(config[field]).partition("/")[0] for field in ("data", "eval_data") if config.get(field)]
    found = (HUB_DATASETS[name] for name in names if name in HUB_DATASETS and not Path(config["data"]).exists())
    return list(dict.fromkeys(found))


def _license(base: str) -> str | None:
    """Return the licence in the base model's own card, if the card is in the model's directory."""
    path = Path(base, NAME)
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path).data.license
    except (ValueError, yaml.YAMLError):
        return None


def _portable(value: Any) -> Any:
    """Shorten a local path to its last part; return other values as they are."""
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return value


def _code(text: str) -> str:
    return f"`{str(text).replace('`', '')}`"
