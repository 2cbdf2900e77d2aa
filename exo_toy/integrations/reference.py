"""Where the reference policy's log-probabilities come from: a second model, the adapter switched off, or a cache."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from exo_toy import checks
from exo_toy.integrations.candidates import CandidateCollator, Candidates
from exo_toy.integrations.scoring import Kernel, completion_logps, evaluating, scatter, unwrap

HEADER = "header.json"
# What an adapter puts around a layer adds these to the names of the layer's weights.
WRAPPERS = ("base_layer", "original_module", "token_adapter")
# Parts of a config that change no log-probability of a model in evaluation mode.
NOT_IN_FINGERPRINT = ("_", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


class StaleCacheError(ValueError):
    """A cache of the reference's log-probabilities that does not belong to this model, temperature or data."""


@contextmanager
def reference_policy(policy: nn.Module, ref_model: nn.Module | None = None) -> Iterator[nn.Module]:
    """The reference policy: evaluation mode, no gradient.

    Args:
        policy: the model that is trained; with a PEFT adapter where there is no second model, wrapped or not.
        ref_model: the second model, or None for the policy with its adapter switched off.

    Yields:
        The model to call.

    Raises:
        ValueError: neither a second model nor an adapter.
    """
    if ref_model is not None:
        with torch.no_grad(), evaluating(ref_model):
            yield ref_model
        return
    inner: Any = unwrap(policy)
    if not hasattr(inner, "disable_adapter"):
        raise ValueError(
            "ref_model must be given where the policy has no PEFT adapter to switch off; "
            f"got None with {type(inner).__name__}"
        )
    with torch.no_grad(), evaluating(policy), inner.disable_adapter():
        yield policy


def reference_logps(
    batch: Mapping[str, Tensor],
    *,
    policy: nn.Module,
    ref_model: nn.Module | None = None,
    temperature: float | int = 1.0,
    kernel: Kernel = "auto",
) -> Float[Tensor, "B K"]:
    """Log-probabilities of a batch's candidates under the reference.

    Args:
        batch: of :class:`~exo_toy.integrations.candidates.CandidateCollator`. ``ref_logps`` in it, from a cache, are
            returned as they are.
        policy: the model that is trained.
        ref_model: the second model, or None for the policy with its adapter switched off.
        temperature: as for the policy.
        kernel: as for the policy, so that the two agree to the bit while their weights do.

    Returns:
        [B, K] in nats, 0 where masked, without a gradient.

    Raises:
        ValueError: no source of the reference; what :func:`~exo_toy.integrations.scoring.completion_logps` refuses.
    """
    if "ref_logps" in batch:
        return batch["ref_logps"]
    with reference_policy(policy, ref_model) as ref:
        logps = completion_logps(
            ref,
            batch["input_ids"],
            batch["attention_mask"],
            batch["completion_mask"],
            temperature=temperature,
            kernel=kernel,
        )
    return scatter(logps, batch["candidate_rows"], batch["candidate_mask"])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a reference model: its weights, with their dtype, and what its config says of the computation.

    An adapter is left out, so a model and the same model under an adapter have one fingerprint. Sharded weights are
    gathered, in which all processes must take part.

    Args:
        model: wrapped or not.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> _ = torch.nn.init.zeros_(layer.bias)
        >>> before == fingerprint(layer)
        False
    """
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner

    digest = hashlib.sha256()
    config = base.config.to_dict() if hasattr(base, "config") else {}
    kept = {name: value for name, value in config.items() if not _is_no_matter(name)}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    weights = {}
    for name, tensor in base.state_dict().items():
        if isinstance(tensor, Tensor) and not (base is not inner and is_of_adapter(inner, name)):
            weights[".".join(part for part in name.split(".") if part not in WRAPPERS)] = tensor
    for name in sorted(weights):
        tensor = weights[name]
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_of_adapter(model: Any, name: str) -> bool:
    """Whether switching the adapter off puts a parameter aside.

    Args:
        model: a PEFT model.
        name: of one of its parameters.
    """
    own = (model.base_model.prefix, "trainable_tokens_")
    return any(part == "modules_to_save" or part.startswith(own) for part in name.split("."))


def autocast_dtype(device: torch.device) -> str:
    """The dtype of the autocast in which this is called, "none" where there is none.

    Args:
        device: of the model.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype(torch.device("cpu"))
        'torch.bfloat16'
    """
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"


class ReferenceCache:
    """Precomputed log-probabilities of completions, found by their content.

    A folder: ``header.json`` names the model's fingerprint, the temperature and the autocast; ``part-*.npz`` hold keys
    and log-probabilities. A key is the SHA-256 of the tokens of prompt and completion and of where the one ends, so
    rows may be reordered, repeated, left out; tokens that were not scored are an error.

    Args:
        path: of the folder, made by :func:`precompute`.
        fingerprint: what :func:`fingerprint` says of the reference; None to take the cache's word for it, where the
            reference is not at hand.
        temperature: of the policy.
        autocast: what :func:`autocast_dtype` says in training; None to take the cache's word for it.

    Raises:
        StaleCacheError: no cache; another fingerprint, temperature or autocast. The message names both.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None,
        temperature: float | int,
        autocast: str | None = None,
    ) -> None:
        self.path = Path(path)
        if not (self.path / HEADER).exists():
            raise StaleCacheError(
                f"no cache of reference log-probabilities in {self.path}; precompute_ref (precompute) makes one"
            )
        header = json.loads((self.path / HEADER).read_text(encoding="utf-8"))
        for name, wanted in {"fingerprint": fingerprint, "temperature": temperature, "autocast": autocast}.items():
            if wanted is not None and header.get(name) != wanted:
                raise StaleCacheError(
                    f"the reference's log-probabilities in {self.path} are stale: they have {name} {header.get(name)}, "
                    f"wanted is {name} {wanted}; remove the folder and precompute them again"
                )
        self.fingerprint: str = header["fingerprint"]
        self.temperature: float = header["temperature"]
        self._logps: dict[bytes, float] = {}
        for part in sorted(self.path.glob("part-*.npz")):
            with np.load(part) as arrays:
                self._logps |= zip(map(bytes, arrays["keys"]), arrays["logps"].tolist(), strict=True)

    def __len__(self) -> int:
        return len(self._logps)

    def __contains__(self, key: bytes) -> bool:
        return key in self._logps

    def logps(self, candidates: Candidates | Mapping[str, Any], *, index: int | None = None) -> list[float]:
        """Of the K candidates of a row, as the column ``ref_logps`` that the collator takes.

        Args:
            candidates: the row, or a mapping with its keys.
            index: of the row, for error messages.

        Returns:
            K numbers, in nats.

        Raises:
            StaleCacheError: a candidate that is not there.
        """
        keys = _keys(candidates)
        missing = [k for k, key in enumerate(keys) if key not in self]
        if missing:
            row = "a row" if index is None else f"row {index}"
            raise StaleCacheError(
                f"candidate {missing[0]} of {row}, key {keys[missing[0]].hex()}, is not in the cache {self.path} with "
                f"fingerprint {self.fingerprint}: the data, the tokenizer or the lengths have changed; precompute again"
            )
        return [self._logps[key] for key in keys]


