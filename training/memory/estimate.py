"""Estimate the memory of a training step by running it on tensors without data.

Nothing is guessed from layer sizes. The model is made from its configuration, with weights that have shapes and no
values (torch's `FakeTensorMode`); the step's forward and backward are run on them, operation by operation; and a
`Meter` adds up the storages that are alive. So all that an architecture keeps for its backward pass is counted as it
is: gradient checkpointing, LoRA, autocast, tied embeddings, mixtures of experts. A model of any size takes seconds
and next to no memory, and needs no weights.

Three parts are formulas, because they are no torch operations of the step: the scratch of heads that form no logits
(`fused_scratch`, `tiled_scratch`), Adam's state, and the engine's memory beside the model (`Engine`).

Three methods of `exo_fast.benchmarks.methods.step_styles` are compared:

    full-logits   a row per candidate, logits of all positions, policy and reference model in every step
    trl           a row per candidate, the head in tiles of the logits, policy and reference model
    exo_fast      a row per group with one prompt, the fused head, cached reference log-probs

An estimate counts tensors. Not in it: the interpreter and its libraries; the holes that an allocator keeps between
tensors (the C library's heap on a CPU, PyTorch's caching allocator on a GPU); on a GPU, the context. The margins of
`exo_fast.training.memory.command` allow for them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exo_fast.backends import head_attention, scratch_budget
from exo_fast.backends.attention import Span, packed_attention
from exo_fast.backends.torch import Plan
from exo_fast.head import Head, decoder, read_head
from exo_fast.masks import MaskPlan, additive_mask, plan_mask, sees
from exo_fast.training.memory.meter import Meter

METHODS = ("full-logits", "trl", "exo_fast")
PARTS = ("weights", "reference", "gradients", "optimizer", "engine", "activations", "mask", "head", "backward")
MOMENTS = ("forward and backward", "update")
TILE_TOKENS, TILE_VOCAB = 4096, 32768  # of TRL 1.16's head
TILE_COPIES = 7.25  # float32 copies of a tile that its backward pass holds at once if Triton does not run
BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size
GATHERED = 1_000_000_000  # elements: DeepSpeed's default stage3_max_live_parameters


@dataclass(frozen=True)
class Setting:
    """One training step of one process: `groups` groups of `candidates` completions, all of one length.

    `dtype` is the dtype of the weights; DeepSpeed keeps float32 copies of them. `autocast` casts float32 weights to
    bf16 as they are used. Raises ValueError for an invalid value.
    """

    method: str
    prompt: int
    completion: int
    candidates: int
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    gradient_checkpointing: bool = False
    lora_r: int = 0  # 0: the whole model is trained
    optimizer: str = "adamw"  # fused, as in transformers.Trainer; or "sgd"
    engine: str = "deepspeed"  # or "torch"
    zero_stage: int = 2
    offload: bool = False
    processes: int = 1
    device: str = "cpu"  # or "cuda"
    memory_budget: int | None = None  # of the fused head, as in exo_fast.loss

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("optimizer", ("adamw", "sgd")),
            ("engine", ("deepspeed", "torch")),
            ("zero_stage", (0, 1, 2, 3)),
            ("device", ("cpu", "cuda")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(map(str, known))} is needed")
        for name, least in (("prompt", 1), ("completion", 1), ("groups", 1), ("processes", 1), ("candidates", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} is needed")

    @property
    def targets(self) -> int:
        """N, the completion tokens of the step."""
        return self.groups * self.candidates * self.completion

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process holds at its peak, in the second step or a later one."""

    setting: Setting
    parts: dict[str, int]  # by names of PARTS, without zeros
    moment: str  # the one of MOMENTS that takes the most
    parameters: int
    rows: tuple[int, int]  # (B, T) of the model's input
    shared: bool  # whether candidates share their prompt
    host: int  # bytes of CPU memory that offloading takes beside `parts`

    @property
    def total(self) -> int:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())


