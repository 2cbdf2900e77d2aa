"""The ways of computing token log-probabilities that ``benchmarks.kernels`` compares, and one measurement of one way.

A measurement runs in a process of its own: ``python -m benchmarks.kernel_peers '{"method": ..., ...}'`` prints one line
of JSON. Imports of other libraries stay inside the functions, so that each is loaded only where it is measured.
"""

import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
LOGIT_SCALE = 3.0  # standard deviation of the logits; the largest of 2e9 is then below 20
CHUNK = 512  # rows of a checkpointed chunk
WARM_ROWS = 32
REFERENCE_TILE = 4096

Setting = Literal["full", "frozen", "no_grad", "half"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One measurement: which method, on what, how often."""

    method: str
    setting: Setting
    n: int
    d: int
    vocab: int
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    warmups: int = 0
    calls: int = 1
    length: int = 512
    reference_rows: int = 0


class Problem(NamedTuple):
    """Inputs; those that need a gradient say so. Rows are tokens of sequences of ``length``, chosen ones first."""

    hidden: Tensor  # [n, d]
    weight: Tensor  # [V, d]
    labels: Tensor  # [n]
    upstream: Tensor  # [n], gradient of the loss with respect to the log-probabilities
    length: int

    @property
    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]

    def head(self, rows: int) -> "Problem":
        """The first rows, as two sequences, with the whole weight."""
        rows = min(rows, len(self.hidden)) // 2 * 2
        hidden = self.hidden.detach()[:rows].requires_grad_(self.hidden.requires_grad)
        return Problem(hidden, self.weight, self.labels[:rows], self.upstream[:rows], rows // 2)


class Outcome(NamedTuple):
    """What a step returns: log-probabilities per token [n] or per sequence [n / length], and the inputs' gradients."""

    logps: Tensor
    gradients: tuple[Tensor, ...]


Step = Callable[[Problem], Outcome]


class Unavailable(Exception):
    """A method that cannot run here; the message says why."""


def make_problem(spec: Spec) -> Problem:
    """Random inputs, the same for every process on the same kind of device."""
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(spec.n, spec.d, **options).to(dtype)
    weight = (torch.randn(spec.vocab, spec.d, **options) * (LOGIT_SCALE / spec.d**0.5)).to(dtype)
    labels = torch.randint(spec.vocab, (spec.n,), **options)
    upstream = torch.randn(spec.n, **options)
    if spec.setting == "half":
        labels[torch.randperm(spec.n, **options)[: spec.n // 2]] = IGNORED
    hidden.requires_grad_(spec.setting != "no_grad")
    weight.requires_grad_(spec.setting in ("full", "half"))
    return Problem(hidden, weight, labels, upstream, min(spec.length, spec.n // 2))


def per_token(logps_of: Callable[[Problem], Tensor]) -> Step:
    """The step of a function that returns log-probabilities per token."""

    def step(problem: Problem) -> Outcome:
        inputs = problem.inputs
        with torch.set_grad_enabled(bool(inputs)):
            logps = logps_of(problem)
        gradients = torch.autograd.grad(logps, inputs, problem.upstream.to(logps.dtype)) if inputs else ()
        return Outcome(logps.detach(), gradients)

    return step


def naive_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs = F.linear(hidden, weight).float().log_softmax(-1)
    return log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == IGNORED, 0.0)


def naive(problem: Problem) -> Tensor:
    return naive_rows(problem.hidden, problem.weight, problem.labels)


def checkpointed(problem: Problem) -> Tensor:
    chunks = zip(problem.hidden.split(CHUNK), problem.labels.split(CHUNK), strict=True)
    return torch.cat([checkpoint(naive_rows, rows, problem.weight, y, use_reentrant=False) for rows, y in chunks])


def torch_chunked(problem: Problem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(
        problem.hidden, problem.weight, problem.labels, reduction="none", ignore_index=IGNORED, options=options
    )


def liger_scaled(problem: Problem) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.labels)


def liger_dpo(*, compiled: bool) -> Step:
    """The DPO loss on pairs; its log-probabilities come as sums over sequences."""

    def step(problem: Problem) -> Outcome:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        n, d = problem.hidden.shape
        if n % (2 * problem.length):
            raise Unavailable(f"{n} rows are no pairs of sequences of {problem.length}")
        criterion = LigerFusedLinearDPOLoss(beta=0.1, compiled=compiled, use_ref_model=False)
        hidden, labels = problem.hidden.view(-1, problem.length, d), problem.labels.view(-1, problem.length)
        loss, (chosen, rejected, *_) = criterion(problem.weight, hidden, labels)
        gradients = torch.autograd.grad(loss, problem.inputs)
        return Outcome(torch.cat([chosen, rejected]).detach(), gradients)

    return step


def cut_cross_entropy(**options: Any) -> Step:
    def logps(problem: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(problem.hidden, problem.weight, problem.labels, reduction="none", **options)

    return per_token(logps)


def ours(*, keep: bool = False) -> Step:
    def logps(problem: Problem) -> Tensor:
        from exo_toy.kernels import linear_logps

        # Twice the float32 probabilities: whatever is kept, all of it fits.
        budget = 8 * len(problem.hidden) * len(problem.weight) if keep else 0
        return linear_logps(problem.hidden, problem.weight, problem.labels, ignore_index=IGNORED, save_budget=budget)

    return per_token(logps)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of computing log-probabilities; ``products`` is the number of matrix products a perfect one would do."""

    title: str
    step: Step
    products: dict[Setting, int]
    package: str | None = None
    compiled: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def is_ours(self) -> bool:
        return self.package == "exo_toy"

    def missing(self, device: str) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package.replace('_', '-')} is not installed (pip install 'exo-toy[bench]')"
        if self.step is STEP_OF_TORCH and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        if self.compiled and device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "torch.compile finds no C++ compiler"
        return None


STEP_OF_TORCH = per_token(torch_chunked)
SAVES: dict[Setting, int] = {"full": 3, "frozen": 2, "no_grad": 1, "half": 3}
RECOMPUTES: dict[Setting, int] = {"full": 4, "frozen": 3, "no_grad": 1, "half": 4}
LOSS: dict[Setting, int] = {setting: products for setting, products in SAVES.items() if setting != "no_grad"}
LIGER, CUT = "liger_kernel", "cut_cross_entropy"
METHODS = {
    "naive": Method("naive log_softmax + gather", per_token(naive), SAVES),
    "checkpointed": Method(f"checkpointed, {CHUNK} rows", per_token(checkpointed), {"full": 4, "frozen": 3}),
    "torch": Method("torch linear_cross_entropy", STEP_OF_TORCH, RECOMPUTES),
    "liger_dpo": Method("liger DPO, eager", liger_dpo(compiled=False), LOSS, LIGER),
    "liger_dpo_compiled": Method("liger DPO, compiled", liger_dpo(compiled=True), LOSS, LIGER, compiled=True),
    "liger_scaled": Method("liger scaled CE", per_token(liger_scaled), RECOMPUTES, LIGER),
    "cut_compiled": Method("cut-cross-entropy, compiled", cut_cross_entropy(impl="torch_compile"), SAVES, CUT, True),
    "cut_exact": Method(
        "cut-cross-entropy, exact",
        cut_cross_entropy(impl="cce", filter_eps=None),
        RECOMPUTES,
        CUT,
        compiled=True,
        devices=("cuda",),
    ),
    "cut_filtered": Method(
        "cut-cross-entropy, default", cut_cross_entropy(impl="cce"), RECOMPUTES, CUT, compiled=True, devices=("cuda",)
    ),
    "recompute": Method("exo_toy, recompute", ours(), {"full": 4, "half": 4}, "exo_toy"),
    "keep": Method("exo_toy, keep", ours(keep=True), {"full": 3, "half": 3}, "exo_toy"),
    "frozen": Method("exo_toy, frozen head", ours(), {"frozen": 2}, "exo_toy"),
    "no_grad": Method("exo_toy, no gradient", ours(), {"no_grad": 1}, "exo_toy"),
}
FLOOR = "floor"


class PeakMemory:
    """Bytes of memory above the level at which it was made: resident on the CPU, allocated on CUDA."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.level: int | None = torch.cuda.memory_allocated()
            return
        try:
            # What free() keeps back would be used again unseen.
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.level = self._status("VmHWM")
        except (AttributeError, OSError):
            self.level = None

    def peak(self) -> int | None:
        """None where the system does not tell."""
        if self.level is None:
            return None
        return (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.level

    @staticmethod
    def _status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returned."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def measure_products(spec: Spec) -> dict[str, Any]:
    """Seconds of 1, 2, 3 and 4 bare products, outputs in place: logits twice, then both gradients."""
    problem = make_problem(spec)
    hidden = problem.hidden.detach()[problem.labels != IGNORED]
    weight = problem.weight.detach()
    logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    to_hidden, to_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    products: list[Callable[[], Tensor]] = [
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(logits, weight, out=to_hidden),
        lambda: torch.mm(logits.T, hidden, out=to_weight),
    ]
    torch.mm(hidden[:WARM_ROWS], weight.T)
    rounds = [[timed(product, spec.device)[0] for product in products] for _ in range(spec.warmups + spec.calls)]
    first, second, third, fourth = (statistics.median(times) for times in zip(*rounds[spec.warmups :], strict=True))
    one = (first + second) / 2
    totals = (one, one + third, one + third + fourth, 2 * one + third + fourth)
    return {"rows": len(hidden), **{f"products_{number}": seconds for number, seconds in enumerate(totals, 1)}}


def measure(spec: Spec) -> dict[str, Any]:
    """Seconds, extra memory beyond inputs and gradients, and errors against float64 of one method."""
    method = METHODS[spec.method]
    if (reason := method.missing(spec.device)) is not None:
        raise Unavailable(reason)
    problem = make_problem(spec)
    # Starts threads and libraries, and compiles.
    method.step(problem.head(WARM_ROWS))
    for _ in range(max(spec.warmups, int(method.compiled))):
        method.step(problem)
    memory = PeakMemory(spec.device)
    seconds: list[float] = []
    outcome = None
    for _ in range(spec.calls):
        outcome = None
        elapsed, outcome = timed(lambda: method.step(problem), spec.device)
        seconds.append(elapsed)
    assert outcome is not None
    peak = memory.peak()
    kept = sum(gradient.nbytes for gradient in outcome.gradients)
    found = errors(problem, outcome, spec.reference_rows) if spec.reference_rows else {}
    return {"seconds": statistics.median(seconds), "extra": None if peak is None else peak - kept, **found}


def errors(problem: Problem, outcome: Outcome, rows: int) -> dict[str, Any]:
    """Errors against float64 on the first rows: of log-probabilities; of the hidden gradient, relative."""
    tokens = len(problem.labels) // len(outcome.logps)
    rows = min(max(rows // tokens, 1) * tokens, len(problem.labels))
    logps, gradient, largest = reference(problem, rows)
    error = (outcome.logps[: rows // tokens].double() - logps.view(-1, tokens).sum(-1)).abs()
    counted = (problem.labels[:rows] != IGNORED).view(-1, tokens).any(-1).sum().clamp(min=1)
    found: dict[str, Any] = {
        "tokens": tokens,
        "mean_error": (error.sum() / counted).item(),
        "max_error": error.max().item(),
        "largest_logit": largest,
    }
    # A loss on sequences has a gradient of its own.
    if outcome.gradients and tokens == 1:
        difference = outcome.gradients[0][:rows].double() - gradient
        found["gradient_error"] = (difference.norm() / gradient.norm()).item()
    return found


@torch.no_grad()
def reference(problem: Problem, rows: int) -> tuple[Tensor, Tensor, float]:
    """Log-probabilities and the hidden gradient of the first rows in float64, and the largest logit's size."""
    hidden, labels = problem.hidden[:rows].double(), problem.labels[:rows]
    live = labels != IGNORED
    lse = hidden.new_full((rows,), -torch.inf)
    largest = 0.0
    for tile in problem.weight.split(REFERENCE_TILE):
        logits = hidden @ tile.double().T
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
        largest = max(largest, logits.abs().max().item())
    expected = torch.zeros_like(hidden)
    for tile in problem.weight.split(REFERENCE_TILE):
        expected += (hidden @ tile.double().T - lse.unsqueeze(-1)).exp() @ tile.double()
    own = problem.weight[labels.clamp(min=0)].double()
    logps = torch.where(live, (hidden * own).sum(-1) - lse, 0.0)
    upstream = torch.where(live, problem.upstream[:rows].double(), 0.0)
    return logps, upstream.unsqueeze(-1) * (own - expected), largest


def report(spec: Spec) -> dict[str, Any]:
    """What was measured, or ``skipped`` or ``failed`` with the reason."""
    try:
        return measure_products(spec) if spec.method == FLOOR else measure(spec)
    except Unavailable as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}


if __name__ == "__main__":
    requested = Spec(**json.loads(sys.argv[1]))
    torch.set_num_threads(requested.threads)
    print(json.dumps(report(requested)))
