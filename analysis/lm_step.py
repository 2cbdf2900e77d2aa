"""One EXO-rw step of a Llama-shaped language model: through its logits, and through the kernel that makes none.

The model is `transformers`' own, with random weights; the reference policy is a slightly perturbed copy. Prompts have K
completions each, of different lengths; only their tokens count. A step is the forward pass of both policies, the loss
on their log ratios, and the backward pass. Three ways to the log-probabilities of the tokens, everything else the same:

* naive: the model's logits, a float32 log-softmax, the labels' entries;
* selective: the model's logits, ``selective_logps``;
* kernel: the model's last hidden states and the head's weight, ``linear_logps``.

Each with a head that is trained and with head and embedding frozen, as when adapters are trained. Losses and gradients
are compared with each other and with a copy of the model in float64. Memory is what a step holds at most beyond what
was there before it, gradients included, each measured in a process of its own; time is a median, methods taking turns.

float32 on the CPU, bfloat16 on CUDA; for example, on one GPU of 80 GB or more::

    python -m analysis.lm_step --device cuda --hidden-size 2048 --intermediate-size 5632 --n-layers 8 --n-heads 16 \
        --n-prompts 2 --prompt-length 128 --completion-length 384
"""

import copy
import ctypes
import itertools
import multiprocessing
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from analysis import runner
from exo_toy.kernels import candidate_log_ratios, linear_logps, selective_logps
from exo_toy.losses import exo_rw_loss

METHODS = ("naive", "selective", "kernel")
HEADS = ("trained", "frozen")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
IGNORED = -100
# Standard deviation of the weights, but for the head's.
INITIAL = 0.02
# An option of glibc's mallopt: larger blocks are given back as soon as they are freed.
M_MMAP_THRESHOLD = -3
# Rows of logits that the comparison in float64 holds at a time.
EXACT_ROWS = 64


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    vocab_sizes: tuple[int, ...] = (8000, 32000, 128256)
    n_candidates: tuple[int, ...] = (2, 4, 8)
    n_prompts: int = 2
    prompt_length: int = 8
    completion_length: int = 56
    hidden_size: int = 256
    intermediate_size: int = 704
    n_layers: int = 2
    n_heads: int = 4
    # Standard deviation of the logits: those of a trained model are no constant.
    logit_spread: float = 3.0
    # The reference's parameters differ from the policy's by so many of their standard deviations.
    perturbation: float = 0.02
    beta_pi: float = 0.1
    beta_r: float = 1.0
    save_budget: int = 0
    repetitions: int = 3
    device: str = "cpu"
    # Of the CPU; 0 for as many as torch takes.
    threads: int = 0
    seed: int = 0