def estimate(config: Any, setting: Setting) -> Estimate:
    """Return the peak of `setting`'s step for a transformers configuration of a causal LM.

    Raises ValueError for a model whose head the fused losses cannot read, and for one whose forward looks at values.
    """
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        policy = _model(config, setting)
        reference = None
        if setting.method != "exo_fast" and setting.lora_r == 0:
            reference = _model(config, setting).requires_grad_(False)
        parameters = list(policy.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        engine = Engine(setting, trained, sum(p.numel() for p in parameters))
        meter = _StepMeter(engine.shares())
        step = _Step(policy, reference, setting, meter)
        with meter, step.as_with_values():
            for label, model in (("weights", policy), ("reference", reference)):
                if model is not None:
                    with meter.labelled(label):
                        meter.hold([*model.parameters(), *model.buffers()])
            models = dict(meter.now)
            bucket = engine.watch(policy, meter)
            try:
                step.run()
            except (RuntimeError, TypeError, NotImplementedError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"model type {config.model_type!r}: its step cannot be run without values, so what it takes is not "
                    f"known: {reason}"
                ) from error
            del bucket
    training = _sum(meter.peak, engine.kept(), engine.gathered())
    updating = _sum(models, engine.kept(), engine.update())
    moments = dict(zip(MOMENTS, (training, updating), strict=True))
    moment = max(MOMENTS, key=lambda name: sum(moments[name].values()))
    parts = {part: moments[moment][part] for part in PARTS if moments[moment].get(part)}
    return Estimate(setting, parts, moment, sum(p.numel() for p in parameters), step.shape, step.shared, engine.host())


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in parts) for name in PARTS}


def _model(config: Any, setting: Setting) -> nn.Module:
    """Return the policy (or its reference): random weights of a dtype, LoRA adapters, no dropout; in training mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    if setting.gradient_checkpointing:
        # Without dropout there is no random state to restore.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if setting.lora_r:
        _add_lora(model, setting.lora_r)
    return model.train()


class _Adapted(nn.Module):
    """A frozen linear layer with a float32 LoRA adapter beside it, computed as PEFT computes it.

    PEFT itself moves its adapters to a device, which tensors without values refuse.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, linear.out_features, bias=False, dtype=torch.float32)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self.linear(inputs)
        return out + self.up(self.down(inputs.float())).to(out.dtype)


def _add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the model and adapt every linear layer but the lm_head."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(parent, name, _Adapted(child, rank))


