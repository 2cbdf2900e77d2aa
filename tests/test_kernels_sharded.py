"""``linear_logps`` with the vocabulary over a process group: gloo on two and three processes, in float64 against one.

Each test starts one world, which runs many cases; the reference on the whole vocabulary says what should come out.
"""

import math
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exo_toy.kernels import linear_logps, tiles

ROOT = Path(__file__).parents[1]
# Seconds for a world to start and finish; many times what it takes.
DEADLINE = 200

HIDDEN, HEAD, ALL = ("hidden",), ("weight", "bias"), ("hidden", "weight", "bias")
# Slices of the vocabulary by world size: uneven, some of one row; and of several tiles on the CPU.
UNEVEN = {2: (13, 8), 3: (5, 11, 6)}
SINGLE = {2: (1, 9), 3: (4, 1, 8)}
LARGE = {2: (2500, 1100), 3: (1500, 1, 2100)}
EVERYTHING = 10**9  # a save_budget


@dataclass
class Case:
    """A problem on the whole vocabulary, what is asked of it, and who takes part."""

    name: str
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    cotangents: list[Tensor | None]  # of the log-probabilities, and of the entropies where they are asked for
    learning: tuple[str, ...]
    options: dict
    sizes: tuple[int, ...]  # of the slices
    ranks: tuple[int, ...]
    error: str | None = None
    compiled: bool = False
    twice: bool = False

    @property
    def live(self) -> Tensor:
        """The rows that count."""
        return self.labels != self.options.get("ignore_index", -100)

    @property
    def moved(self) -> Tensor:
        """Those of them that get a gradient."""
        return self.live & torch.stack([g != 0 for g in self.cotangents if g is not None]).any(0)

    def slice_of(self, place: int) -> slice:
        """One rank's part of the vocabulary."""
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])


