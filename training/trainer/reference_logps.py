"""Reference log-probs: computed once before training, kept on disk, shared by all runs with the same start.

The reference never changes, so running it in every step (as the original does) is wasted work. They are computed
through the same forward as training, in the same precision, so that the log-ratio of an untrained policy is zero and
not the difference of two roundings. The cache's key is a hash over content: the weights, the token ids (which cover
data, tokenizer, template and lengths at once), the temperature and the precision.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.errors import first_line
from exo_fast.training.files import why_not_writable
from exo_fast.training.models.digests import model_digest
from exo_fast.training.models.modules import AlignModule

if TYPE_CHECKING:
    from exo_fast.training.stages.align import AlignConfig

logger = logging.get_logger(__name__)

FORMAT = 1  # increased when the stored data, or their computation, change


def cache_key(dataset: GroupDataset, model: str, **settings: Any) -> str:
    """Return the SHA-256 of the data set's token ids, a model digest, and the JSON-able settings that change the
    numbers."""
    digest = hashlib.sha256(json.dumps([FORMAT, model, settings], sort_keys=True).encode())
    for ids in (
        dataset.prompt_ids,
        dataset.prompt_offsets,
        dataset.completion_ids,
        dataset.completion_offsets,
    ):
        digest.update(f"{ids.dtype}{ids.shape}".encode())
        digest.update(np.ascontiguousarray(ids).data)
    if dataset.learned is not None:
        digest.update(np.packbits(dataset.learned).data)
    return digest.hexdigest()


def load(directory: str | Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    """Return the cached (G, K) float32 log-probs, or None if the cache has no entry of this shape."""
    try:
        with safe_open(_path(directory, key), framework="pt") as file:
            logps = file.get_tensor("reference_logps")
    except (OSError, RuntimeError, SafetensorError):  # RuntimeError: ~ cannot be resolved
        return None
    return logps if logps.shape == shape and bool(torch.isfinite(logps).all()) else None


def save(directory: str | Path, key: str, logps: Tensor) -> Path:
    """Write the log-probs so that a reader sees all of them or nothing. Raises OSError or SafetensorError."""
    path = _path(directory, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"reference_logps": logps.contiguous()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _path(directory: str | Path, key: str) -> Path:
    return Path(directory).expanduser() / f"{key[:32]}.safetensors"


@torch.no_grad()
def fill_reference_logps(
    config: AlignConfig,
    module: AlignModule,
    name_or_path: str,
    datasets: dict[str, GroupDataset],
    collate: GroupCollator,
) -> dict[str, bool]:
    """Set `ref_logps` of each data set, from the cache or by running `module`; return which came from the
    cache.

    `name_or_path` is the model that `module` (with its adapters off) holds. Only rank 0 reads and writes the
    cache, so no shared file system is needed.
    """
    main, device = config.process_index == 0, config.device
    if main and datasets and (reason := why_not_writable(config.reference_cache_dir)) is not None:
        _warn_of_cache(config, reason)
    model = model_digest(name_or_path) if main and datasets else ""
    hits = {}
    for name, dataset in datasets.items():
        logps, key = None, ""
        if main:
            key = cache_key(
                dataset,
                model,
                temperature=config.temperature,
                weights=str(module.policy.dtype),
                bf16=config.bf16,
                matmul_precision=config.matmul_precision,
                attention=module.config._attn_implementation,
                share_prompt=collate.share_prompt,
                # Earlier versions did not have these, and their numbers depended on how they were batched.
                **({"by_length": [asdict(rule) for rule in collate.by_length]} if collate.by_length else {}),
            )
            logps = load(config.reference_cache_dir, key, tuple(dataset.rewards.shape))
        hits[name] = bool(_from_main(torch.tensor(logps is not None, device=device), config).item())
        if hits[name]:
            logps = torch.empty(dataset.rewards.shape) if logps is None else logps
            dataset.ref_logps = _from_main(logps.to(device), config).cpu()
            if main:
                print(
                    f"reference log-probs ({name}): reused {_path(config.reference_cache_dir, key)}",
                    flush=True,
                )
            continue
        module.eval()
        dataset.ref_logps = compute(
            dataset,
            collate,
            lambda batch: module(reference=True, **batch)[0],
            batch_size=config.per_device_eval_batch_size,
            process_index=config.data_parallel_rank,
            num_processes=config.data_parallel_size,
            copies=config.world_size // config.data_parallel_size,
            device=device,
            description=f"reference log-probs ({name})",
            progress=main and not config.disable_tqdm,
        )
        if main:
            try:
                save(config.reference_cache_dir, key, dataset.ref_logps)
            except (OSError, RuntimeError, SafetensorError) as error:
                _warn_of_cache(config, first_line(error))
    return hits


def _warn_of_cache(config: AlignConfig, reason: str) -> None:
    logger.warning(
        f"reference_cache_dir={config.reference_cache_dir!r}: cannot be written ({reason}); the run goes on, and the "
        "next one computes its reference log-probs anew"
    )


def _from_main(tensor: Tensor, config: AlignConfig) -> Tensor:
    if config.world_size > 1:
        torch.distributed.broadcast(tensor, src=0)
    return tensor


def compute(
    dataset: GroupDataset,
    collate: GroupCollator,
    sequence_logps: Callable[[dict[str, Any]], Tensor],
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    copies: int = 1,
    device: torch.device | str = "cpu",
    description: str = "reference log-probs",
    progress: bool = True,
) -> Tensor:
    """Return (G, K) float32 on the CPU, the same on every process.

    `sequence_logps` maps a batch to (groups of the batch, K). Groups are sorted by length, so that rows are
    full, and dealt out to the processes. Each process makes the same number of calls (ZeRO-3 gathers parameters
    in every call), some perhaps on a batch that another process has too. `process_index` and `num_processes`
    count data-parallel processes, each of which is `copies` processes that get the same batches.
    """
    order = np.argsort(-dataset.lengths(), kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // num_processes)
    logps = torch.zeros(dataset.rewards.shape, dtype=torch.float32, device=device)
    bar = tqdm(total=len(dataset), desc=description, unit=" groups", disable=not progress)
    for step in range(rounds):
        mine = step * num_processes + process_index
        indices = batches[min(mine, len(batches) - 1)]
        batch = collate([dataset[int(index)] for index in indices])
        values = sequence_logps({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        if mine < len(batches):
            logps[torch.from_numpy(indices.copy()).to(device)] = values.float()
        bar.update(min(num_processes * len(indices), len(dataset) - bar.n))
    bar.close()
    if num_processes * copies > 1:
        # Every group is non-zero on one process only, so the sum is exact.
        if torch.distributed.get_rank() % copies > 0:
            logps.zero_()
        torch.distributed.all_reduce(logps)
    return logps.cpu()