class _StepMeter(Meter):
    """Also counts the float32 copy in which scatter_add sums half-precision values on a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.scatter_add.default and args[0].itemsize == 2:
            wide = super().__torch_dispatch__(torch.ops.aten.to.dtype, types, (args[0], torch.float32))
            out = super().__torch_dispatch__(func, types, args, kwargs)
            del wide
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)


class Engine:
    """The memory of DeepSpeed, or DDP, beside the model, in bytes for each of `trained` parameters.

    Read off DeepSpeed 0.19 on a CPU with a fused Adam, float32 and bf16 weights: stages 0 to 3 with one process, 1 to 3
    with two. Not measured: a GPU's buckets, offloading and DDP, which follow DeepSpeed's and PyTorch's defaults.
    With w bytes a weight and P processes:

        stage          kept                       at the end of backward    in the update
        0, float32     8                          w and a bucket of w       w
        0, bf16        4 + 8                      w and a bucket of w       w + 4
        1, 2           (4 + 8) / P                w and a bucket of w       8 / P
        3              (4 + 8 + w) / P            nothing more              4 / P, and 2 / P for bf16

    4 is a float32 copy, 8 Adam's state and, in stage 3, w a buffer of gradients. A bucket has at most BUCKET
    elements; on a GPU stages 1 and 2 allocate two of them, whatever the model's size. Stage 3 holds w / P of weights,
    and up to GATHERED of them in one piece if P > 1.
    """

    def __init__(self, setting: Setting, trained: int, parameters: int) -> None:
        self.setting, self.trained, self.parameters = setting, trained, parameters
        self.width = setting.dtype.itemsize
        self.deepspeed = setting.engine == "deepspeed"
        self.stage = setting.zero_stage if self.deepspeed else 0
        self.spread = setting.processes if self.stage else 1
        self.offload = setting.offload and self.stage > 0 and setting.device != "cpu"
        self.bucket = min(trained, BUCKET) if setting.processes > 1 or self.deepspeed else 0

    def shares(self) -> dict[str, float]:
        """Return the share of weights and gradients that one process holds (for `Meter`)."""
        gradients = 1.0
        if self.stage == 3:
            gradients = 0.0  # their buffer is kept from the start: see `kept`
        elif self.stage:
            gradients = max(1 / self.spread, self.bucket / max(1, self.trained))
        weights = 1.0 if self.stage < 3 else 0.0 if self.offload else 1 / self.spread
        return {"weights": weights, "reference": weights, "gradients": gradients}

    def watch(self, policy: nn.Module, meter: Meter) -> list[Tensor]:
        """Label gradients as they are finished, and fill the bucket with them; returns the bucket's tensors."""
        filled: list[Tensor] = []
        room = 0 if self.stage == 3 or self._fixed_buckets else self.bucket

        def finished(parameter: nn.Parameter) -> None:
            nonlocal room
            meter.relabel(parameter.grad, "gradients")
            if room > 0:
                with meter.labelled("engine"):
                    filled.append(torch.empty(min(room, parameter.numel()), dtype=parameter.dtype))
                room -= parameter.numel()

        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(finished)
        return filled

    @property
    def _fixed_buckets(self) -> bool:
        return self.stage in (1, 2) and self.setting.device != "cpu"

    def kept(self) -> dict[str, int]:
        """Return the bytes kept from step to step on the model's device."""
        copies = 4 if self.stage or (self.deepspeed and self.width < 4) else 0
        gradients = self.width if self.stage == 3 else 0
        buckets = 2 * BUCKET * self.width if self._fixed_buckets else 0
        if self.offload:
            return {"engine": buckets}
        return {
            "optimizer": self.trained * self._adam // self.spread,
            "engine": self.trained * (copies + gradients) // self.spread + buckets,
        }

    @property
    def _adam(self) -> int:
        """The bytes of Adam's state for a parameter: in float32 if there is a float32 copy."""
        width = 4 if self.deepspeed else self.width
        return 2 * width if self.setting.optimizer == "adamw" else 0

    def gathered(self) -> dict[str, int]:
        """Return the bytes of weights in one piece during forward and backward."""
        if self.stage < 3 or (self.setting.processes == 1 and not self.offload):
            return {}
        return {"engine": min(self.parameters, GATHERED) * self.width}

    def update(self) -> dict[str, int]:
        """Return the bytes of the optimizer's step, beside `kept`."""
        if self.offload:
            return {}
        if not self.stage:
            copies = 4 if self.deepspeed and self.width < 4 else 0
            return {"gradients": self.trained * self.width, "engine": self.trained * copies}
        if self.stage == 3:
            return {"engine": self.trained * (4 if self.width == 4 else 6) // self.spread}
        return {
            "gradients": self.trained * self.width // self.spread,
            "engine": self.trained * (8 - self.width) // self.spread,
        }

    def host(self) -> int:
        """Return bytes of CPU memory for offloading: float32 copies, Adam's state and gradients, and weights."""
        weights = self.parameters * self.width if self.stage == 3 else 0
        return (self.trained * (4 + self._adam + 4) + weights) // self.spread if self.offload else 0


class _Step:
    """Forward and backward of a setting's method, on models without values."""

    def __init__(self, policy: nn.Module, reference: nn.Module | None, setting: Setting, meter: Meter) -> None:
        self.policy, self.reference, self.setting, self.meter = policy, reference, setting, meter
        self.head = read_head(policy)
        self.plan = plan_mask(policy.config)
        self.shared = setting.method == "exo_fast" and self.plan.share
        per_row = setting.candidates if self.shared else 1
        batch = setting.groups * setting.candidates // per_row
        self.shape = (batch, setting.prompt + per_row * setting.completion)

    def run(self) -> None:
        method: dict[str, Callable[[nn.Module], Tensor]] = {
            "full-logits": self._full_logits,
            "trl": self._tiled,
            "exo_fast": self._fused,
        }
        logps = method[self.setting.method]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.autocast):
            loss = logps(self.policy)
            if self.setting.method != "exo_fast":
                with torch.no_grad():
                    known = self._of_reference(logps)
                loss = loss - known
        with self.meter.labelled("backward"):
            loss.sum().backward()

    def _of_reference(self, logps: Callable[[nn.Module], Tensor]) -> Tensor:
        if self.reference is not None:
            return logps(self.reference)
        return logps(self.policy)  # with its adapters off, which take next to nothing

    def _hidden(self, model: nn.Module, **inputs: Tensor) -> Tensor:
        ids = torch.zeros(self.shape, dtype=torch.long)
        with self.meter.labelled("activations"):
            return decoder(model)(input_ids=ids, use_cache=False, **inputs).last_hidden_state

    def _full_logits(self, model: nn.Module) -> Tensor:
        """Compute as `step_styles.full_logits`: logits divided by a temperature, log-softmax over all positions."""
        hidden = self._hidden(model)
        with self.meter.labelled("head"):
            head = read_head(model)
            logits = nn.functional.linear(hidden, head.weight, head.bias)
            del hidden
            if head.softcap is not None:
                logits = torch.tanh(logits / head.softcap) * head.softcap
            logits = logits / 1.0
            targets = torch.zeros((*self.shape, 1), dtype=torch.long)
            return logits.log_softmax(-1)[:, :-1].gather(2, targets[:, 1:]).sum()

    def _tiled(self, model: nn.Module) -> Tensor:
        hidden = self._hidden(model).flatten(0, 1)
        with self.meter.labelled("head"):
            # All positions of a row but the last, the prompt's too.
            hidden = hidden[torch.zeros(self.shape[0] * (self.shape[1] - 1), dtype=torch.long)]
            return _FormsNoLogits.apply(
                hidden, read_head(model).weight, tiled_scratch(self.setting, len(hidden)), False
            )

    def _fused(self, model: nn.Module) -> Tensor:
        hidden = self._hidden(model, **self._shared_inputs() if self.shared else {}).flatten(0, 1)
        with self.meter.labelled("head"):
            hidden = hidden[torch.zeros(self.setting.targets, dtype=torch.long)].to(self.setting.compute_dtype)
            scratch = fused_scratch(self.setting, hidden, self.head)
            return _FormsNoLogits.apply(hidden, self.head.weight, scratch, True)

    def _shared_inputs(self) -> dict[str, Any]:
        """Return positions and masks as `exo_fast.masks.model_inputs` makes them, but without looking at values."""
        group_ids = torch.zeros(self.shape, dtype=torch.int32)
        positions = torch.zeros(self.shape, dtype=torch.long)

        def mask(window: int | None) -> Tensor:
            if self._in_parts(window):
                return torch.zeros((), dtype=self.setting.compute_dtype).expand(
                    self.shape[0], 1, self.shape[1], self.shape[1]
                )
            mask_mod = sees(group_ids, group_ids, positions, window)
            return additive_mask(mask_mod, group_ids.shape, self.setting.compute_dtype, "cpu")

        with self.meter.labelled("mask"):
            return {"position_ids": positions, "attention_mask": by_layer(self.plan, mask)}

    @contextlib.contextmanager
    def as_with_values(self) -> Iterator[None]:
        """Let two functions that look at values act as they would with this step's values.

        Attention with the mask of `_shared_inputs` runs `exo_fast.backends.attention` over this step's rows, which
        otherwise reads the rows from the packed ids. And transformers treats rows without a mask as one text each, and
        makes no mask for them.
        """
        from transformers import masking_utils

        functional = nn.functional
        plain, find = functional.scaled_dot_product_attention, masking_utils.find_packed_sequence_indices
        lengths = (self.setting.completion,) * self.setting.candidates
        spans = tuple(Span(row, 0, self.setting.prompt, lengths) for row in range(self.setting.groups))

        def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any):
            if attn_mask is not None and not any(attn_mask.stride()):
                return packed_attention(query, key, value, spans, options.get("scale"))
            return plain(query, key, value, attn_mask=attn_mask, **options)

        # Not by a mode of torch: it would be off in a backward pass that recomputes layers.
        functional.scaled_dot_product_attention = attention
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = plain
            masking_utils.find_packed_sequence_indices = find

    def _in_parts(self, window: int | None) -> bool:
        longest = self.setting.prompt + self.setting.completion
        in_parts = self.setting.device == "cpu" and self.policy.config._attn_implementation == "sdpa"
        return in_parts and (window is None or window >= longest)


