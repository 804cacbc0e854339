"""The losses of docs/other-losses.md computed by TRL's and Liger's own code: cases for `loss_equality`.

TRL's trainers are built on a tiny random Llama and called for `compute_loss` of a batch. dH is the gradient of the
hidden states before the head, dW the gradient of lm_head.weight. TRL computes reference and old log-probs on its side,
the page's `frozen_logps` on ours. Liger's modules of `chunked_loss` are plain PyTorch: they run on a CPU, uncompiled.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exo_fast.benchmarks.equality.formulas import (
    ALPHA,
    BETA,
    EPSILON,
    GAMMA,
    KL_WEIGHT,
    KTO_WEIGHTS,
    MAX_COMPLETION,
    TEMPERATURE,
    WINDOW_TOKENS,
    Case,
    Functions,
    Problem,
    advantages_like,
    grpo_variants,
    with_gradients,
)
from exo_fast.training import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = tuple(f"w{i}" for i in range(64))


# Liger's chunked losses


def liger_cases(page: Functions) -> Iterator[Case]:
    """Make the cases of Liger's chunked losses that the page has, on tensors. Liger has no IPO and PPO."""
    from liger_kernel import chunked_loss as liger

    problem = Problem.make()
    inputs = problem.inputs(page)
    plain = {"compiled": False}
    reference = {"ref_input": problem.other_hidden, "ref_weight": problem.other_weight}

    def case(loss: str, module: Any, given: dict[str, Any], variant: str = "", **changed: Any) -> Case:
        def run(hidden: Tensor, weight: Tensor) -> Any:
            operands = (hidden, weight) if loss in ("kto", "grpo") else (weight, hidden)
            return module(*operands, **given)

        result = with_gradients(run, problem.hidden, problem.weight, {})
        peer = f"Liger {machine.version('liger_kernel')} `{type(module).__name__}`"
        return Case(loss, variant, peer, problem.hidden, problem.weight, {**inputs[loss], **changed}, *result)

    of_targets = {"target": problem.targets}
    yield case("dpo", liger.LigerFusedLinearDPOLoss(beta=BETA, **plain), {**of_targets, **reference})
    kto = {**of_targets, **reference, "preference_labels": inputs["kto"]["desirable"], "kl": inputs["kto"]["z0"]}
    yield case("kto", liger.LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True, **plain), kto, weights=(1.0, 1.0))
    orpo = {**of_targets, "nll_target": problem.with_prompts}
    yield case("orpo", liger.LigerFusedLinearORPOLoss(beta=BETA, **plain), orpo)
    simpo = liger.LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False, **plain)
    yield case("simpo", simpo, of_targets)
    yield case("cpo", liger.LigerFusedLinearCPOLoss(beta=BETA, alpha=ALPHA, **plain), of_targets)
    scored = problem.targets != -100
    grpo = {
        "selected_token_ids": problem.targets.clamp(min=0),
        "attention_mask": scored,
        "advantages": problem.advantages[:, 0],
        **{f"{name[:3]}_per_token_logps": inputs["grpo"][name] for name in ("old_logps", "ref_logps")},
    }
    for variant, options in grpo_variants(scored).items():
        module = liger.LigerFusedLinearGRPOLoss(
            beta=KL_WEIGHT,
            epsilon_low=EPSILON[0],
            epsilon_high=EPSILON[1],
            loss_type=variant.split(",")[0],
            use_bias_correction_kl="weigh_kl" in options,
            max_completion_length=MAX_COMPLETION,
            temperature=TEMPERATURE,
            **plain,
        )
        yield case("grpo", module, {**grpo, "num_items_in_batch": WINDOW_TOKENS}, variant, **options)


# TRL's trainers


@dataclass
class Llama:
    """A tiny random Llama with an untied head, and the hidden states that its head received, call by call."""

    model: PreTrainedModel
    hidden: list[Tensor]

    @classmethod
    def make(cls, seed: int, near: Llama | None = None, distance: float = 0.0) -> Llama:
        """Make a new model, or a copy of `near` with noise of standard deviation `distance` on its weights."""
        from transformers import LlamaConfig
        from transformers.models.auto import AutoModelForCausalLM

        config = LlamaConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = AutoModelForCausalLM.from_config(config).float()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if near is not None:
                    parameter.copy_(near.model.get_parameter(name) + distance * noise)
                elif parameter.ndim > 1:
                    parameter.copy_(0.3 * noise)
        made = cls(model, [])
        model.base_model.register_forward_hook(made._keep)
        return made

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.retain_grad()
        self.hidden.append(hidden)

    @property
    def head(self) -> Tensor:
        return self.model.lm_head.weight