def problem(
    name: str,
    sizes: tuple[int, ...],
    *,
    n: int = 7,
    d: int = 5,
    dtype: torch.dtype = torch.float64,
    learning: tuple[str, ...] = ALL,
    bias: bool = True,
    ranks: tuple[int, ...] | None = None,
    **options,
) -> Case:
    """Normal numbers and uniform labels, told apart by the name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n_vocab = sum(sizes)
    outputs = torch.promote_types(dtype, torch.float32)
    return Case(
        name,
        hidden=normal(n, d).to(dtype),
        weight=normal(n_vocab, d).to(dtype),
        bias=normal(n_vocab).to(dtype) if bias else None,
        labels=torch.randint(n_vocab, (n,), generator=generator),
        cotangents=[normal(n).to(outputs) for _ in range(1 + options.get("return_entropy", False))],
        learning=learning if bias else tuple(name for name in learning if name != "bias"),
        options=options,
        sizes=sizes,
        ranks=tuple(range(len(sizes))) if ranks is None else ranks,
    )


# How the gradient is computed: what learns, and the options that say so.
MODES = {
    "recompute": (ALL, {}),
    "keep": (ALL, {"save_budget": EVERYTHING}),
    "frozen": (HIDDEN, {}),
    "entropy": (ALL, {"return_entropy": True}),
    "frozen entropy": (HIDDEN, {"return_entropy": True}),
}


def cases(world: int) -> Iterator[Case]:
    """All that a world of this size is asked."""
    uneven, single, large = UNEVEN[world], SINGLE[world], LARGE[world]
    for mode, (learning, options) in MODES.items():
        yield problem(mode, uneven, learning=learning, **options)
        yield problem(f"{mode}, no bias", uneven, learning=learning, bias=False, **options)
        yield problem(f"{mode}, cap", uneven, learning=learning, softcap=3.0, temperature=0.7, **options)
        yield problem(f"{mode}, tiles", large, n=600, d=4, learning=learning, softcap=5.0, **options)
        yield problem(f"{mode}, float32", uneven, dtype=torch.float32, learning=learning, **options)
        yield problem(f"{mode}, bfloat16", uneven, dtype=torch.bfloat16, learning=learning, **options)
        for n in (0, 1):
            yield problem(f"{mode}, {n} rows", uneven, n=n, learning=learning, **options)

        case = problem(f"{mode}, some ignored", uneven, n=9, learning=learning, **options)
        case.labels[[0, 4, 5, 8]] = -100
        case.hidden[4] = math.nan
        yield case
        case = problem(f"{mode}, all ignored", uneven, learning=learning, **options)
        case.labels.fill_(-100)
        yield case
        case = problem(f"{mode}, a token ignored", uneven, learning=learning, ignore_index=uneven[0], **options)
        case.labels[2] = uneven[0]
        yield case

        for place in range(world):
            case = problem(f"{mode}, labels on rank {place}", uneven, learning=learning, **options)
            mine = case.slice_of(place)
            case.labels = mine.start + case.labels % uneven[place]
            case.labels[:2] = torch.tensor([mine.start, mine.stop - 1])
            yield case
        for place in range(world):
            # All of a rank's logits are -inf, and those of the others so low that exp of their opposite overflows.
            case = problem(f"{mode}, rank {place} forbidden", uneven, learning=learning, **options)
            case.bias -= 2000.0
            case.bias[case.slice_of(place)] = -torch.inf
            allowed = case.bias.isfinite().nonzero().squeeze(1)
            case.labels = allowed[case.labels % len(allowed)]
            yield case
        case = problem(f"{mode}, forbidden labels", uneven, learning=learning, **options)
        case.bias[case.labels[:2]] = -torch.inf
        yield case

        for dtype in (torch.float32, torch.float64):
            case = problem(f"{mode}, logits to 1e4, {dtype}", uneven, bias=False, learning=learning, **options)
            case.hidden *= 1e4 / (case.hidden @ case.weight.T).abs().max()
            case.hidden, case.weight = case.hidden.to(dtype), case.weight.to(dtype)
            case.cotangents = [x.to(dtype) for x in case.cotangents]
            yield case

        case = problem(f"{mode}, rows without gradient", uneven, learning=learning, **options)
        for cotangent in case.cotangents:
            cotangent[[1, 2, 6]] = 0.0
        yield case
        case = problem(f"{mode}, no gradient at all", uneven, learning=learning, **options)
        for cotangent in case.cotangents:
            cotangent.zero_()
        yield case
        case = problem(f"{mode}, label too large", uneven, learning=learning, **options)
        case.labels[3] = sum(uneven)
        case.error = f"ValueError: labels must be in [0, {sum(uneven)})"
        yield case
        yield problem(f"{mode}, after an error", uneven, learning=learning, **options)
        yield problem(f"{mode}, no_grad", uneven, learning=(), **options)
        if world == 2:
            yield problem(f"{mode}, alone", (19,), learning=learning, ranks=(0,), **options)
            yield problem(f"{mode}, alone, tiles", (2300,), n=600, learning=learning, ranks=(1,), **options)
        if world == 3:
            yield problem(f"{mode}, sub-group", (3, 10), learning=learning, ranks=(0, 2), **options)

    for sizes in permutations(single):
        yield problem(f"slices {sizes}", sizes)
    # One tile of the first slice fits, of 600 rows padded to 1024.
    yield problem("keep a part", large, n=600, save_budget=1024 * 1024 * 8)
    yield problem("keep a part, bfloat16", large, n=600, dtype=torch.bfloat16, save_budget=1024 * 1024 * 2)
    yield problem("hidden fixed", uneven, learning=HEAD)
    yield problem("only the bias learns", uneven, learning=("bias",))
    yield problem("only the weight learns", uneven, learning=("weight",))
    for name, learning in {"both": ALL, "frozen": HIDDEN}.items():
        for unused in (0, 1):
            case = problem(f"{name}, output {unused} unused", uneven, learning=learning, return_entropy=True)
            case.cotangents[unused] = None
            yield case

    case = problem("leading dimensions, strides", uneven, n=6)
    case.hidden = torch.stack([case.hidden, case.hidden], 1)[:, 0].view(2, 3, 5)
    case.weight = case.weight.T.contiguous().T
    case.labels = case.labels.view(2, 3)
    case.cotangents = [case.cotangents[0].view(3, 2).T]
    yield case

    case = problem("negative label", uneven)
    case.labels[0] = -1
    case.error = "ValueError: labels must be in"
    yield case
    case = problem("reference", uneven, backend="reference")
    case.error = 'ValueError: backend must be None, "tiled" or "triton" with a group'
    yield case
    case = problem("second derivatives", uneven)
    case.twice = True
    case.error = "RuntimeError: linear_logps has no second derivatives with a group"
    yield case
    yield problem("after all errors", uneven)


def run_world(world: int, asked: list[Case], folder: Path) -> list[list[dict | None]]:
    """The results of each rank, one per case; fails with what the ranks said, after the deadline at the latest."""
    torch.save([vars(case) for case in asked], folder / "cases.pt")
    # Warnings are errors, but for torch's own: what its compiler imports is deprecated.
    warnings = ["-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning"]
    command = [sys.executable, *warnings, "-m", "tests.sharded_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes, logs = [], [folder / f"{rank}.log" for rank in range(world)]
    end = time.monotonic() + DEADLINE
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                arguments = [*command, str(rank), str(world)]
                processes.append(
                    subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        # A rank that fails leaves the others waiting.
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        ended = [process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(ended) or None in ended:
        said = "\n".join(
            f"rank {rank} ({code}):\n{log.read_text()}"
            for rank, (code, log) in enumerate(zip(ended, logs, strict=True))
        )
        pytest.fail(f"a rank failed or hung (code None)\n{said}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def whole(case: Case, dtype: torch.dtype, **options) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a case on the whole vocabulary, by one process."""
    inputs = {name: getattr(case, name) for name in ALL}
    inputs = {name: x.detach().to(dtype, copy=True) for name, x in inputs.items() if x is not None}
    learning = [inputs[name].requires_grad_() for name in case.learning]
    outputs = linear_logps(**inputs, labels=case.labels, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = []
    if learning:
        pairs = [(x, g.to(x.dtype)) for x, g in zip(outputs, case.cotangents, strict=True) if g is not None]
        used, cotangents = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(used, learning, cotangents)
    return [x.detach() for x in outputs], dict(zip(case.learning, gradients, strict=True))


def expected(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """By the reference, in float64."""
    return whole(case, torch.float64, **{**case.options, "save_budget": 0, "backend": "reference"})


def alone(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """By the same kernel without a group."""
    return whole(case, case.hidden.dtype, **case.options)


def bounds(case: Case) -> dict[str, float]:
    r"""Absolute rounding errors of each result at worst, from the sizes and magnitudes of the problem.

    With u the unit roundoff of the sums: a logit (d products, bias, cap, temperature) is known to (d + 8) u Z, where Z
    bounds Σ|h w| + |b|. Differences of two logits and log Σ, rescaled over tiles and ranks, to four such errors and
    those of a sum over V; that is e^error − 1 of a probability. Means and gradients are sums whose weights add up to:
    Σ p |z − max| <= log V, Σ |1[y] − p| <= 2, Σ p |log p + H| <= 2 log V; the cap's slope 1 − tanh² once more.
    """
    live = case.live.reshape(-1)
    hidden = case.hidden.detach().double().reshape(-1, case.hidden.shape[-1])[live].abs()
    weight = case.weight.detach().double().abs()
    bias = torch.zeros(1) if case.bias is None else case.bias.detach().double()
    n_vocab, d = weight.shape
    temperature = case.options.get("temperature", 1.0)
    dtype = case.hidden.dtype
    u = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    largest = (hidden @ weight.T).max().item() if len(hidden) else 0.0
    largest = (largest + torch.where(bias.isfinite(), bias, 0.0).abs().max().item()) / temperature
    probability = 4 * (d + 8) * u * largest + (n_vocab + len(hidden) + 16) * u
    spread = math.log(n_vocab)
    allowed = {"logps": 2 * probability, "entropies": 2 * probability * (1 + spread)}

    if case.options.get("save_budget"):
        probability += torch.finfo(dtype).eps / 2  # kept in the dtype of the inputs
    cotangents = [0.0 * case.labels if g is None else g.double().abs() for g in (*case.cotangents, None)]
    slopes = (4 * cotangents[0] + (3 + 6 * spread) * cotangents[1]).reshape(-1)[live]
    rows = slopes * probability / temperature
    return allowed | {
        "hidden": (rows.max().item() if len(rows) else 0.0) * weight.max().item(),
        "weight": (rows @ hidden).max().item(),
        "bias": rows.sum().item(),
    }


def assert_near(what: str, actual: Tensor, wanted: Tensor, error: float) -> None:
    """Within an absolute error, and one rounding to actual's dtype."""
    assert actual.shape == wanted.shape, f"{what}: {actual.shape}, not {wanted.shape}"
    rounding = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(actual.double(), wanted, rtol=rounding, atol=error, msg=lambda text: f"{what}: {text}")


def collectives(case: Case) -> list[list[tuple]]:
    """All that may be sent: what, how many numbers, their dtype; forward, backward, and backward of that."""
    sums = torch.promote_types(case.hidden.dtype, torch.float32)
    rows = tiles.tile_for(case.hidden.device).padded(int(case.live.sum()))
    sizes = ("sum", len(case.sizes), torch.int64)
    if case.error is not None and not case.twice:
        return [[sizes] if "labels" in case.error else []]
    forward, backward = [sizes], [sizes] if case.learning else []
    if rows > 0:
        packed = 2 + case.options.get("return_entropy", False)
        forward += [("max", rows, sums), ("sum", packed * rows, sums)]
        backward += [("sum", int(case.live.sum()) * case.hidden.shape[-1], sums)] if "hidden" in case.learning else []
    return [forward, backward, *[[]] * case.twice]


def check(case: Case, results: list[dict | None]) -> None:
    """One case: errors on every rank, or right results, the same on all ranks, for no more than the collectives."""
    assert [result is not None for result in results] == [rank in case.ranks for rank in range(len(results))]
    results = [results[rank] for rank in case.ranks]
    for place, result in enumerate(results):
        error = result.get("error", "no error")
        assert case.error is None or error.startswith(case.error), f"place {place}: {error}, not {case.error}"
        assert result["calls"] == collectives(case), f"place {place}: {result['calls']}, not {collectives(case)}"
    if case.error is not None:
        return

    (outputs, gradients), allowed = expected(case), bounds(case)
    for place, result in enumerate(results):
        names = ("logps", "entropies")[: len(outputs)]
        for name, actual, wanted in zip(names, result["outputs"], outputs, strict=True):
            assert_near(f"{name}, place {place}", actual, wanted, allowed[name])
            assert not actual[~case.live].any(), f"{name}, place {place}: ignored rows are not 0"
        for name, actual in result.get("gradients", {}).items():
            wanted = gradients[name] if name == "hidden" else gradients[name][case.slice_of(place)]
            assert actual.dtype == case.hidden.dtype
            assert_near(f"gradient of {name}, place {place}", actual, wanted, allowed[name])
            assert name != "hidden" or not actual[~case.moved].any(), f"place {place}: rows without gradient are not 0"

        for mine, first in zip(result["outputs"], results[0]["outputs"], strict=True):
            assert torch.equal(mine, first), f"place {place}: outputs differ from those at place 0"
        if "hidden" in case.learning:
            mine, first = result["gradients"]["hidden"], results[0]["gradients"]["hidden"]
            assert torch.equal(mine, first), f"place {place}: the gradient of hidden differs from that at place 0"

    if len(case.ranks) == 1:
        outputs, gradients = alone(case)
        assert all(map(torch.equal, results[0]["outputs"], outputs)), "outputs differ from those without a group"
        for name, gradient in gradients.items():
            assert torch.equal(results[0]["gradients"][name], gradient), (
                f"the gradient of {name} differs from that without a group"
            )


def check_all(world: int, asked: list[Case], folder: Path) -> None:
    """Every case, all failures together."""
    failures = []
    for case, results in zip(asked, zip(*run_world(world, asked, folder), strict=True), strict=True):
        try:
            check(case, list(results))
        except AssertionError as failure:
            failures.append(f"{case.name}: {failure}")
    assert not failures, f"{len(failures)} of {len(asked)} cases\n" + "\n".join(failures)


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_vocabulary_is_the_whole_one(world, tmp_path):
    check_all(world, list(cases(world)), tmp_path)


@pytest.mark.slow
def test_compiled_step_with_a_group(tmp_path):
    asked = []
    for mode in ("keep", "frozen entropy"):
        learning, options = MODES[mode]
        case = problem(f"{mode}, compiled", UNEVEN[2], learning=learning, softcap=3.0, **options)
        case.labels[4] = -100
        case.compiled = True
        asked.append(case)
    check_all(2, asked, tmp_path)