def by_layer(plan: MaskPlan, mask: Callable[[int | None], Any]) -> Any:
    """Return the mask, or masks, that a model takes, from `mask(window)`."""
    if plan.kind != "by_layer":
        return mask(plan.window)
    return {name: mask(plan.window if name == "sliding_attention" else None) for name in plan.layer_types}


class _FormsNoLogits(torch.autograd.Function):
    """Stands in for a head that works on pieces of the logits: `scratch` bytes for as long as it runs, dH, dW.

    `at_once`: the gradients are formed in forward (`linear_group_loss`), else in backward. dW is summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scratch: int, at_once: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.gradients, ctx.scratch = None, scratch
        if at_once:
            ctx.gradients = _FormsNoLogits.form(ctx, hidden, weight)
        else:
            torch.empty(scratch, dtype=torch.uint8)
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def form(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dh = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dw = torch.empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        torch.empty(ctx.scratch, dtype=torch.uint8)
        return dh, dw

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        dh, dw = ctx.gradients or _FormsNoLogits.form(ctx, hidden, weight)
        ctx.gradients = None
        return dh, None if dw is None else dw.to(weight.dtype), None, None


def fused_scratch(setting: Setting, hidden: Tensor, head: Head) -> int:
    """Return the bytes that `linear_group_loss` takes beside dH and a float32 dW, among them autocast's cast of W."""
    vocab, width = head.weight.shape
    cast = 0 if head.weight.dtype == hidden.dtype else vocab * width * hidden.itemsize
    if setting.device != "cpu":
        budget = scratch_budget(setting.memory_budget, torch.device(setting.device))
        return cast + min(budget, 6 * setting.targets * vocab)
    if head_attention.applies(setting.targets, hidden, head):
        return cast + head_attention.Sizes(setting.targets, width, setting.memory_budget, hidden.device).bytes
    plan = Plan.of(setting.targets, hidden, head, setting.memory_budget, setting.candidates * setting.completion)
    wide = 0 if hidden.dtype == torch.float32 else plan.block * width * 4
    return cast + (plan.bytes if plan.rows else plan.block_rows * plan.block * 4 + wide)


def tiled_scratch(setting: Setting, tokens: int) -> int:
    """Return the bytes of a tile of TRL's head, and of the copies its backward pass makes without Triton."""
    tile = min(tokens, TILE_TOKENS) * TILE_VOCAB
    return int(tile * (setting.compute_dtype.itemsize + (4 * TILE_COPIES if setting.device == "cpu" else 0)))