def _tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _texts(count: int, seed: int) -> list[str]:
    """Make texts of 1 to 7 words, a space after each, so that a prompt ends where a token ends."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (count,), generator=generator).tolist()
    drawn = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return ["".join(f"{WORDS[i]} " for i in words) for words in drawn]


ROWS = 4  # in a batch: pairs, prompts, or completions


@contextlib.contextmanager
def _trl(folder: Path) -> Iterator[dict[str, Any]]:
    """Give the options of all trainers, and let TRL run on the CPU and print nothing meanwhile."""
    import datasets

    from exo_fast.benchmarks.methods.step_styles import without_deepspeed

    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    with without_deepspeed():
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        datasets.disable_progress_bars()
        try:
            yield common
        finally:
            datasets.enable_progress_bars()


def _asked(trainer: Any, policy: Llama, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call a trainer's `compute_loss` on a batch; return its hidden states (B, T, D), value, dH and dW."""
    policy.hidden.clear()
    policy.model.zero_grad()
    policy.model.train()
    value = trainer.compute_loss(trainer.model, batch)
    value.backward()
    (hidden,) = [h for h in policy.hidden if h.requires_grad]
    return hidden.detach(), value.detach(), hidden.grad, policy.head.grad.clone()


def _trl_case(loss: str, variant: str, trainer: Any, policy: Llama, asked: tuple[Tensor, ...], given: dict) -> Case:
    hidden, *result = asked
    name = next(c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl."))
    peer = f"TRL {machine.version('trl')} `{name}.compute_loss`"
    return Case(loss, variant, peer, hidden, policy.head.detach(), given, *result)


def trl_dpo_cases(page: Functions) -> Iterator[Case]:
    """Make the cases of DPOTrainer: sigmoid and ipo."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = Llama.make(0), Llama.make(1)
    rows = Dataset.from_dict({k: _texts(ROWS, i) for i, k in enumerate(("prompt", "chosen", "rejected"))})
    with tempfile.TemporaryDirectory() as folder, _trl(Path(folder)) as common:
        args = DPOConfig(beta=BETA, loss_type=["sigmoid"], **common)
        trainer = DPOTrainer(policy.model, reference.model, args, train_dataset=rows, processing_class=_tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        targets = page["next_token_targets"](batch["input_ids"], batch["completion_mask"].bool())
        for loss, name in (("dpo", "sigmoid"), ("ipo", "ipo")):
            trainer.loss_types = [name]
            asked = _asked(trainer, policy, dict(batch))
            ref_logps = page["frozen_logps"](reference.hidden[-1], reference.head, targets).sum(-1)
            given = {"targets": targets, "ref_logps": ref_logps, "beta": BETA}
            yield _trl_case(loss, name, trainer, policy, asked, given)


def trl_kto_cases(page: Functions) -> Iterator[Case]:
    """Make the case of KTOTrainer, with its baseline from the mismatched completions that it makes itself."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy = Llama.make(0)
    reference = Llama.make(1, near=policy, distance=0.1)
    rows = Dataset.from_dict(
        {"prompt": _texts(ROWS, 0), "completion": _texts(ROWS, 1), "label": [True, False, False, True]}
    )
    with tempfile.TemporaryDirectory() as folder, _trl(Path(folder)) as common:
        args = KTOConfig(beta=BETA, desirable_weight=KTO_WEIGHTS[0], undesirable_weight=KTO_WEIGHTS[1], **common)
        trainer = KTOTrainer(policy.model, reference.model, args, train_dataset=rows, processing_class=_tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        asked = _asked(trainer, policy, batch)
        targets = page["next_token_targets"](batch["input_ids"], batch["completion_mask"].bool())
        mismatched = page["next_token_targets"](batch["KL_input_ids"], batch["KL_completion_mask"].bool())
        ref_mismatched, ref_hidden = reference.hidden[-2:]  # in the order in which TRL calls
        frozen = page["frozen_logps"]
        z0 = page["kto_baseline"](
            policy.hidden[0], policy.head, mismatched, frozen(ref_mismatched, reference.head, mismatched).sum(-1)
        )
        given = {
            "targets": targets,
            "ref_logps": frozen(ref_hidden, reference.head, targets).sum(-1),
            "desirable": torch.as_tensor(batch["label"]).bool(),
            "z0": z0,
            "beta": BETA,
            "weights": KTO_WEIGHTS,
        }
        yield _trl_case("kto", "", trainer, policy, asked, given)


def trl_cpo_cases(page: Functions) -> Iterator[Case]:
    """Make the cases of CPOTrainer: sigmoid with its NLL, and simpo without."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy = Llama.make(0)
    rows = Dataset.from_dict({k: _texts(ROWS, i) for i, k in enumerate(("prompt", "chosen", "rejected"))})
    with tempfile.TemporaryDirectory() as folder, _trl(Path(folder)) as common:
        args = CPOConfig(beta=BETA, loss_type="simpo", simpo_gamma=GAMMA, cpo_alpha=0.0, **{**common, "max_length": 64})
        trainer = CPOTrainer(policy.model, args, train_dataset=rows, processing_class=_tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        labels = trainer.concatenated_inputs(batch)["concatenated_labels"]
        given = {"targets": page["next_token_targets"](labels, labels != -100), "beta": BETA}
        asked = _asked(trainer, policy, batch)
        yield _trl_case("simpo", "simpo", trainer, policy, asked, {**given, "gamma": GAMMA})
        trainer.loss_type, trainer.cpo_alpha = "sigmoid", ALPHA
        asked = _asked(trainer, policy, batch)
        yield _trl_case("cpo", "sigmoid", trainer, policy, asked, {**given, "alpha": ALPHA})


def trl_orpo_cases(page: Functions) -> Iterator[Case]:
    """Make the case of ORPOTrainer, whose NLL includes prompts."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy = Llama.make(0)
    rows = Dataset.from_dict({k: _texts(ROWS, i) for i, k in enumerate(("prompt", "chosen", "rejected"))})
    with tempfile.TemporaryDirectory() as folder, _trl(Path(folder)) as common:
        args = ORPOConfig(beta=BETA, **{**common, "max_length": 64})
        trainer = ORPOTrainer(policy.model, args, train_dataset=rows, processing_class=_tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        asked = _asked(trainer, policy, batch)
        both = trainer.concatenated_inputs(batch)
        completion = both["concatenated_labels"] != -100
        scored = completion.clone()
        chosen = slice(len(scored) // 2)
        scored[chosen] = both["concatenated_attention_mask"][chosen].bool()
        of = page["next_token_targets"]
        targets, completion = (of(both["concatenated_input_ids"], mask) for mask in (scored, completion))
        given = {"targets": targets, "completion": completion != -100, "beta": BETA}
        yield _trl_case("orpo", "", trainer, policy, asked, given)


def trl_grpo_cases(page: Functions) -> Iterator[Case]:
    """Make the cases of GRPOTrainer: four loss types with a reference, and PPO's clipped loss (advantages per token,
    bnpo, β = 0).

    Samples are given, not drawn: `compute_loss` gets a batch as the trainer itself makes it after generation.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    policy = Llama.make(0)
    reference, old = Llama.make(1, near=policy, distance=0.05), Llama.make(2, near=policy, distance=0.01)
    tokenizer = _tokenizer()
    rows = Dataset.from_dict({"prompt": _texts(ROWS, 0)})
    with tempfile.TemporaryDirectory() as folder, _trl(Path(folder)) as common:
        del common["max_length"]
        args = GRPOConfig(
            num_generations=2,
            max_completion_length=MAX_COMPLETION,
            temperature=TEMPERATURE,
            epsilon=EPSILON[0],
            epsilon_high=EPSILON[1],
            **common,
        )
        trainer = GRPOTrainer(
            policy.model, lambda completions, **_: [0.0] * len(completions), args, rows, processing_class=tokenizer
        )
        trainer.current_gradient_accumulation_steps = 1
        prompts = tokenizer(_texts(ROWS, 0), padding=True, padding_side="left", return_tensors="pt")
        completions = tokenizer(_texts(ROWS, 1), padding=True, padding_side="right", return_tensors="pt")
        ids = torch.cat([prompts.input_ids, completions.input_ids], 1)
        mask = torch.cat([prompts.attention_mask, completions.attention_mask], 1)
        width = completions.input_ids.shape[1]
        targets = completions.input_ids.masked_fill(completions.attention_mask == 0, -100)
        predicting = slice(-width - 1, -1)  # the positions that predict completion tokens

        tempered = {"scale": 1 / TEMPERATURE}
        theirs, ours = {}, {}
        for name, llama in (("old", old), ("ref", reference)):
            add_fused_lm_head(llama.model, temperature=TEMPERATURE)
            with torch.no_grad():
                theirs[name] = trainer._get_per_token_logps_and_entropies(llama.model, ids, mask, width)[0]
            ours[name] = page["frozen_logps"](llama.hidden[-1][:, predicting], llama.head, targets, **tempered)
        generator = torch.Generator().manual_seed(3)
        advantages = advantages_like(torch.randn(ROWS, width, generator=generator))
        batch = {
            "prompt_ids": prompts.input_ids,
            "prompt_mask": prompts.attention_mask,
            "completion_ids": completions.input_ids,
            "completion_mask": completions.attention_mask,
            "advantages": advantages[:, 0],
            "old_per_token_logps": theirs["old"],
            "ref_per_token_logps": theirs["ref"],
            "num_items_in_batch": torch.tensor(WINDOW_TOKENS),
        }

        def case(loss: str, variant: str, given: dict[str, Any], **changed: Any) -> Case:
            hidden, value, d_hidden, d_weight = _asked(trainer, policy, {**batch, **changed})
            asked = (hidden[:, predicting], value, d_hidden[:, predicting], d_weight)
            given = {"targets": targets, "old_logps": ours["old"], **tempered, **given}
            return _trl_case(loss, variant, trainer, policy, asked, given)

        group = {
            "advantages": advantages[:, 0],
            "ref_logps": ours["ref"],
            "beta": KL_WEIGHT,
            "epsilon": EPSILON,
        }
        trainer.beta = KL_WEIGHT
        for variant, options in grpo_variants(targets != -100).items():
            trainer.loss_type = variant.split(",")[0]
            trainer.args.use_bias_correction_kl = "weigh_kl" in options
            yield case("grpo", variant, {**group, **options})
        trainer.loss_type, trainer.beta, trainer.epsilon_high = "bnpo", 0.0, EPSILON[0]
        given = {"advantages": advantages, "epsilon": EPSILON[0]}
        yield case("ppo", "bnpo, advantages per token", given, advantages=advantages)
