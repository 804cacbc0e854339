"""Versions of transformers that training does not know give a message, and never another training."""

import logging

import pytest
from transformers import Trainer

from exo_fast.training.trainer import compat
from exo_fast.training.trainer.trainer import StageTrainer


def test_every_method_that_is_replaced_is_checked() -> None:
    replaced = {name for name in vars(StageTrainer) if name in dir(Trainer) and callable(getattr(Trainer, name))}
    own = {name for name in replaced if not name.startswith("__")} - {"init_hf_repo"}  # which does nothing here
    called = {"_load_optimizer_and_scheduler", "_load_scaler"}
    assert own | called == set(compat.OVERRIDDEN)


@pytest.mark.parametrize("version", ["4.57.6", "5.8.1"])
def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat.transformers, "__version__", version)
    with pytest.raises(ImportError, match=f"transformers {version}: .* tested with transformers 5.9 to .*pip install"):
        compat.check_version()


def test_a_newer_transformers_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compat.transformers, "__version__", "5.99.0")
    monkeypatch.setattr(compat.logger, "propagate", True)
    compat.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        compat.check_version()
    assert "and this is 5.99.0" in caplog.text
    assert "pip install 'transformers>=5.9,<" in caplog.text


def test_a_method_with_other_parameters_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_batch_samples(self, epoch_iterator, num_batches): ...

    monkeypatch.setattr(Trainer, "get_batch_samples", get_batch_samples)
    needed = r"Trainer.get_batch_samples takes \(epoch_iterator, num_batches\).*\(epoch_iterator, num_batches, device\)"
    with pytest.raises(ImportError, match=needed):
        compat.check_version()


def test_a_method_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_load_scaler")
    with pytest.raises(ImportError, match=r"Trainer\._load_scaler is gone"):
        compat.check_version()
