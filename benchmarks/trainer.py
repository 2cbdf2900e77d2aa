"""What a training step costs in our trainer and in TRL's: ``python -m benchmarks.trainer``. Needs the extra ``hf``.

A language model of random weights is trained on random text, by every method on the same pairs of completions with the
same optimiser: tokens per second (median over the steps after the first ones; tokens of prompts and completions that
the policy sees, padding left out), and peak memory beyond the weights of policy and reference (resident on the CPU,
allocated on CUDA). Every measurement is a process of its own and all methods take turns in each round.

The floor is the time of the multiplications of a step at the speed of one large matrix product in the same dtype: 2 N
per token forward, 4 N backward, 2 N for the reference, N the parameters that multiply; attention scores not counted.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from typing import Any

import torch

MIB = 2**20
PACKAGES = ("torch", "transformers", "trl")
METHODS = {
    "TRL DPOTrainer, sigmoid": {"trainer": "trl", "loss": "sigmoid"},
    "TRL DPOTrainer, exo_pair": {"trainer": "trl", "loss": "exo_pair"},
    "ExoDPOTrainer (ours in TRL's)": {"trainer": "ours in trl"},
    "CandidateTrainer, dpo": {"trainer": "ours", "loss": "dpo"},
    "CandidateTrainer, exo_pref": {"trainer": "ours", "loss": "exo_pref"},
    "CandidateTrainer, exo_rw": {"trainer": "ours", "loss": "exo_rw"},
    "CandidateTrainer, exo_rw, logits": {"trainer": "ours", "loss": "exo_rw", "kernel": "selective"},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model and a batch."""

    width: int
    layers: int
    vocab_size: int
    pairs: int
    prompt: int
    completion: int

    @property
    def short(self) -> int:
        """Tokens of the shorter completion, so that there is padding."""
        return self.completion * 3 // 4

    @property
    def tokens(self) -> int:
        """Of a batch, padding left out."""
        return self.pairs * (2 * self.prompt + self.completion + self.short)

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of width {self.width}, V={self.vocab_size}, "
            f"{self.pairs} pairs of {self.prompt}+{self.completion} tokens"
        )


SHAPES = {"cpu": Shape(256, 4, 32000, 4, 32, 96), "cuda": Shape(1024, 24, 32000, 16, 128, 384)}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def model_of(shape: Shape, dtype: torch.dtype) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.width * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        vocab_size=shape.vocab_size,
        max_position_embeddings=2 * (shape.prompt + shape.completion),
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def tokenizer_of_bytes() -> Any:
    """A token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def texts(shape: Shape, steps: int) -> list[dict[str, str]]:
    """Pairs; completions are of two lengths."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=length))

    # One token less: the end-of-sequence token is added.
    lengths = (shape.completion - 1, shape.short - 1)
    return [
        {"prompt": text(shape.prompt), "chosen": text(lengths[i % 2]), "rejected": text(lengths[(i + 1) % 2])}
        for i in range(shape.pairs * steps)
    ]


def measure(method: str, shape: Shape, device: str, steps: int, warmups: int) -> dict[str, float]:
    """Seconds per step, tokens per step and peak memory of a method, in this process."""
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from exo_toy.integrations.config import CandidateConfig
    from exo_toy.integrations.trainer import CandidateTrainer
    from exo_toy.integrations.trl import ExoDPOTrainer

    how = METHODS[method]
    dtype = getattr(torch, DTYPES[device])
    policy, ref = model_of(shape, dtype), model_of(shape, dtype)
    rows, tokenizer = texts(shape, steps + warmups), tokenizer_of_bytes()
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder,
            use_cpu=device == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            learning_rate=1e-6,
            num_train_epochs=1.0,
            per_device_train_batch_size=shape.pairs,
            activation_checkpointing=False,
        )
        given: dict[str, Any] = dict(ref_model=ref, processing_class=tokenizer, callbacks=[Clock()])
        trainer: Any
        if how["trainer"] == "ours":
            rewards = how["loss"] == "exo_rw"
            betas: dict[str, Any] = {"beta_r": 0.1, "beta_pi": 0.1} if rewards else {"beta": 0.1}
            if rewards:
                rows = [
                    {"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "rewards": [1.0, 0.0]}
                    for r in rows
                ]
            args = CandidateConfig(**common, **betas, loss=how["loss"], kernel=how.get("kernel", "auto"))
            trainer = CandidateTrainer(policy, args, train_dataset=rows, **given)
        else:
            losses = {"loss_type": [how["loss"]]} if "loss" in how else {}
            trl_args = DPOConfig(**common, **losses, beta=0.1, label_smoothing=1e-3, max_length=None)
            kind = DPOTrainer if how["trainer"] == "trl" else ExoDPOTrainer
            trainer = kind(model=policy, args=trl_args, train_dataset=datasets.Dataset.from_list(rows), **given)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resident()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    seconds = [end - start for start, end in zip(ends[warmups - 1 :], ends[warmups:], strict=False)]
    return {"seconds": statistics.median(seconds), "tokens": shape.tokens, "memory": peak - before}


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most there ever were."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def floor_seconds(shape: Shape, device: str) -> float:
    """Of a step's multiplications at the speed of one large product."""
    dtype = getattr(torch, DTYPES[device])
    n = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    per_second = 2 * n**3 / min(times)
    return 8 * multiplying(shape) * shape.tokens / per_second


def multiplying(shape: Shape) -> int:
    """Parameters that are factors of matrix products: those of linear maps."""
    with torch.device("meta"):
        modules = model_of(shape, torch.float32).modules()
    return sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))


def in_a_process(method: str, options: argparse.Namespace) -> dict[str, float] | None:
    """What :func:`measure` says, or None with a message."""
    command = [sys.executable, "-m", "benchmarks.trainer", "--only", method, "--device", options.device]
    command += ["--steps", str(options.steps), "--warmups", str(options.warmups)]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if run.returncode:
        print(f"{method}: failed: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--warmups", type=int, default=3, help="steps before them")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.warmups) < 1:
        parser.error("rounds, steps and warmups must be at least 1: a step begins where the one before it ends")
    shape = SHAPES[options.device]
    if options.only is not None:
        print(json.dumps(measure(options.only, shape, options.device, options.steps, options.warmups)))
        return 0

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{device}, {platform.system()}, {versions}, {DTYPES[options.device]}: {shape}")
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method in METHODS:
            result = in_a_process(method, options)
            if result is not None:
                found[method].append(result)
    floor = floor_seconds(shape, options.device)
    base = found[next(iter(METHODS))]
    print(f"{'':34s}{'tokens/s':>10s}{'spread':>8s}{'/TRL':>7s}{'/floor':>8s}{'MiB':>8s}{'/TRL':>7s}")
    for method, runs in found.items():
        if not runs or not base:
            continue
        speeds = [run["tokens"] / run["seconds"] for run in runs]
        speed, memory = statistics.median(speeds), statistics.median(run["memory"] for run in runs)
        of_base = speed / statistics.median(run["tokens"] / run["seconds"] for run in base)
        of_floor = speed * floor / runs[0]["tokens"]
        memory_of_base = memory / statistics.median(run["memory"] for run in base)
        spread = (max(speeds) - min(speeds)) / speed
        ratios = f"{of_base:7.2f}{of_floor:8.2f}{memory / MIB:8.0f}{memory_of_base:7.2f}"
        print(f"{method:34s}{speed:10.0f}{spread:8.0%}{ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
