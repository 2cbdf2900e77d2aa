"""The files of a result: ``<name>.json`` (settings, provenance, numbers) and ``<name>.npz`` (arrays).

The reported run (preset "full") lies in ``analysis/results``, any other in a folder of its preset's name below it.
Both files are written beside their place and moved there when complete, the json last; the json holds the hash of its
npz, so that a pair that does not belong together is never read. Nothing here imports torch or exo_toy: the figures
read with it.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Every experiment, in the order in which they run; its figure is the module of the same name.
EXPERIMENTS = (
    "objective_identity",
    "gradient_alignment",
    "mode_seeking",
    "density_ratio",
    "lm_step",
    "alignment",
    "alignment_ablations",
    "alignment_ratios",
    "gradient_noise",
    "fixed_points",
    "refreshed_candidates",
    "label_targets",
    "vanishing_gradients",
    "kl_estimators",
    "expressivity",
    "alpha_divergences",
    "real_lengths",
)
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "analysis" / "results"
REPORTED = "full"
# What computes the numbers: a change elsewhere (text, figures, results) does not make them doubtful.
SOURCES = ("exo_toy", ":(glob)analysis/*.py", "pyproject.toml", "constraints.txt")
PACKAGES = ("torch", "numpy", "scipy")
# JSON has no such numbers, and json.dumps writes invalid JSON for them; these words stand for them.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class ResultsError(Exception):
    """Stored results are missing, damaged or of another version; the message says which and what to run."""


@dataclasses.dataclass(frozen=True)
class StoredResult:
    """One experiment as read back: its numbers and arrays, and how they came about."""

    name: str
    preset: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def number(self, key: str) -> Any:
        """The entry of ``numbers`` under a dotted key, "exo_rw.slope"."""
        value: Any = self.numbers
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                mine = f"the stored results of {self.name} ({self.preset})"
                raise ResultsError(f"{mine} hold no number {key!r}; {again(self.name, self.preset)}")
            value = value[part]
        return value


def again(name: str, preset: str) -> str:
    """The command that makes these results."""
    return f"run: python -m analysis.{name} --preset {preset}"


def paths(name: str, preset: str, folder: Path | None = None) -> tuple[Path, Path]:
    """The json and the npz of a result."""
    folder = folder or RESULTS
    folder = folder if preset == REPORTED else folder / preset
    return folder / f"{name}.json", folder / f"{name}.npz"


def store(
    name: str,
    preset: str,
    config: Any,
    numbers: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    *,
    run: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Path:
    """Write a result and return the json's path; nothing is touched before all of it is known to be storable.

    Args:
        name: of the experiment.
        preset: of the settings.
        config: dataclass of settings.
        numbers: nested dictionaries of numbers, texts and lists; NaN and infinities are kept.
        arrays: of numbers or texts, no objects.
        run: how it was run (wall time, command), kept in the provenance.
        folder: of results, ``analysis/results`` unless given.

    Raises:
        ValueError: a number or array that would not be read back as it is.
    """
    json_path, npz_path = paths(name, preset, folder)
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype == object:
            raise ValueError(f"arrays[{key!r}] must be a numpy array of numbers or texts; got {type(array).__name__}")
    buffer = io.BytesIO()
    # The stub of savez takes its own flag for one of the arrays.
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    npz = buffer.getvalue()
    document = {
        "name": name,
        "preset": preset,
        "config": encode(dataclasses.asdict(config)),
        "seed": getattr(config, "seed", None),
        "provenance": {**provenance(), **encode(dict(run or {}))},
        "arrays": {"file": npz_path.name, "sha256": hashlib.sha256(npz).hexdigest()},
        "numbers": encode(dict(numbers)),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(npz_path, lambda file: file.write(npz))
    write_atomically(json_path, lambda file: file.write(text.encode()))
    return json_path


def load(name: str, preset: str, folder: Path | None = None) -> StoredResult:
    """Read a result back.

    Raises:
        ResultsError: no such result, or files that do not belong together.
    """
    json_path, npz_path = paths(name, preset, folder)
    if not json_path.exists():
        raise ResultsError(f"no stored results of {name} ({preset}): {json_path} does not exist; {again(name, preset)}")
    try:
        document = json.loads(json_path.read_text(encoding="utf-8"))
        stored = StoredResult(
            document["name"],
            document["preset"],
            decode(document["config"]),
            decode(document["provenance"]),
            decode(document["numbers"]),
            {},
        )
        npz_hash = document["arrays"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{json_path} is not a result file ({error!r}); {again(name, preset)}") from error
    if (stored.name, stored.preset) != (name, preset):
        raise ResultsError(
            f"{json_path} holds {stored.name} ({stored.preset}), not {name} ({preset}); {again(name, preset)}"
        )
    npz = npz_path.read_bytes() if npz_path.exists() else b""
    if hashlib.sha256(npz).hexdigest() != npz_hash:
        raise ResultsError(f"{npz_path} is missing or not the one that {json_path.name} names; {again(name, preset)}")
    with np.load(io.BytesIO(npz), allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return dataclasses.replace(stored, arrays=arrays)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill a file that takes its place only when complete; on any failure the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def encode(value: Any) -> Any:
    """Plain JSON values, exactly: numpy scalars become numbers, NaN and infinities their words."""
    match value:
        case np.generic():
            return encode(value.item())
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else _word(value)
        case str():
            if value in NON_FINITE:
                raise ValueError(f"the text {value!r} would be read back as a number")
            return value
        case dict():
            if not all(isinstance(key, str) for key in value):
                raise ValueError(f"keys must be texts; got {list(value)}")
            return {key: encode(item) for key, item in value.items()}
        case list() | tuple():
            return [encode(item) for item in value]
    raise ValueError(f"a result holds numbers, texts, lists and dictionaries; got {type(value).__name__}: {value!r}")


def decode(value: Any) -> Any:
    """What :func:`encode` was given, tuples as lists."""
    match value:
        case str():
            return NON_FINITE.get(value, value)
        case dict():
            return {key: decode(item) for key, item in value.items()}
        case list():
            return [decode(item) for item in value]
    return value


def _word(value: float) -> str:
    """The word of a float that is not finite."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def provenance() -> dict[str, Any]:
    """When, on what and from which sources: date, versions, commit."""
    commit = _git("rev-parse", "HEAD")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": None if commit is None else bool(_git("status", "--porcelain", "--", *SOURCES)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    # Here, because reading results does not need the library.
    from exo_toy import __version__

    return {"exo_toy": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _git(*arguments: str) -> str | None:
    """The output of a git command in the checkout; None where there is no git or no commit."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
