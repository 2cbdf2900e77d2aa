"""Memory and time of an EXO-rw step of a language model, through logits and through the kernel."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figures import style

METHODS = {name: style.METHODS[name] for name in ("naive", "selective", "kernel")}
HEADS = {"trained": "head trained", "frozen": "head and embedding frozen"}
GRADIENTS: dict[str, Any] = {"color": "black", "linewidth": 0.8}
MIB = 2**20

CAPTIONS = {
    "lm_step": """\
One EXO-rw step of a Llama-shaped model with random weights (policy and reference forward, loss, policy backward), its
log-probabilities computed in three ways: naive, a float32 log-softmax of the model's logits; selective, from the same
logits without a log-softmax kept; kernel, from the last hidden states, without logits. Top: the most memory that the
step holds beyond what was there before it, gradients included; thin black: the gradients alone. Bottom: seconds per
step, median over repetitions in which the methods take turns, bars their range. Left: against the vocabulary, at the
largest K. Right: against the candidates K of each prompt, at the largest vocabulary. Filled, strong lines: the head is
trained. Hollow, thin lines: head and embedding are frozen, as when adapters are trained. Loss and gradients of all
three are the same up to rounding.
"""
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """Against vocabulary and K, memory above time."""
    figure, axes = plt.subplots(2, 2, figsize=(style.PAGE, 4.8), sharex="col", sharey="row")
    vocab, k = results.arrays["vocab_size"], results.arrays["k"]
    # The arrays are [vocabulary, K]: each column of panels is a slice of them.
    largest_k, largest_vocab = np.s_[:, k.argmax()], np.s_[vocab.argmax(), :]
    for column, (x, where) in enumerate(((vocab, largest_k), (k, largest_vocab))):
        _memory(axes[0, column], results, x, where)
        _time(axes[1, column], results, x, where)
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xticks(x, [f"{value:,}" for value in x])
        axes[1, column].minorticks_off()
    axes[0, 0].set_ylabel("peak memory (MiB)")
    axes[1, 0].set_ylabel("seconds per step")
    axes[0, 0].set_title(f"K = {k.max()} candidates per prompt", fontsize=8)
    axes[0, 1].set_title(f"vocabulary of {vocab.max():,}", fontsize=8)
    axes[1, 0].set_xlabel("vocabulary V (tokens)")
    axes[1, 1].set_xlabel("candidates K")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=3)
    paths = style.save(figure, "lm_step", out_dir)
    plt.close(figure)
    return paths


def _memory(ax: Axes, results: style.StoredResult, x: np.ndarray, where: Any) -> None:
    for head in HEADS:
        for method in METHODS:
            peak = results.arrays[f"{head}_{method}_peak_bytes"][where] / MIB
            ax.plot(x, peak, **_line(method, head))
        gradients = results.arrays[f"{head}_gradient_bytes"][where] / MIB
        ax.plot(x, gradients, linestyle="-" if head == "trained" else ":", **GRADIENTS)
    _log(ax)


def _time(ax: Axes, results: style.StoredResult, x: np.ndarray, where: Any) -> None:
    for head in HEADS:
        for method in METHODS:
            seconds = results.arrays[f"{head}_{method}_seconds"][where]
            low, median, high = np.quantile(seconds, [0, 0.5, 1], axis=-1)
            ax.errorbar(x, median, [median - low, high - median], elinewidth=0.8, **_line(method, head))
    _log(ax)


def _log(ax: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _line(method: str, head: str) -> dict[str, Any]:
    line = {**METHODS[method].line(), "label": None}
    return line if head == "trained" else {**line, "linewidth": 0.8, "markerfacecolor": "white"}


def _legend() -> list[Line2D]:
    """Methods, then heads, then the floor."""
    lines = [Line2D([], [], **{**_line(method, "trained"), "label": look.label}) for method, look in METHODS.items()]
    grey: dict[str, Any] = {"color": "0.4", "marker": "o"}
    lines += [
        Line2D([], [], label=HEADS["trained"], **grey),
        Line2D([], [], label=HEADS["frozen"], linewidth=0.8, markerfacecolor="white", **grey),
        Line2D([], [], label="gradients alone (dotted: frozen)", **GRADIENTS),
    ]
    # A legend fills its columns from the top: methods above, the rest below.
    return [line for pair in zip(lines[:3], lines[3:], strict=True) for line in pair]


if __name__ == "__main__":
    style.main("lm_step")
