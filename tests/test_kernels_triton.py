"""The Triton row passes against those of plain torch, and linear_logps on them against the reference.

Triton decides once, when it is imported, whether it compiles or interprets. So the tests on the CPU run in a process of
their own, started by the first test here, under TRITON_INTERPRET=1; those on CUDA run in the process of all others.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor

from exo_toy.kernels import linear_logps, reference, rows, selective, tiles
from exo_toy.kernels.rows import Shape, Statistics
from exo_toy.kernels.tiles import Tile
from tests.tolerances import TOLERANCES, assert_close

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
rows_triton = pytest.importorskip("exo_toy.kernels.rows_triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts float32 off to bfloat16, an error of up to 2**-7; the hardware rounds, up to 2**-8.
BFLOAT16 = 2**-7 if INTERPRETED else 2**-8
PLAIN, WARM, CAPPED, BOTH = Shape(None, 1.0), Shape(None, 0.7), Shape(3.0, 1.0), Shape(3.0, 0.7)
every_shape = pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float64, shape) for shape in (PLAIN, WARM, CAPPED, BOTH)] + [(torch.float32, PLAIN), (torch.float32, BOTH)],
)
NEVER = -torch.inf

# Both sides of a where are computed: ∞ − ∞ is not a number before it is left out, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(scope="session", params=["cpu" if INTERPRETED else "cuda"])
def device(request):
    """The CPU in a process that interprets, CUDA in one that compiles."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; the CPU has a process of its own")
    return torch.device(request.param)


@pytest.mark.skipif(INTERPRETED, reason="is what started this process")
def test_on_the_cpu_under_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100, run.stdout


# The row passes, against their twins.


