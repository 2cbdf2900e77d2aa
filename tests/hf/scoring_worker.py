"""One rank of a gloo world that scores its rows with wrapped models: ``python -m tests.hf.scoring_worker FOLDER RANK``.

``cases.pt`` in the folder holds the batch of each rank; RANK.pt gets, by case, the kernel that was found, the
log-probabilities of the rank's rows, and the gradients of their sums, averaged over ranks.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from exo_toy.integrations.scoring import completion_logps, resolve_kernel, unwrap
from tests.hf.conftest import tiny_llama

PATIENCE = timedelta(seconds=60)
WORLD = 2


def model_for(case: str, n_vocab: int) -> nn.Module:
    """The same on every rank, before it is wrapped."""
    dtype = torch.float32 if "half" in case else torch.float64
    return tiny_llama(n_vocab, dtype=dtype, tied="tied" in case).eval()


def wrap(case: str, model: nn.Module) -> nn.Module:
    if case.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in case)
    mesh = init_device_mesh("cpu", (WORLD,))
    half = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if "half" in case else {}
    if "rounded" in case:
        half = {"mp_policy": MixedPrecisionPolicy(output_dtype=torch.bfloat16)}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **half)
    if "head" in case:
        fully_shard(model.lm_head, mesh=mesh, **half)
    return fully_shard(model, mesh=mesh, **half)


CASES = ["ddp", "ddp unused", "ddp tied", "fsdp", "fsdp head", "fsdp tied", "fsdp half", "fsdp rounded half"]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    stored = torch.load(folder / "cases.pt")
    batch, results = stored["batches"][rank], {}
    for case in CASES:
        model = wrap(case, model_for(case, stored["n_vocab"]))
        kernel = resolve_kernel(model, input_ids=batch["input_ids"])
        logps = completion_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        logps.sum().backward()
        gradients = {
            name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for name, p in unwrap(model).named_parameters()
        }
        with torch.no_grad():
            again = completion_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        results[case] = {"kernel": kernel, "logps": logps.detach(), "again": again, "gradients": gradients}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
