"""One rank of a gloo world: runs the cases its parent stored in a folder, and stores what came of them.

``python -m tests.sharded_worker FOLDER RANK WORLD_SIZE`` reads ``cases.pt`` and writes ``RANK.pt``: a result per case,
None on the ranks outside the case's group. A case has the fields of ``tests.test_kernels_sharded.Case``.
"""

import sys
from datetime import timedelta
from pathlib import Path

import jaxtyping
import torch
import torch.distributed as dist
from torch import Tensor

# As in conftest.py: before the first import of the library.
jaxtyping.install_import_hook("exo_toy", "beartype.beartype")

from exo_toy.kernels import linear_logps  # noqa: E402

# A rank that waits longer than this for another one fails.
PATIENCE = timedelta(seconds=60)


def run(case: dict, group: dist.ProcessGroup, calls: list[list]) -> dict:
    """Outputs and gradients of a case at this rank's place in its group, or its error.

    A new list is appended to ``calls`` before the forward, the backward, and the backward of that.
    """
    slices = [whole.split(case["sizes"]) for whole in (case["weight"], case["bias"]) if whole is not None]
    mine = [parts[dist.get_rank(group)] for parts in slices]
    inputs = dict(zip(("hidden", "weight", "bias"), [case["hidden"], *mine], strict=False))
    learning = [inputs[name].requires_grad_() for name in case["learning"]]

    def step(**tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = linear_logps(labels=case["labels"], group=group, **tensors, **case["options"])
        return outputs if isinstance(outputs, tuple) else (outputs,)

    # The checks of annotations cannot be compiled.
    jaxtyping.config.update("jaxtyping_disable", case["compiled"])
    function = torch.compile(step, fullgraph=True) if case["compiled"] else step
    result: dict = {}
    try:
        calls.append([])
        with torch.set_grad_enabled(bool(learning)):
            outputs = function(**inputs)
        result["outputs"] = [x.detach() for x in outputs]
        calls.append([])
        if learning:
            used, cotangents = zip(
                *[(x, g) for x, g in zip(outputs, case["cotangents"], strict=True) if g is not None], strict=True
            )
            gradients = torch.autograd.grad(used, learning, cotangents, create_graph=case["twice"])
            result["gradients"] = {name: x.detach() for name, x in zip(case["learning"], gradients, strict=True)}
        if case["twice"]:
            calls.append([])
            torch.autograd.grad(gradients[0].square().sum(), learning)
    except (ValueError, RuntimeError) as error:
        if case["error"] is None:
            error.add_note(f"in case {case['name']!r}")
            raise
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    all_reduce, calls = dist.all_reduce, []

    def counted(tensor: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None) -> None:
        calls[-1].append(("max" if op == dist.ReduceOp.MAX else "sum", tensor.numel(), tensor.dtype))
        all_reduce(tensor, op, group)

    dist.all_reduce = counted
    cases = torch.load(folder / "cases.pt")
    # Groups are made by all ranks together, in one order.
    groups = {ranks: dist.new_group(list(ranks), timeout=PATIENCE) for ranks in sorted({c["ranks"] for c in cases})}
    results: list[dict | None] = []
    for case in cases:
        calls.clear()
        inside = rank in case["ranks"]
        results.append({**run(case, groups[case["ranks"]], calls), "calls": calls[:]} if inside else None)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
