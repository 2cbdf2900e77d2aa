"""What token log-probabilities cost, against bare matrix products and other ways: ``python -m benchmarks.kernels``.

The floor is the time of bare products of the same size, outputs in place: 4 if the logits are computed twice, 3 if
probabilities are kept, 2 for a frozen head, 1 without gradients. Every measurement is a process of its own, all methods
take turns in each round, and the numbers are medians over the rounds. Memory is the peak beyond inputs and gradients:
resident on the CPU, allocated on CUDA. Errors are against float64 of the same inputs, on the first rows.

Other libraries are optional: pip install 'exo-toy[bench]'. A method that is missing or fails is named, and the rest go
on. With ``--dry-run``, and with ``--device cuda`` where there is none, it says what it would compare.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from analysis import storage
from benchmarks.kernel_peers import FLOOR, METHODS, Setting, Spec

MIB = 2**20
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
Shape = tuple[int, int, int]
H200_SHAPE: Shape = (16384, 4096, 128256)
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(4096, 512, 32000), (2048, 1024, 128000)],
    "cuda": [H200_SHAPE, (8192, 4096, 32000), (16384, 2048, 151936), (4096, 8192, 128256)],
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
WARMUPS_AND_CALLS = {"cpu": (1, 1), "cuda": (3, 10)}
UNITS = {"cpu": ("s", 1.0), "cuda": ("ms", 1e3)}
TITLES: dict[Setting, str] = {
    "full": "gradients of hidden and weight",
    "frozen": "frozen head: gradient of hidden",
    "no_grad": "no gradients",
    "half": "gradients of hidden and weight, half of the labels ignored",
}
COLUMNS = ("spread", "/floor", "/naive", "share", "extra MiB", "of logits", "mean err", "max err", "grad err")


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


@dataclasses.dataclass(frozen=True)
class Table:
    """All measurements of one shape: what each process reported, by setting and method, in the order of the rounds."""

    shape: Shape
    device: str
    dtype: str
    reports: dict[tuple[Setting, str], list[dict[str, Any]]]

    def values(self, key: str, method: str, setting: Setting) -> list[float]:
        return [report[key] for report in self.reports.get((setting, method), []) if report.get(key) is not None]

    def median(self, key: str, method: str, setting: Setting = "full") -> float | None:
        values = self.values(key, method, setting)
        return statistics.median(values) if values else None

    def time(self, method: str, setting: Setting = "full") -> float | None:
        return self.median("seconds", method, setting)

    def floor(self, products: int, setting: Setting = "full") -> float | None:
        """Seconds of so many products; of the rows that count, where half are ignored."""
        return self.median(f"products_{products}", FLOOR, "half" if setting == "half" else "full")

    def over_floor(self, method: str, setting: Setting = "full") -> float | None:
        return ratio(self.time(method, setting), self.floor(METHODS[method].products[setting], setting))

    def extra_of_logits(self, method: str, setting: Setting = "full") -> float | None:
        """Extra memory as a fraction of the float32 logits."""
        n, _, vocab = self.shape
        return ratio(self.median("extra", method, setting), 4.0 * n * vocab)

    def over_best_peer(self, method: str, setting: Setting = "full") -> float | None:
        peers = [self.time(name, setting) for name, peer in METHODS.items() if not peer.is_ours]
        return ratio(self.time(method, setting), min((time for time in peers if time is not None), default=None))

    def worst(self, key: str) -> float | None:
        """The largest over our methods, settings and rounds."""
        mine = [(setting, name) for setting, name in self.reports if name != FLOOR and METHODS[name].is_ours]
        return max((value for setting, name in mine for value in self.values(key, name, setting)), default=None)

    def failure(self, setting: Setting, method: str) -> str | None:
        """Why a method was given up."""
        reports = self.reports[setting, method]
        return next((f"{word}: {reports[-1][word]}" for word in ("skipped", "failed") if word in reports[-1]), None)


class Target(NamedTuple):
    """A number to reach: at most ``limit``."""

    text: str
    limit: float
    value: Callable[[Table], float | None]
    style: str = ".2f"

    @property
    def wanted(self) -> str:
        return f"<= {format(self.limit, self.style)}"

    def verdict(self, table: Table) -> dict[str, str]:
        value = self.value(table)
        verdict = "not measured" if value is None else "pass" if value <= self.limit else "miss"
        return {"target": self.text, "found": cell(value, self.style), "wanted": self.wanted, "verdict": verdict}


CPU_TARGETS = [
    Target("recompute / four products", 1.15, lambda t: t.over_floor("recompute")),
    Target("keep / three products", 1.25, lambda t: t.over_floor("keep")),
    Target("frozen head / two products", 1.15, lambda t: t.over_floor("frozen", "frozen")),
    Target("recompute / naive", 1.1, lambda t: ratio(t.time("recompute"), t.time("naive"))),
    Target("recompute: extra memory / logits", 0.08, lambda t: t.extra_of_logits("recompute"), ".3f"),
    Target(
        "recompute: half of the labels ignored / all labels (0.5, to one decimal)",
        0.55,
        lambda t: ratio(t.time("recompute", "half"), t.time("recompute")),
    ),
]
H200_TARGETS = [
    Target("frozen head, ms on an H200", 48, lambda t: ratio(t.time("frozen", "frozen"), 1e-3)),
    Target("keep, ms on an H200", 72, lambda t: ratio(t.time("keep"), 1e-3)),
    Target("recompute, ms on an H200", 97, lambda t: ratio(t.time("recompute"), 1e-3)),
    Target("recompute: extra memory, GB", 0.4, lambda t: ratio(t.median("extra", "recompute"), 1e9)),
    Target("frozen head / fastest other way", 1.0, lambda t: t.over_best_peer("frozen", "frozen")),
    Target("keep / fastest other way", 1.0, lambda t: t.over_best_peer("keep")),
]
ACCURACY_TARGETS = {
    "float32": [
        Target(
            "largest error of any of ours / largest logit",
            2e-6,
            lambda t: ratio(t.worst("max_error"), t.worst("largest_logit")),
            ".1e",
        )
    ],
    "bfloat16": [
        Target("mean error of the worst of ours", 1e-6, lambda t: t.worst("mean_error"), ".1e"),
        Target("largest error of any of ours", 4e-6, lambda t: t.worst("max_error"), ".1e"),
    ],
}


def targets_of(shape: Shape, device: str, dtype: str) -> list[Target]:
    """The numbers to reach that speak of such a run."""
    speed = {("cpu", "float32"): CPU_TARGETS, ("cuda", "bfloat16"): H200_TARGETS if shape == H200_SHAPE else []}
    return speed.get((device, dtype), []) + ACCURACY_TARGETS.get(dtype, [])


def cases(settings: Sequence[Setting], methods: Sequence[str]) -> list[tuple[Setting, str]]:
    """What to measure, the floor first, and again for the rows that count where some are ignored."""
    found: list[tuple[Setting, str]] = [("full", FLOOR)]
    for setting in settings:
        found += [(setting, FLOOR)] if setting == "half" else []
        found += [(setting, name) for name in methods if setting in METHODS[name].products]
    return found


def measure_apart(spec: Spec, timeout: float) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.kernel_peers", json.dumps(dataclasses.asdict(spec))]
    try:
        done = subprocess.run(command, cwd=storage.ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:g} s"}
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"failed": f"the process ended with {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def run(shape: Shape, arguments: argparse.Namespace) -> Table:
    """All rounds of one shape; what could not be measured is not tried again."""
    to_measure = cases(arguments.settings, arguments.methods)
    table = Table(shape, arguments.device, arguments.dtype, {case: [] for case in to_measure})
    shared: dict[str, Any] = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Spec)}
    shared |= dict(zip(("n", "d", "vocab"), shape, strict=True))
    for number in range(arguments.rounds):
        # There and back, so that a drift of the machine falls on all alike.
        for setting, method in to_measure[:: -1 if number % 2 else 1]:
            if number and table.failure(setting, method):
                continue
            rows = 0 if number else arguments.reference_rows
            spec = Spec(**{**shared, "method": method, "setting": setting, "reference_rows": rows})
            report = measure_apart(spec, arguments.timeout)
            table.reports[setting, method].append(report)
            print(f"  round {number + 1}, {setting}, {method}: {json.dumps(report)}", file=sys.stderr, flush=True)
    return table


def cell(value: float | None, style: str = ".2f", factor: float = 1.0) -> str:
    return "-" if value is None else format(factor * value, style)


def line(table: Table, setting: Setting, method: str) -> str:
    """The row of a method, or why there is none."""
    title = f"{METHODS[method].title:<28} "
    if (failure := table.failure(setting, method)) is not None:
        return title + failure
    times = table.values("seconds", method, setting)
    time, over_floor = table.time(method, setting), table.over_floor(method, setting)
    cells = [
        str(METHODS[method].products[setting]),
        cell(time, ".3f", UNITS[table.device][1]),
        cell(ratio(max(times) - min(times), time), ".0%"),
        cell(over_floor),
        cell(ratio(time, table.time("naive", setting))),
        cell(ratio(1.0, over_floor), ".0%"),
        cell(table.median("extra", method, setting), ".0f", 1 / MIB),
        cell(table.extra_of_logits(method, setting), ".1%"),
        *(cell(table.median(key, method, setting), ".1e") for key in ("mean_error", "max_error", "gradient_error")),
    ]
    tokens = table.median("tokens", method, setting)
    note = f"  errors of sums over {tokens:.0f} tokens" if tokens is not None and tokens > 1 else ""
    return title + " ".join(f"{text:>9}" for text in cells) + note


def heading(shape: Shape, device: str, dtype: str) -> str:
    n, d, vocab = shape
    size = getattr(torch, dtype).itemsize
    return (
        f"n={n} d={d} V={vocab} {dtype} on {device}: float32 logits {4 * n * vocab / MIB:.0f} MiB, "
        f"gradients {size * d * (n + vocab) / MIB:.0f} MiB, a product {2e-12 * n * d * vocab:.3g} TFLOP"
    )


def show(table: Table) -> None:
    """Print the floor, a block per setting, and the numbers to reach."""
    unit, factor = UNITS[table.device]
    print(f"\n{heading(table.shape, table.device, table.dtype)}")
    for setting, title in TITLES.items():
        methods = [method for other, method in table.reports if other == setting and method != FLOOR]
        if not methods:
            continue
        _, d, vocab = table.shape
        floors = ", ".join(cell(table.floor(products, setting), ".3f", factor) for products in (1, 2, 3, 4))
        rows = table.median("rows", FLOOR, "half" if setting == "half" else "full")
        rate = cell(ratio(rows, table.floor(4, setting)), ".3g", 8e-12 * d * vocab)
        print(f"{title}\n  1, 2, 3, 4 bare products: {floors} {unit}, {rate} TFLOP/s")
        print(f"{'':<28} " + " ".join(f"{name:>9}" for name in ("products", unit, *COLUMNS)))
        for method in methods:
            print(line(table, setting, method))
    print("numbers to reach")
    for target in targets_of(table.shape, table.device, table.dtype):
        verdict = target.verdict(table)
        print(f"  {target.text:<74} {verdict['found']:>8} {target.wanted:>10}  {verdict['verdict']}")
    sys.stdout.flush()


def describe(arguments: argparse.Namespace) -> None:
    """Print what a run would compare."""
    processes = len(cases(arguments.settings, arguments.methods)) * arguments.rounds * len(arguments.shapes)
    print(f"it would measure, in {arguments.rounds} rounds and {processes} processes:")
    for setting in arguments.settings:
        print(f"{TITLES[setting]}\n  1, 2, 3 and 4 bare products")
        for name in (name for name in arguments.methods if setting in METHODS[name].products):
            method, missing = METHODS[name], METHODS[name].missing(arguments.device)
            state = f"skipped: {missing}" if missing else f"products to compare it with: {method.products[setting]}"
            print(f"  {method.title:<28} {state}")
    for shape in arguments.shapes:
        print(heading(shape, arguments.device, arguments.dtype))
        for target in targets_of(shape, arguments.device, arguments.dtype):
            print(f"  to reach: {target.text:<74} {target.wanted:>10}")


def machine(device: str) -> dict[str, Any]:
    """What it runs on, and the versions of what is compared."""
    versions = {package: "not installed" for package in PACKAGES}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None
    return {"cpu": (names or [platform.machine()])[0], "cores": os.cpu_count(), "gpu": gpu, "versions": versions}


def write(path: Path, tables: list[Table], host: dict[str, Any], arguments: argparse.Namespace) -> None:
    """All reports, with how they came about."""
    document = {
        "provenance": storage.provenance(),
        "machine": host,
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("json", "dry_run")},
        "tables": [
            {
                "shape": table.shape,
                "reports": [
                    {"setting": setting, "method": method, "rounds": rounds}
                    for (setting, method), rounds in table.reports.items()
                ],
                "targets": [target.verdict(table) for target in targets_of(table.shape, table.device, table.dtype)],
            }
            for table in tables
        ],
    }
    text = json.dumps(storage.encode(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    storage.write_atomically(path, lambda file: file.write(text.encode()))


def shape_of(text: str) -> Shape:
    n, d, vocab = (int(part) for part in text.lower().split("x"))
    if min(n, d, vocab) < 2:
        raise ValueError("sizes start at 2")
    return n, d, vocab


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on the CPU, bfloat16 on CUDA")
    add("--shapes", type=shape_of, nargs="+", metavar="NxDxV", help="rows x width x vocabulary; default: by device")
    add("--settings", nargs="+", choices=get_args(Setting), default=list(get_args(Setting)))
    add("--methods", nargs="+", choices=tuple(METHODS), help="default: all that run on the device")
    add("--rounds", type=int, default=2, help="processes per method")
    add("--calls", type=int, help="measured calls in a process; default: 1 on the CPU, 10 on CUDA")
    add("--warmups", type=int, help="calls of full size before them; default: 1 on the CPU, 3 on CUDA")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--length", type=int, default=512, help="tokens of a sequence, for losses on pairs of sequences")
    add("--reference-rows", type=int, default=512, help="rows compared with float64, in the first round; 0: none")
    add("--timeout", type=float, default=1800, help="seconds until a process is given up")
    add("--json", type=Path, help="write everything measured to this file")
    add("--dry-run", action="store_true", help="say what would be compared")
    arguments = parser.parse_args(argv)
    device = arguments.device
    defaults: dict[str, Any] = dict(zip(("warmups", "calls"), WARMUPS_AND_CALLS[device], strict=True))
    defaults |= {"dtype": DTYPES[device], "shapes": SHAPES[device]}
    defaults["methods"] = [name for name, method in METHODS.items() if device in method.devices]
    for name, default in defaults.items():
        setattr(arguments, name, default if getattr(arguments, name) is None else getattr(arguments, name))
    if min(arguments.rounds, arguments.calls, arguments.threads, arguments.length) < 1:
        parser.error("--rounds, --calls, --threads and --length start at 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    host = machine(arguments.device)
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    print(f"{host['gpu'] or host['cpu']}, {arguments.threads} threads; {versions}")
    without_device = arguments.device == "cuda" and not torch.cuda.is_available()
    if without_device:
        print("no CUDA device here, so nothing is measured")
    if without_device or arguments.dry_run:
        describe(arguments)
        return
    tables = []
    for shape in arguments.shapes:
        tables.append(run(shape, arguments))
        show(tables[-1])
        # After each shape: an interrupted run has lost only the one it was at.
        if arguments.json is not None:
            write(arguments.json, tables, host, arguments)


if __name__ == "__main__":
    main()
