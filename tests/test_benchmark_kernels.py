"""The benchmark of the kernels: all ways compute the same, and what it prints is what was measured."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from benchmarks import kernel_peers, kernels
from benchmarks.kernel_peers import FLOOR, METHODS, Spec
from tests.tolerances import assert_close

SPEC = Spec("naive", "full", n=24, d=6, vocab=50, length=6)
ON_CPU = [(name, setting) for name, method in METHODS.items() for setting in method.products if "cpu" in method.devices]


def marked(name: str, setting: str):
    return pytest.param(name, setting, marks=[pytest.mark.slow] if METHODS[name].compiled else [])


# Other libraries warn of their own deprecations.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "setting"), [marked(*case) for case in ON_CPU])
def test_all_methods_compute_the_same(name, setting):
    method = METHODS[name]
    if (missing := method.missing("cpu")) is not None:
        pytest.skip(missing)
    problem = kernel_peers.make_problem(dataclasses.replace(SPEC, setting=setting))
    outcome = method.step(problem)

    with torch.set_grad_enabled(setting != "no_grad"):
        logps = kernel_peers.naive(problem)
    loss = (logps * problem.upstream).sum()
    if len(outcome.logps) < len(logps):
        logps = logps.view(-1, problem.length).sum(-1)
        chosen, rejected = logps.chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum() / len(chosen)
    largest = (problem.hidden @ problem.weight.T).abs().max().item()
    assert_close(outcome.logps, logps, scale=largest * len(problem.labels) / len(logps))

    assert len(outcome.gradients) == {"full": 2, "frozen": 1, "no_grad": 0, "half": 2}[setting]
    if setting != "no_grad":
        # Each entry sums probabilities, known to the logits' rounding, times at most this.
        size = max(problem.upstream.abs().sum() * problem.hidden.abs().max(), problem.weight.abs().max()).item()
        for gradient, expected in zip(outcome.gradients, torch.autograd.grad(loss, problem.inputs), strict=True):
            assert_close(gradient, expected, scale=largest * size)


def test_half_of_the_labels_are_ignored_and_the_floor_leaves_them_out():
    spec = dataclasses.replace(SPEC, method=FLOOR, setting="half", n=25)
    assert (kernel_peers.make_problem(spec).labels == kernel_peers.IGNORED).sum() == 12
    seconds = kernel_peers.report(spec)
    assert seconds["rows"] == 13
    one, two, three, four = (seconds[f"products_{number}"] for number in (1, 2, 3, 4))
    assert 0 < one < two < three < four == pytest.approx(three + one)


def test_errors_are_found_against_float64():
    problem = kernel_peers.make_problem(SPEC)
    hidden, weight = problem.hidden.detach().double().requires_grad_(), problem.weight.detach().double()
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(-1, problem.labels[:, None]).squeeze(-1)
    (gradient,) = torch.autograd.grad(logps, hidden, problem.upstream.double())

    found = kernel_peers.reference(problem, rows=16)
    for actual, expected in zip(found[:2], (logps, gradient), strict=True):
        assert_close(actual, expected[:16], scale=100)
    assert found[2] == pytest.approx(logits[:16].abs().max().item())

    shifted = kernel_peers.Outcome(logps.detach() + torch.tensor([0.25, 0.75]).repeat(12), (1.5 * gradient,))
    errors = kernel_peers.errors(problem, shifted, rows=16)
    assert errors["mean_error"] == pytest.approx(0.5)
    assert errors["max_error"] == pytest.approx(0.75)
    assert errors["gradient_error"] == pytest.approx(0.5)

    half = problem._replace(labels=torch.where(torch.arange(24) % 2 == 0, problem.labels, kernel_peers.IGNORED))
    shifted = kernel_peers.Outcome(torch.where(half.labels < 0, 0.0, logps.detach() + 0.25), ())
    assert kernel_peers.errors(half, shifted, rows=16)["mean_error"] == pytest.approx(0.25)

    sums = kernel_peers.Outcome(logps.detach().view(4, 6).sum(-1) + 0.5, ())
    errors = kernel_peers.errors(problem, sums, rows=16)
    assert errors["tokens"] == 6
    assert errors["max_error"] == pytest.approx(0.5)
    assert "gradient_error" not in errors


def test_peak_memory_counts_what_was_freed_again():
    torch.ones(2**25)  # an earlier peak
    meter = kernel_peers.PeakMemory("cpu")
    torch.ones(2**24)
    peak = meter.peak()
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 * 2**20 < peak < 80 * 2**20


def test_gradients_are_no_extra_memory():
    """The weight's takes 31 MiB, all else of this problem under one."""
    extra = kernel_peers.report(Spec("naive", "full", n=16, d=2048, vocab=4000))["extra"]
    assert extra is None or abs(extra) < 15 * 2**20