def precompute(
    model: nn.Module,
    dataset: Sequence[Candidates | Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    collator: CandidateCollator,
    temperature: float | int,
    batch_size: int = 8,
    kernel: Kernel = "auto",
    save_every: int = 64,
    shard: int = 0,
    num_shards: int = 1,
    progress: bool = True,
) -> ReferenceCache:
    """The log-probabilities of all candidates of a dataset under the reference, computed once and stored.

    Run again after an interruption, it computes what is missing. Files appear whole or not at all. Precision is what
    it is where this is called: under the autocast of the training if there is one.

    Args:
        model: the reference; of one with an adapter, the model without it.
        dataset: tokenised rows.
        path: of a folder to make or to go on with.
        collator: as in training.
        temperature: as in training.
        batch_size: prompts at a time.
        kernel: as in training.
        save_every: batches between two savings.
        shard: which of the shards this process does; they may write to one folder.
        num_shards: how many there are.
        progress: whether to show a progress bar.

    Returns:
        The cache.

    Raises:
        StaleCacheError: a folder with the log-probabilities of another model, temperature or autocast.
        ValueError: a wrong number; what :func:`~exo_toy.integrations.scoring.completion_logps` refuses.
    """
    for name, value in {"batch_size": batch_size, "save_every": save_every, "num_shards": num_shards}.items():
        checks.require_integer(name, value, at_least=1)
    if shard not in range(num_shards):
        raise ValueError(f"shard must be in [0, {num_shards}); got {shard!r}")
    checks.require_positive(temperature=temperature)
    folder, device = Path(path), next(model.parameters()).device
    identity: dict[str, Any] = {
        "fingerprint": fingerprint(model),
        "temperature": temperature,
        "autocast": autocast_dtype(device),
    }
    if not (folder / HEADER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        header = json.dumps(identity).encode()
        write_whole(folder / HEADER, lambda file: file.write(header))
    cache = ReferenceCache(folder, **identity)

    rows = range(shard, len(dataset), num_shards)
    todo = [i for i in rows if not all(key in cache for key in _keys(dataset[i]))]
    adapted = hasattr(unwrap(model), "disable_adapter")
    new: dict[bytes, float] = {}
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc="reference", unit="prompt", disable=not progress)
    try:
        with bar, reference_policy(model, None if adapted else model) as ref:
            for done, start in enumerate(range(0, len(todo), batch_size), 1):
                features = [dataset[i] for i in todo[start : start + batch_size]]
                batch = {name: tensor.to(device) for name, tensor in collator(features).items()}
                logps = completion_logps(
                    ref,
                    batch["input_ids"],
                    batch["attention_mask"],
                    batch["completion_mask"],
                    temperature=temperature,
                    kernel=kernel,
                )
                keys = [key for feature in features for key in _keys(feature)]
                new |= zip(keys, logps.tolist(), strict=True)
                bar.update(len(features))
                if done % save_every == 0:
                    _save(folder, new)
                    new.clear()
    finally:
        _save(folder, new)
    return ReferenceCache(folder, **identity)


def _is_no_matter(name: str) -> bool:
    """Whether a config's entry leaves the log-probabilities alone."""
    return name.startswith(NOT_IN_FINGERPRINT) or name.endswith("token_id") or "drop" in name


def _keys(candidates: Candidates | Mapping[str, Any]) -> list[bytes]:
    """SHA-256 of the tokens of each candidate and of its prompt."""
    row = vars(candidates) if isinstance(candidates, Candidates) else candidates
    prompt = row["prompt_ids"]
    return [
        hashlib.sha256(np.asarray([len(prompt), *prompt, *completion], dtype="<i8").tobytes()).digest()
        for completion in row["completion_ids"]
    ]


def _save(folder: Path, logps: dict[bytes, float]) -> None:
    """A part of the cache, named by its keys; nothing where there is nothing to save."""
    if not logps:
        return
    keys = np.frombuffer(b"".join(logps), dtype=np.uint8).reshape(-1, 32)
    name = hashlib.sha256(keys.tobytes()).hexdigest()[:16]
    values = np.asarray(list(logps.values()), dtype=np.float64)
    write_whole(folder / f"part-{name}.npz", lambda file: np.savez(file, keys=keys, logps=values))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A file that appears whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        write: what fills it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