def normal(*size: int, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(device, dtype)


def assert_all_close(actual: list[Tensor], expected: list[Tensor], scale: float) -> None:
    """As ``assert_close``; float64 at scale 1, where rounding leaves room enough."""
    for have, want in zip(actual, expected, strict=True):
        assert_close(have, want, scale=1.0 if have.dtype == torch.float64 else scale)


WIDTHS = (13, 8, 3)
# In the first tile, the second, in both 3rd and last column, nowhere, and where the logit is -inf.
LABELS = (2, 15, 23, -1, 0)


def products(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tiles with rows that are -inf throughout the first, or everywhere, or at their label; and a row of padding."""
    pieces = [normal(len(LABELS), c, dtype=dtype, device=device, seed=c, scale=4.0) for c in WIDTHS]
    pieces[0][1] = NEVER
    pieces[0][4, 0] = NEVER
    for piece in pieces:
        piece[2] = NEVER
        piece[3] = 0.0
    return pieces


def biases(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One for each tile; the first forbids all its tokens."""
    pieces = [normal(c, dtype=dtype, device=device, seed=50 + c) for c in WIDTHS]
    pieces[0][:] = NEVER
    pieces[1][2] = NEVER
    return pieces


@pytest.mark.parametrize(
    ("entropy", "outputs"),
    [
        (False, "none"),
        (False, "weights"),
        (False, "in place"),
        (True, "none"),
        (True, "weights"),
        (True, "in place"),
        (True, "weights, moments"),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
@every_shape
def test_observe(device, monkeypatch, dtype, shape, biased, entropy, outputs):
    labels = torch.tensor(LABELS, device=device)

    def observed(passes) -> list[Tensor]:
        seen = Statistics.empty(torch.empty(0, device=device), len(LABELS), dtype, entropy)
        found, start = [], 0
        for tile, bias in zip(products(dtype, device), biases(dtype, device), strict=True):
            weights = tile if outputs == "in place" else torch.empty_like(tile) if "weights" in outputs else None
            moments = torch.empty_like(tile) if "moments" in outputs else None
            moved = passes.observe(tile, labels - start, bias if biased else None, shape, seen, weights, moments)
            found += [x.clone() for x in (*moved, *seen, weights, moments) if x is not None]
            start += tile.shape[1]
        return found

    expected = observed(rows)
    assert_all_close(observed(rows_triton), expected, scale=20)
    # Rows in blocks of 8 columns, read twice.
    monkeypatch.setattr(rows_triton, "WIDEST", 8 * dtype.itemsize)
    assert_all_close(observed(rows_triton), expected, scale=20)


@pytest.mark.parametrize("shape", [PLAIN, BOTH])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_observe_rounds_its_outputs_once(device, dtype, shape):
    tile = products(torch.float32, device)[0]
    labels = torch.tensor(LABELS, device=device)
    results = []
    for passes, kind in ((rows, torch.float32), (rows_triton, dtype)):
        seen = Statistics.empty(tile, len(LABELS), torch.float32, True)
        weights, moments = torch.empty_like(tile, dtype=kind), torch.empty_like(tile, dtype=kind)
        passes.observe(tile.clone(), labels, None, shape, seen, weights, moments)
        results.append((weights, moments))
    rounding = {torch.float16: 2**-11, torch.bfloat16: BFLOAT16}[dtype]
    for want, have in zip(*results, strict=True):
        # Half of float16's smallest step, 2**-24; and what float32 itself may differ by.
        torch.testing.assert_close(have.float(), want, rtol=rounding + 1e-5, atol=2**-25 + 1e-7)


def test_observe_takes_tiles_of_half_precision(device):
    """The statistics' dtype is what is computed in."""
    tile = products(torch.float32, device)[0].half()
    labels = torch.tensor(LABELS, device=device)
    results = []
    for passes, kind in ((rows, torch.float32), (rows_triton, torch.float16)):
        seen = Statistics.empty(tile, len(LABELS), torch.float32, True)
        passes.observe(tile.to(kind, copy=True), labels, None, BOTH, seen)
        results.append(list(seen))
    assert_all_close(*reversed(results), scale=20)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rescale(device, monkeypatch, dtype, second):
    change = torch.tensor([0.0, -1.5, -1e-3, 0.0, -200.0], dtype=dtype, device=device)
    for widest in (rows_triton.WIDEST, 8 * dtype.itemsize):
        monkeypatch.setattr(rows_triton, "WIDEST", widest)
        results = []
        for passes in (rows, rows_triton):
            sums = [normal(5, 19, dtype=dtype, device=device, seed=seed) for seed in (0, 1)]
            passes.rescale(sums[0], sums[1] if second else None, change, change.exp())
            results.append(sums)
        assert_all_close(*reversed(results), scale=200)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@every_shape
def test_differentiate(device, monkeypatch, dtype, shape, biased, entropy, in_place):
    labels = torch.tensor([2, 13, 12, -1, 0], device=device)
    bias = normal(13, dtype=dtype, device=device, seed=0) if biased else None
    if biased:
        bias[5] = NEVER
    # Row 3 is padding. The last row's label is impossible; the largest logit is below 4 · 4 + 3.
    lse = torch.tensor([20.0, 18.0, 19.0, torch.inf, 20.0], dtype=dtype, device=device)
    g = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=dtype, device=device)
    entropies = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.1], dtype=dtype, device=device) if entropy else None
    g_entropy = torch.tensor([0.3, 1.0, -2.0, 0.0, 1.0], dtype=dtype, device=device) if entropy else None
    at_label = torch.tensor([0.7, -1.0, 0.2, 0.0, 1.0], dtype=dtype, device=device)

    def differentiated(passes) -> list[Tensor]:
        tile = products(dtype, device)[0]
        out = tile if in_place else torch.full_like(tile, torch.nan)
        passes.differentiate(tile, labels, bias, shape, lse, g, entropies, g_entropy, at_label, out)
        return [out]

    expected = differentiated(rows)
    assert not expected[0][3].any()
    assert_all_close(differentiated(rows_triton), expected, scale=20)
    monkeypatch.setattr(rows_triton, "WIDEST", 8 * dtype.itemsize)
    assert_all_close(differentiated(rows_triton), expected, scale=20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weigh(device, monkeypatch, dtype):
    sums = torch.promote_types(dtype, torch.float32)
    weights = normal(4, 13, dtype=dtype, device=device, seed=0).abs()
    labels = torch.tensor([2, 12, 13, -1], device=device)
    coefficient = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=sums, device=device)
    at_label = torch.tensor([0.3, -1.0, 0.7, 0.0], dtype=sums, device=device)
    expected = torch.empty_like(weights, dtype=sums)
    rows.weigh(weights.to(sums), labels, coefficient, at_label, expected)
    for widest in (rows_triton.WIDEST, 8 * sums.itemsize):
        monkeypatch.setattr(rows_triton, "WIDEST", widest)
        out = torch.full_like(weights, torch.nan)
        rows_triton.weigh(weights, labels, coefficient, at_label, out)
        rounding = BFLOAT16 if dtype == torch.bfloat16 else TOLERANCES[dtype].rtol
        torch.testing.assert_close(out.to(sums), expected, rtol=rounding + 1e-12, atol=0.0)


def test_rows_far_apart_and_vectors_with_gaps(device):
    """What lies beside a tile, its outputs and its sums, stays as it was."""
    labels = torch.tensor([1, 0, 12, -1], device=device)
    whole = normal(4, 20, dtype=torch.float64, device=device, seed=0)
    change, g, lse = -normal(4, 3, dtype=torch.float64, device=device, seed=1).abs().T
    bias = normal(13, 2, dtype=torch.float64, device=device, seed=2)[:, 1]
    assert not change.is_contiguous() and not bias.is_contiguous()
    part = (slice(None), slice(5, 18))
    results = []
    for passes in (rows, rows_triton):
        weights, moments, gradient, kept_gradient, first, second = matrices = [whole.clone() for _ in range(6)]
        seen = Statistics.empty(whole, 4, torch.float64, True)
        passes.observe(whole.clone()[part], labels, bias, BOTH, seen, weights[part], moments[part])
        passes.rescale(first[part], second[part], change, change.exp())
        passes.differentiate(whole.clone()[part], labels, bias, BOTH, lse, g, lse, g, lse, gradient[part])
        passes.weigh(weights[part], labels, g, lse, kept_gradient[part])
        results.append(matrices)
    for want, have in zip(*results, strict=True):
        assert_close(have, want, scale=100)
        assert torch.equal(have[:, :5], whole[:, :5])
        assert torch.equal(have[:, 18:], whole[:, 18:])
    with pytest.raises(AssertionError, match="rows must be contiguous"):
        rows_triton.rescale(whole.T, None, change, change)


def test_not_a_number_is_not_lost(device):
    """A maximum may pass it over; the sums, and with them every result, do not."""
    tile = products(torch.float32, device)[0]
    tile[0, 7] = torch.nan
    tile[4, :] = torch.nan
    seen = Statistics.empty(tile, len(LABELS), torch.float32, True)
    rows_triton.observe(tile, torch.tensor(LABELS, device=device), None, BOTH, seen)
    assert seen.total.isnan().tolist() == [True, False, False, False, True]


@triton.jit
def tanh_of(x, out, n_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, rows_triton._tanh(tl.load(x + at, mask=at < n_elements)), mask=at < n_elements)


def tanh(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    tanh_of[(triton.cdiv(len(x), 65536 if INTERPRETED else 1024),)](
        x, out, len(x), BLOCK=65536 if INTERPRETED else 1024, enable_fp_fusion=True
    )
    return out


def ulps(x: Tensor) -> Tensor:
    """The distance of neighbouring numbers at x."""
    return torch.nextafter(x.abs(), torch.full_like(x, torch.inf)) - x.abs()


def test_tanh_in_float32(device):
    small = torch.logspace(-30, 0, 20001, dtype=torch.float64)
    x = torch.cat([small, torch.linspace(0.5, 1.5, 100001), torch.linspace(1.5, 20, 10001)]).to(device, torch.float32)
    found, expected = tanh(x), x.double().tanh()
    assert ((found.double() - expected).abs() <= 3 * ulps(expected.float()).double()).all()
    assert found.max() == 1.0
    assert torch.equal(tanh(-x), -found)


def test_tanh_in_float64(device):
    x = torch.cat([torch.logspace(-30, 0, 101), torch.linspace(0.9, 1.1, 101), torch.linspace(1, 25, 101)]).double()
    found = tanh(x.to(device)).cpu()
    with mpmath.workdps(40):
        errors = [
            abs(mpmath.mpf(f) - mpmath.tanh(mpmath.mpf(v))) for f, v in zip(found.tolist(), x.tolist(), strict=True)
        ]
        assert all(error <= 3 * ulp for error, ulp in zip(errors, ulps(found).tolist(), strict=True))
    assert found.max() == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tanh_at_the_ends(device, dtype):
    x = torch.tensor([0.0, 1e-40, 1.0, 88.0, 1e4, torch.inf, -torch.inf, torch.nan], dtype=dtype, device=device)
    torch.testing.assert_close(tanh(x), x.tanh(), rtol=1e-6, atol=0.0, equal_nan=True)


# linear_logps on Triton's passes, against the reference in float64.


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Sizes of which nothing is a multiple, several blocks of rows and several tiles."""
    for name in tiles.TILES:
        monkeypatch.setitem(tiles.TILES, name, Tile(rows=2, block=4, columns=8))


N, D, V = 5, 4, 19
PADDED = 6
# Nothing is kept where the entropy is wanted.
every_mode = pytest.mark.parametrize(
    ("mode", "entropy"),
    [(mode, entropy) for mode in ("no gradient", "frozen", "recompute") for entropy in (False, True)]
    + [("keep some", False), ("keep all", False)],
)
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"bias": True, "softcap": 3.0, "temperature": 0.7},
}


def check_linear(
    device: torch.device,
    mode: str,
    entropy: bool,
    *,
    dtype: torch.dtype = torch.float64,
    n: int = N,
    scale: float = 2.0,
    labels: Tensor | None = None,
    bias: bool = False,
    **options: float,
) -> None:
    """Results and gradients are those of the reference, up to rounding.

    A gradient is a sum over products of a row's ∂L/∂z with hidden or weight; its error is bounded by the rounding of
    the factors times the sum of the products' sizes.
    """
    hidden = normal(n, D, dtype=dtype, device=device, seed=0, scale=scale)
    weight = normal(V, D, dtype=dtype, device=device, seed=1)
    offset = normal(V, dtype=dtype, device=device, seed=2) if bias else None
    if offset is not None:
        offset[3] = NEVER
    if labels is None:
        labels = torch.tensor([0, 18, -100, 7, 11], device=device)[:n]
    sums = torch.promote_types(dtype, torch.float32)
    g = normal(2, n, dtype=sums, device=device, seed=3)

    def run(backend: str, *inputs: Tensor | None, **more: int) -> tuple[list[Tensor], list[Tensor]]:
        needed = inputs[:0] if mode == "no gradient" else inputs[:1] if mode == "frozen" else inputs
        learned = [x.requires_grad_() for x in needed if x is not None]
        found = linear_logps(
            *inputs[:2], labels, bias=inputs[2], return_entropy=entropy, backend=backend, **options, **more
        )
        found = list(found) if entropy else [found]
        if not learned:
            return found, []
        loss = sum((x * y.to(x.dtype)).sum() for x, y in zip(found, g, strict=False))
        return [x.detach() for x in found], list(torch.autograd.grad(loss, learned))

    kept = {"keep some": PADDED * 8, "keep all": PADDED * V}.get(mode, 0) * sums.itemsize
    results, gradients = run(
        "triton", *(None if x is None else x.clone() for x in (hidden, weight, offset)), save_budget=kept
    )
    exact = [None if x is None else x.double() for x in (hidden, weight, offset)]
    expected, expected_gradients = run("reference", *exact)

    hidden, weight, offset = (None if x is None else x.detach().abs() for x in exact)
    z = exact[0].detach() @ exact[1].detach().T
    largest = max([10.0, *z.abs().flatten().tolist()])
    if offset is not None:
        z += exact[2].detach()
    for have, want in zip(results, expected, strict=True):
        assert have.dtype == sums
        assert_close(have, want, scale=largest)

    # In float32 and float64 the rounding of logits counts, in bfloat16 that of the kept tile, ∂L/∂z and the result.
    rounding = 3 * BFLOAT16 if dtype == torch.bfloat16 else TOLERANCES[dtype].atol * largest
    tau, cap = options.get("temperature", 1.0), options.get("softcap")
    z = (z if cap is None else cap * (z / cap).tanh()) / tau
    p = z.softmax(-1)
    distance = torch.where(p > 0, z.amax(-1, keepdim=True) - z, 0.0)
    size = g[0].abs().unsqueeze(1) * (p + torch.nn.functional.one_hot(labels.clamp(min=0), V))
    if entropy:
        size += g[1].abs().unsqueeze(1) * p * (distance + (p * distance).sum(-1, keepdim=True))
    size = size * (labels != -100).unsqueeze(1) / tau
    bounds = [size @ weight, size.T @ hidden, size.sum(0)]
    for have, want, bound in zip(gradients, expected_gradients, bounds, strict=False):
        assert have.dtype == dtype
        assert ((have.double() - want).abs() <= rounding * bound).all()


@every_mode
@pytest.mark.parametrize("options", OPTIONS)
def test_linear_logps(device, mode, entropy, options):
    check_linear(device, mode, entropy, **OPTIONS[options])


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logps_in_other_dtypes(device, dtype, mode, entropy):
    check_linear(device, mode, entropy, dtype=dtype, **OPTIONS["all"])


@pytest.mark.parametrize(("mode", "entropy"), [("frozen", True), ("recompute", True), ("keep all", False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_logps_of_large_logits(device, dtype, mode, entropy):
    check_linear(device, mode, entropy, dtype=dtype, scale=4000.0, bias=True)


@pytest.mark.parametrize(("mode", "entropy"), [("frozen", True), ("recompute", True), ("keep all", False)])
@pytest.mark.parametrize("labels", [[], [18], [-100], [-100, -100, -100]])
def test_linear_logps_of_few_rows(device, labels, mode, entropy):
    labels = torch.tensor(labels, dtype=torch.long, device=device)
    check_linear(device, mode, entropy, n=len(labels), labels=labels)


def test_a_row_does_not_depend_on_the_others(device):
    hidden = normal(N, D, dtype=torch.float32, device=device, seed=0)
    weight = normal(V, D, dtype=torch.float32, device=device, seed=1)
    labels = torch.tensor([0, 18, 3, 7, 11], device=device)
    together = linear_logps(hidden, weight, labels, softcap=3.0, backend="triton")
    alone = [
        linear_logps(hidden[i : i + 1], weight, labels[i : i + 1], softcap=3.0, backend="triton") for i in range(N)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_selective_logps(device, dtype):
    logits = normal(N, V, dtype=dtype, device=device, seed=0, scale=4.0)
    logits[1, 3] = NEVER
    labels = torch.tensor([0, 18, -100, 7, 11], device=device)
    g = normal(N, dtype=torch.float64, device=device, seed=1)
    sizes = list(tiles.tile_for(device))

    exact = logits.double().requires_grad_()
    expected = reference.selective_logps(exact, labels, 0.7, -100)
    (expected_gradient,) = torch.autograd.grad((expected * g).sum(), exact)
    logits.requires_grad_()
    logps, _ = selective.forward(logits, labels, 0.7, -100, sizes, "triton")
    (gradient,) = torch.autograd.grad((logps * g.to(logps.dtype)).sum(), logits)
    assert_close(logps, expected, scale=20)
    assert_close(gradient, expected_gradient, scale=20)


# Compiled for an H200, which takes no GPU: what the interpreter lets pass, and how often memory is touched.

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


class Compiler:
    """Stands in for a kernel: compiles what would be launched, and counts the bytes that vector accesses move."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps: int, enable_fp_fusion: bool, **named) -> None:
        values = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **named}
        assert list(values) == self.kernel.arg_names
        signature, constants, attributes = {}, {}, {}
        for i, (name, value) in enumerate(values.items()):
            if value is None or name.isupper():
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = self.kernel.params[i].annotation_type or "fp32"
            else:
                signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        if "width" in signature:
            # In float32 they would spoil float64 tiles.
            assert all(signature[name] == "fp64" for name in ("width", "inverse", "height"))
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        self.read, self.written = (
            sum(int(n) * int(bits) // 8 for n, bits in re.findall(rf"{name}\.global\S*\.v(\d)\.[bfu](\d+)", ptx))
            * 32
            * num_warps
            for name in ("ld", "st")
        )


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The module with compilers in place of its kernels."""
    if INTERPRETED:
        pytest.skip("an interpreting process does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("_observe", "_rescale", "_differentiate", "_weigh"):
        monkeypatch.setattr(rows_triton, name, Compiler(getattr(rows_triton, name)))
    return rows_triton


def arguments(n_columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tile, labels, a bias and a vector."""
    return (
        torch.empty(2, n_columns, dtype=dtype),
        torch.zeros(2, dtype=torch.long),
        torch.empty(n_columns, dtype=dtype),
        torch.empty(2, dtype=dtype),
    )


@pytest.mark.parametrize("n_columns", [1024, 4096, 16384])
def test_a_compiled_pass_touches_memory_once(compiled, n_columns):
    tile, labels, bias, vector = arguments(n_columns, torch.float32)
    half = tile.bfloat16()
    statistics = Statistics.empty(tile, 2, torch.float32, False)
    compiled.observe(tile, labels, None, PLAIN, statistics)
    assert (compiled._observe.read, compiled._observe.written) == (4 * n_columns, 0)
    statistics = Statistics.empty(tile, 2, torch.float32, True)
    compiled.observe(tile, labels, bias, BOTH, statistics, half, half)
    assert (compiled._observe.read, compiled._observe.written) == (4 * n_columns + 4 * n_columns, 2 * 2 * n_columns)
    compiled.differentiate(tile, labels, None, BOTH, *[vector] * 5, half)
    assert (compiled._differentiate.read, compiled._differentiate.written) == (4 * n_columns, 2 * n_columns)
    compiled.weigh(half, labels, vector, vector, half)
    assert (compiled._weigh.read, compiled._weigh.written) == (2 * n_columns, 2 * n_columns)
    compiled.rescale(tile, tile, vector, vector)
    assert (compiled._rescale.read, compiled._rescale.written) == (8 * n_columns, 8 * n_columns)


@pytest.mark.parametrize("n_columns", [1, 50, 20000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_passes_compile_at_odd_sizes(compiled, dtype, n_columns):
    tile, labels, bias, vector = arguments(n_columns, dtype)
    compiled.observe(tile, labels, bias, BOTH, Statistics.empty(tile, 2, dtype, True), tile, tile)
    compiled.differentiate(tile, labels, bias, WARM, *[vector] * 5, tile)
    compiled.weigh(tile, labels, vector, vector, tile)
    compiled.rescale(tile, None, vector, vector)