def reports(**seconds: list[float]) -> dict:
    """Rounds of the floor (products of 1, 2, 3, 4 seconds, or half that for half of the rows) and of methods."""
    floor = {f"products_{number}": float(number) for number in (1, 2, 3, 4)}
    found = {
        ("full", FLOOR): [floor],
        ("half", FLOOR): [{key: value / 2 for key, value in floor.items()}],
    }
    for key, times in seconds.items():
        setting, name = key.split("__")
        found[setting, name] = [{"seconds": time, "extra": 4 * 10 * 100 // 20} for time in times]
    return found


def test_verdicts_come_from_medians():
    measured = reports(
        full__recompute=[4.4, 9.0, 4.0], full__naive=[4.0], full__keep=[4.5], half__recompute=[2.2], half__naive=[9.0]
    )
    table = kernels.Table((10, 2, 100), "cpu", "float32", measured)
    verdicts = [target.verdict(table) for target in kernels.CPU_TARGETS]
    assert [(verdict["found"], verdict["verdict"]) for verdict in verdicts] == [
        ("1.10", "pass"),
        ("1.50", "miss"),
        ("-", "not measured"),
        ("1.10", "pass"),
        ("0.050", "pass"),
        ("0.50", "pass"),
    ]
    # Half of the rows count, in the floor too.
    assert table.over_floor("recompute", "half") == pytest.approx(1.1)
    assert table.over_best_peer("recompute", "half") == pytest.approx(2.2 / 9)


def test_targets_in_milliseconds_are_those_of_one_shape():
    assert kernels.H200_TARGETS[0] in kernels.targets_of(kernels.H200_SHAPE, "cuda", "bfloat16")
    assert kernels.targets_of((64, 8, 50), "cuda", "bfloat16") == kernels.ACCURACY_TARGETS["bfloat16"]
    table = kernels.Table(kernels.H200_SHAPE, "cuda", "bfloat16", reports(frozen__frozen=[0.047], full__keep=[0.073]))
    verdicts = [target.verdict(table) for target in kernels.H200_TARGETS]
    assert [verdict["verdict"] for verdict in verdicts[:3]] == ["pass", "miss", "not measured"]


def within_this_process(monkeypatch) -> list[Spec]:
    """Measurements without processes of their own; their specifications in order."""
    specs: list[Spec] = []

    def measure(spec: Spec, timeout: float) -> dict:
        specs.append(spec)
        return kernel_peers.report(spec)

    monkeypatch.setattr(kernels, "measure_apart", measure)
    return specs


def test_missing_and_failing_methods_are_named_and_the_rest_go_on(monkeypatch, capsys):
    specs = within_this_process(monkeypatch)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "liger_kernel" else find_spec(name, *rest)
    )

    def fail(problem):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setitem(METHODS, "torch", dataclasses.replace(METHODS["torch"], step=fail))
    methods = ["naive", "torch", "liger_scaled", "recompute"]
    kernels.main(["--shapes", "24x6x50", "--rounds", "2", "--settings", "full", "--methods", *methods])
    rows = {line[:28].strip(): line[28:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["torch linear_cross_entropy"] == "failed: RuntimeError: no such kernel".split()
    assert rows["liger scaled CE"][:5] == "skipped: liger-kernel is not installed".split()
    assert rows["naive log_softmax + gather"][0] == "3"
    assert len(rows["exo_toy, recompute"]) == 2 + len(kernels.COLUMNS)
    assert [spec.method for spec in specs] == [FLOOR, *methods, "recompute", "naive", FLOOR]
    assert [spec.reference_rows for spec in specs] == [512] * 5 + [0] * 3


def test_a_run_in_processes_of_their_own(tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = ["--settings", "no_grad", "--rounds", "1", "--threads", "1", "--json", str(path)]
    kernels.main(["--shapes", "32x8x64", "--methods", "no_grad", "--dtype", "bfloat16", *options])
    printed = capsys.readouterr().out
    assert "n=32 d=8 V=64 bfloat16 on cpu" in printed
    (table,) = json.loads(path.read_text())["tables"]
    assert table["shape"] == [32, 8, 64]
    floor, ours = table["reports"]
    assert (floor["method"], ours["method"], ours["setting"]) == (FLOOR, "no_grad", "no_grad")
    assert ours["rounds"][0]["seconds"] > 0
    assert [target["target"] for target in table["targets"]] == [t.text for t in kernels.ACCURACY_TARGETS["bfloat16"]]


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(kernels.sys, "executable", "/bin/false")
    assert kernels.measure_apart(SPEC, 10) == {"failed": "the process ended with 1: no message"}


def test_without_a_gpu_it_says_what_it_would_compare(monkeypatch, capsys):
    specs = within_this_process(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.main(["--device", "cuda"])
    printed = capsys.readouterr().out
    assert "no CUDA device here" in printed
    assert "n=16384 d=4096 V=128256 bfloat16 on cuda" in printed
    assert "cut-cross-entropy, exact" in printed
    assert "frozen head, ms on an H200" in printed
    assert specs == []