PRESETS = {
    "quick": Config(
        vocab_sizes=(4000, 16000),
        n_candidates=(2, 4),
        prompt_length=8,
        completion_length=24,
        hidden_size=64,
        intermediate_size=176,
    ),
    "default": Config(vocab_sizes=(2000, 8000, 32000), n_candidates=(2, 4), hidden_size=128, intermediate_size=352),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays for the figure."""
    if config.device not in DTYPES:
        raise ValueError(f"device must be one of {', '.join(DTYPES)}; got {config.device!r}")
    grid = list(itertools.product(config.vocab_sizes, config.n_candidates))
    # One after the other: side by side, they would take each other's time.
    with joblib.parallel_config("sequential"):
        cells = runner.map_cases(
            measure, [{"vocab_size": vocab, "k": k, "config": asdict(config)} for vocab, k in grid]
        )

    shape = (len(config.vocab_sizes), len(config.n_candidates))
    arrays = {
        "vocab_size": np.array(config.vocab_sizes),
        "k": np.array(config.n_candidates),
        "logits_bytes": np.array([cell["logits_bytes"] for cell in cells]).reshape(shape),
    }
    summary: dict[str, Any] = {}
    for head in HEADS:
        arrays[f"{head}_gradient_bytes"] = np.array([cell["gradient_bytes"][head] for cell in cells]).reshape(shape)
        for method in METHODS:
            steps = [cell["steps"][head][method] for cell in cells]
            arrays[f"{head}_{method}_peak_bytes"] = np.array([step["peak_bytes"] for step in steps]).reshape(shape)
            arrays[f"{head}_{method}_seconds"] = np.array([step["seconds"] for step in steps]).reshape(*shape, -1)
            worst = {name: float(np.max([step[name] for step in steps])) for name in steps[0] if "difference" in name}
            summary.setdefault(head, {})[method] = worst
    numbers = {
        "device": cells[0]["device"],
        "dtype": str(DTYPES[config.device]).removeprefix("torch."),
        "rounding": torch.finfo(DTYPES[config.device]).eps,
        "threads": cells[0]["threads"],
        "transformers": metadata.version("transformers"),
        "cells": [{"vocab_size": vocab, "k": k, **cell} for (vocab, k), cell in zip(grid, cells, strict=True)],
        "worst": summary,
    }
    return runner.Result(numbers, arrays)


def measure(vocab_size: int, k: int, config: dict[str, Any]) -> dict[str, Any]:
    """Everything of one vocabulary size and K, nothing of it in this process."""
    case = (Config(**config), vocab_size, k)
    found: dict[str, Any] = apart(compare, *case)
    for head, method in itertools.product(HEADS, METHODS):
        found["steps"][head][method]["peak_bytes"] = apart(peak_bytes, *case, head=head, method=method)
    return found


def apart(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The value of a call in a process of its own, which inherits no memory but that of imported modules."""
    # Forked from a server that has imported what takes long and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["analysis.runner", "exo_toy.kernels", "transformers.models.llama.modeling_llama"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments, named))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended its process (exit code {process.exitcode})") from None
    finally:
        # An interruption does not wait for what is being measured.
        process.kill()
        process.join()


def _send(connection: Connection, function: Callable[..., Any], arguments: Any, named: Any) -> None:
    """In the other process; Ctrl-C reaches every process of the terminal, and the parent answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send(function(*arguments, **named))


@dataclass(frozen=True)
class Batch:
    """K completions of each prompt, one after the other in rows of prompt, completion and padding."""

    input_ids: Tensor
    attention_mask: Tensor
    # [B K, T-1]: the next token at every position, IGNORED where that is none of the completion.
    labels: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Experiment:
    """A policy, its reference, and a batch."""

    policy: Any
    reference: Any
    batch: Batch
    config: Config

    def step(self, method: str) -> Tensor:
        """Loss of an EXO-rw step; its gradients are left in the policy's parameters."""
        self.policy.zero_grad(set_to_none=True)
        with torch.no_grad():
            reference = self.token_logps(self.reference, method)
        policy = self.token_logps(self.policy, method)
        labels, rewards = self.batch.labels, self.batch.rewards
        log_ratio = candidate_log_ratios(policy, reference, labels != IGNORED, rewards.shape[-1])
        loss = exo_rw_loss(
            log_ratio, rewards.to(log_ratio.dtype), beta_pi=self.config.beta_pi, beta_r=self.config.beta_r
        ).mean()
        loss.backward()
        return loss.detach()

    def token_logps(self, model: Any, method: str) -> Tensor:
        """[B K, T-1], zero where nothing counts."""
        inputs = {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask}
        labels = self.batch.labels
        if method == "naive":
            log_probs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
            picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            return picked.masked_fill(labels == IGNORED, 0)
        if method == "selective":
            return selective_logps(model(**inputs).logits[:, :-1], labels)
        hidden, weight = model.model(**inputs).last_hidden_state[:, :-1], model.lm_head.weight
        if method == "kernel":
            return linear_logps(hidden, weight, labels, save_budget=self.config.save_budget)
        return _in_chunks(hidden, weight, labels)

    def freeze_head(self, head: str) -> None:
        """Head and embedding take gradients or not."""
        for part in (self.policy.lm_head, self.policy.model.embed_tokens):
            part.requires_grad_(head == "trained")

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that takes one, by name."""
        return {name: parameter.grad for name, parameter in self.policy.named_parameters() if parameter.requires_grad}

    def in_float64(self) -> "Experiment":
        """A copy whose every operation is in float64."""
        return replace(self, policy=_in_float64(self.policy), reference=_in_float64(self.reference))


def _in_float64(model: Any) -> Any:
    """A copy; the model's own normalisation would compute in float32 whatever it is given."""
    doubled = copy.deepcopy(model).double()
    for parent in list(doubled.modules()):
        for name, norm in parent.named_children():
            if name.endswith("norm"):
                plain = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                plain.weight = norm.weight
                setattr(parent, name, plain)
    return doubled


def _in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The naive way in hidden's dtype, a few rows at a time, recomputed in the backward pass."""

    def chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    counts = labels != IGNORED
    rows = zip(hidden[counts].split(EXACT_ROWS), labels[counts].split(EXACT_ROWS), strict=True)
    picked = torch.cat([checkpoint(chunk, *row, use_reentrant=False) for row in rows])
    return picked.new_zeros(labels.shape).masked_scatter(counts, picked)


def build(config: Config, vocab_size: int, k: int) -> Experiment:
    """Draw everything from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.threads:
        torch.set_num_threads(config.threads)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        max_position_embeddings=config.prompt_length + config.completion_length,
        use_cache=False,
    )
    with torch.device(config.device):
        policy: Any = LlamaForCausalLM(shape)
    policy.to(DTYPES[config.device])
    reference = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                of_head = config.logit_spread * config.hidden_size**-0.5
                parameter.normal_(0, of_head if name == "lm_head.weight" else INITIAL, generator=generator)
        for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
            scale = config.perturbation * (ours.std() if ours.ndim > 1 else 1)
            theirs.copy_(ours + scale * torch.randn(ours.shape, generator=generator, device=config.device))
    batch = draw_batch(generator, vocab_size, k, config.n_prompts, config.prompt_length, config.completion_length)
    return Experiment(policy, reference, batch, config)


def draw_batch(
    generator: torch.Generator, vocab_size: int, k: int, n_prompts: int, prompt_length: int, completion_length: int
) -> Batch:
    """Random tokens; completions are between half of the longest and the longest."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=generator.device)

    prompts = integers(0, vocab_size, n_prompts, prompt_length).repeat_interleave(k, 0)
    completions = integers(0, vocab_size, n_prompts * k, completion_length)
    lengths = integers((completion_length + 1) // 2, completion_length + 1, n_prompts * k, 1)
    position = torch.arange(prompt_length + completion_length, device=generator.device)
    inside = position < prompt_length + lengths
    tokens = torch.cat([prompts, completions], -1).masked_fill(~inside, 0)
    labels = tokens.masked_fill(~inside | (position < prompt_length), IGNORED)[:, 1:]
    rewards = torch.randn(n_prompts, k, generator=generator, device=generator.device)
    return Batch(tokens, inside.long(), labels, rewards)


def compare(config: Config, vocab_size: int, k: int) -> dict[str, Any]:
    """Losses and gradients of all methods, how far they are from each other and from float64, and step times."""
    experiment = build(config, vocab_size, k)
    exact = experiment.in_float64()
    exact_loss, exact_gradients = exact.step("float64"), exact.gradients()
    steps: dict[str, dict[str, Any]] = {head: {} for head in HEADS}
    gradient_bytes = {}
    for head in HEADS:
        experiment.freeze_head(head)
        losses, gradients = {}, {}
        for method in METHODS:
            losses[method] = experiment.step(method)
            gradients[method] = experiment.gradients()
            steps[head][method] = {
                "loss": losses[method].item(),
                "loss_difference": _distance(losses[method], losses["naive"]),
                "loss_difference_from_float64": _distance(losses[method], exact_loss),
                "gradient_difference": _largest_distance(gradients[method], gradients["naive"]),
                "gradient_difference_from_float64": _largest_distance(gradients[method], exact_gradients),
            }
        gradient_bytes[head] = sum(gradient.nbytes for gradient in gradients["naive"].values())
    del exact, exact_gradients, gradients
    for (head, method), seconds in _step_times(experiment, config.repetitions).items():
        steps[head][method] |= {"seconds": seconds, "median_seconds": statistics.median(seconds)}
    labels, device = experiment.batch.labels, experiment.batch.labels.device
    return {
        "steps": steps,
        "gradient_bytes": gradient_bytes,
        "logits_bytes": labels.numel() * vocab_size * DTYPES[device.type].itemsize,
        "positions": labels.numel(),
        "completion_tokens": int((labels != IGNORED).sum()),
        "parameters": sum(parameter.numel() for parameter in experiment.policy.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the second, in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def _largest_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of any parameter's gradient; NaN if one is."""
    return torch.tensor([_distance(gradient, theirs[name]) for name, gradient in ours.items()]).max().item()


def _step_times(experiment: Experiment, repetitions: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every step, methods taking turns; all have run before."""
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(HEADS, METHODS)}
    for _ in range(repetitions):
        for head, method in times:
            experiment.freeze_head(head)
            experiment.policy.zero_grad(set_to_none=True)
            _synchronize(experiment)
            start = time.perf_counter()
            experiment.step(method)
            _synchronize(experiment)
            times[head, method].append(time.perf_counter() - start)
    return times


def _synchronize(experiment: Experiment) -> None:
    if experiment.batch.input_ids.is_cuda:
        torch.cuda.synchronize()


def peak_bytes(config: Config, vocab_size: int, k: int, *, head: str, method: str) -> int:
    """The most that a step holds beyond what was there before it; gradients count, the models do not."""
    experiment = build(config, vocab_size, k)
    experiment.freeze_head(head)
    # What the first step of a process loads and keeps is no part of a step.
    few_tokens = draw_batch(torch.Generator(config.device), vocab_size, 2, 1, 2, 2)
    replace(experiment, batch=few_tokens).step(method)
    experiment.policy.zero_grad(set_to_none=True)
    return extra_bytes(lambda: experiment.step(method), config.device)


def extra_bytes(function: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds beyond what was there before it; on a CPU in pages that were not there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc keeps some of what is freed: used again, it would not be seen; not used again, it would count.
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)
        libc.malloc_trim(0)
    try:
        # Linux: the highest level of memory starts anew.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    before = _highest_resident_bytes()
    function()
    return _highest_resident_bytes() - before


def _highest_resident_bytes() -> int:
    """The most resident memory of this process so far, or since it was last reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(kibibytes)


if __name__ == "__main__":
    runner.main("lm_step")
