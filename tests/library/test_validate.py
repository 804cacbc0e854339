"""Every argument error: raised before work, a ValueError that names the argument, what came and what is needed."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exo_fast import backends
from exo_fast.backends import choose, scratch_budget
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss, linear_group_loss


def on(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor as if it were on a device that may not be there."""
    with FakeTensorMode():
        return torch.empty(shape or (2, 3), device=device, dtype=dtype)


def good() -> dict:
    return {
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(7, 3),
        "targets": torch.tensor([0, 1, 2, 6]),
        "cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32),
        "ref_logps": torch.zeros(1, 2),
        "rewards": torch.tensor([[1.0, 0.0]]),
        "loss_type": "exo-pref",
    }


CASES = {
    "hidden-shape": ({"hidden": torch.randn(4)}, r"hidden must be \(N, D\)"),
    "hidden-batch": (
        {"hidden": torch.randn(1, 4, 3), "targets": torch.zeros(1, 4, dtype=torch.long)},
        r"hidden must be \(N, D\), the rows",
    ),
    "hidden-type": ({"hidden": [[1.0]]}, "hidden must be a tensor, got list"),
    "hidden-dtype": ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, "hidden must be float64, .*got torch.int64"),
    "weight-shape": ({"weight": torch.randn(3, 7)}, r"weight must be \(V, D\) with D = 3.*got \(3, 7\)"),
    "weight-dtype": ({"weight": torch.randn(7, 3).bfloat16()}, "hidden is torch.float32 and weight is torch.bfloat16"),
    "weight-device": ({"weight": on("cuda", 7, 3)}, "weight is on cuda:0 and hidden on cpu"),
    "weight-meta": (
        {"weight": torch.randn(7, 3, device="meta")},
        "weight is on the meta device, which holds no values",
    ),
    "targets-shape": ({"targets": torch.tensor([0, 1])}, r"targets must have shape \(4,\).*got \(2,\)"),
    "targets-dtype": ({"targets": torch.zeros(4)}, "targets must be int64 or int32 token ids, got torch.float32"),
    "targets-high": ({"targets": torch.tensor([0, 1, 7, 2])}, r"targets\[2\] \(flattened\) is 7; .*\[0, 7\)"),
    "targets-low": ({"targets": torch.tensor([0, -100, 1, 2])}, r"targets\[1\] \(flattened\) is -100"),
    "bias-shape": ({"bias": torch.zeros(3)}, r"bias must be \(V,\) = \(7,\) as weight, got \(3,\)"),
    "scale": ({"scale": float("nan")}, "scale must be a finite number other than 0, got nan"),
    "softcap": ({"softcap": 0.0}, "softcap must be a positive number or None, got 0.0"),
    "budget": ({"memory_budget": 0}, "memory_budget must be a positive number of bytes or None, got 0"),
    "process-group": ({"process_group": object()}, r"process_group must be a torch.distributed.ProcessGroup.* object"),
    "backend": ({"backend": "cuda"}, "backend='cuda' is not known; choose one of auto, reference, torch, triton"),
    "loss-type": ({"loss_type": "ppo"}, "loss_type='ppo' is not known; choose one of exo-pref, exo-rw"),
    "one-candidate": (
        {"ref_logps": torch.zeros(2, 1), "rewards": torch.zeros(2, 1)},
        r"ref_logps must be \(G, K\), .*at least 2 candidates, got \(2, 1\)",
    ),
    "rewards-shape": ({"rewards": torch.zeros(2, 2)}, r"rewards must be \(G, K\) = \(1, 2\)"),
    "rewards-dtype": (
        {"rewards": torch.tensor([[1, 0]])},
        r"rewards must be float64, float32, bfloat16 or float16, got torch.int64: pass rewards.float\(\)",
    ),
    "rewards-bool": ({"rewards": torch.tensor([[True, False]])}, r"got torch.bool: pass rewards.float\(\)"),
    "rewards-nan": ({"rewards": torch.tensor([[1.0, float("nan")]])}, r"rewards\[0, 1\] is nan; every value"),
    "ref-inf": ({"ref_logps": torch.tensor([[float("-inf"), 0.0]])}, r"ref_logps\[0, 0\] is -inf; every value"),
    "rewards-tie": ({"rewards": torch.tensor([[1.0, 1.0]])}, r"rewards\[0\] = \[1.0, 1.0\] has a tie for the highest"),
    "ties": ({"ties": "drop"}, "ties='drop' is not known; choose one of error, share"),
    "ties-none": ({"ties": None}, "ties=None is not known; choose one of error, share"),
    "beta-pi": ({"beta_pi": 0.0}, "beta_pi must be a positive number, got 0.0"),
    "beta-r": ({"beta_r": -1.0}, "beta_r must be a positive number, got -1.0"),
    "smoothing-zero": ({"label_smoothing": 0.0}, "label_smoothing=0.0: exo-pref needs 0 < label_smoothing < 1"),
    "smoothing-one": (
        {"label_smoothing": 1.0, "loss_type": "dpo-pref"},
        "label_smoothing=1.0: dpo-pref needs 0 <= label_smoothing < 1",
    ),
    "boundaries-shape": (
        {"cu_seqlens": torch.tensor([0, 4])},
        r"cu_seqlens must be int32 or int64 of shape \(G\*K \+ 1,\) = \(3,\)",
    ),
    "boundaries-end": ({"cu_seqlens": torch.tensor([0, 1, 5])}, "cu_seqlens must run from 0 to N = 4, got 0 to 5"),
    "boundaries-empty": (
        {"cu_seqlens": torch.tensor([0, 0, 4])},
        r"cu_seqlens\[0:2\] = \[0, 0\]: sequence 0 has 0 tokens",
    ),
    "boundaries-device": ({"cu_seqlens": on("cuda", 3).int()}, "cu_seqlens is on cuda:0 and hidden on cpu"),
    "rewards-device": ({"rewards": on("cuda", 1, 2)}, "rewards is on cuda:0 and ref_logps on cpu"),
    "hidden-layout": ({"hidden": torch.ones(4, 3).to_sparse()}, "hidden must be a dense tensor, got torch.sparse_coo"),
    "hidden-nested": (
        {"hidden": torch.nested.nested_tensor([torch.ones(4, 3)])},
        "hidden must be a dense tensor, got a",
    ),
    "hidden-eight-bits": ({"hidden": torch.ones(4, 3).to(torch.float8_e5m2)}, "hidden must be float64.*float8_e5m2"),
    "hidden-width": ({"hidden": torch.ones(4, 0), "weight": torch.ones(7, 0)}, r"hidden must be .*D at least 1.*4, 0"),
    "rewards-eight-bits": (
        {"rewards": torch.ones(1, 2).to(torch.float8_e5m2)},
        "rewards must be float64.*float8_e5m2",
    ),
    "scale-word": ({"scale": "1"}, "scale must be a finite number other than 0, got '1'"),
    "scale-beyond-float32": ({"scale": 1e39}, r"scale must be a finite number other than 0, got 1e\+39"),
    "softcap-tensor": ({"softcap": torch.ones(2)}, "softcap must be a positive number or None, got a Tensor"),
    "softcap-beyond-float32": ({"softcap": 1e39}, r"softcap must be a positive number or None, got 1e\+39"),
    "budget-beyond-64-bits": (
        {"memory_budget": 2**63},
        "memory_budget must be a positive number of bytes or None",
    ),
    "loss-type-list": ({"loss_type": []}, "loss_type=a list is not known; choose one of exo-pref"),
    "beta-pi-none": ({"beta_pi": None}, "beta_pi must be a positive number, got None"),
    "beta-r-digits": ({"beta_r": 10**5000}, "beta_r must be a positive number, got a int"),
    "beta-r-too-small": (
        {"beta_r": 1e-37, "rewards": torch.tensor([[50.0, 0.0]]), "loss_type": "exo-rw"},
        r"rewards / beta_r\[0, 0\] is inf; beta_r is too small",
    ),
    "smoothing-word": ({"label_smoothing": "0", "loss_type": "exo-rw"}, "label_smoothing must be a number or None"),
    "smoothing-below-float32": ({"label_smoothing": 1e-40}, "label_smoothing=1e-40: exo-pref needs 0 < label_smo"),
    "boundaries-that-wrap-around": (
        {
            "cu_seqlens": torch.tensor([0, 2**63 - 1, -2, 4]),
            "ref_logps": torch.zeros(1, 3),
            "rewards": torch.tensor([[1.0, 0.0, 0.0]]),
        },
        r"cu_seqlens\[1:3\] = \[9223372036854775807, -2\]: sequence 1 has -",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_linear_group_loss_errors(case: str) -> None:
    change, message = CASES[case]
    linear_group_loss(**good())
    with pytest.raises(ValueError, match=message):
        linear_group_loss(**{**good(), **change})


def test_linear_logprobs_errors() -> None:
    hidden, weight, targets = torch.randn(2, 3), torch.randn(7, 3), torch.tensor([1, -100])
    linear_logprobs(hidden, weight, targets)
    with pytest.raises(ValueError, match=r"targets\[1\] .* is -100; ids must lie in \[0, 7\), .* or -1 to be ignored"):
        linear_logprobs(hidden, weight, targets, ignore_index=-1)


def test_group_loss_errors() -> None:
    zeros, rewards = torch.zeros(2, 3), torch.randn(2, 3)
    group_loss(zeros, zeros, rewards, loss_type="exo-rw")
    with pytest.raises(ValueError, match=r"policy_logps must be \(G, K\) = \(2, 3\) as ref_logps, got \(3, 2\)"):
        group_loss(zeros.T, zeros, rewards, loss_type="exo-rw")
    with pytest.raises(ValueError, match=r"policy_logps must be .* got torch.int64"):
        group_loss(zeros.long(), zeros, rewards, loss_type="exo-rw")
    with pytest.raises(ValueError, match="reduction='max' is not known"):
        group_loss(zeros, zeros, rewards, loss_type="exo-rw", reduction="max")
    with pytest.raises(ValueError, match=r"got torch.bool: pass rewards.float\(\)"):
        group_loss(zeros, zeros, rewards > 0, loss_type="exo-rw")
    # a tie that is not for the highest reward, or in *-rw data, is no error
    group_loss(zeros, zeros, torch.tensor([[0.0, 0.0, 1.0]] * 2), loss_type="exo-pref")
    group_loss(zeros, zeros, torch.tensor([[0.0, 1.0, 1.0]] * 2), loss_type="exo-rw")


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("auto", on("cuda", dtype=dtype)) == "triton"
        assert choose("auto", on("cpu", dtype=dtype)) == "torch"
    assert choose("auto", on("cuda", dtype=torch.float64)) == "torch"
    for backend in ("reference", "torch"):
        assert choose(backend, on("cuda")) == backend

    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    with pytest.warns(UserWarning, match="Triton is not installed: backend='auto' runs 'torch'. pip install triton"):
        assert choose("auto", on("cuda")) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", on("cpu")) == "torch"
    with pytest.raises(ValueError, match="backend='triton' needs Triton, which is not installed: pip install triton"):
        choose("triton", on("cuda"))


def test_triton_on_the_cpu_is_the_interpreter_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", on("cpu")) == "triton"
    with pytest.raises(ValueError, match="backend='triton' has no float64: use backend='torch'"):
        choose("triton", on("cpu", dtype=torch.float64))
    monkeypatch.delenv("TRITON_INTERPRET")
    for call in (
        lambda: choose("triton", on("cpu")),
        lambda: linear_group_loss(**good(), backend="triton"),
        lambda: linear_logprobs(torch.randn(2, 3), torch.randn(7, 3), torch.tensor([1, 2]), backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"needs a GPU and hidden is on cpu: .* or set TRITON_INTERPRET=1"):
            call()
    assert choose("triton", on("cuda")) == "triton"


def test_default_memory_budget() -> None:
    assert scratch_budget(None, torch.device("cpu")) == 640 * 2**20
    assert scratch_budget(None, torch.device("cuda")) == 2**30
    assert scratch_budget(7, torch.device("cuda")) == 7
