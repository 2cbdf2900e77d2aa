"""What alignment depends on: one setting changed at a time, where methods change places, and the limits."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from figures import style

METHODS = {name: style.METHODS[name] for name in ("exo_rw", "dpo_rw", "ppo", "exo_pref", "dpo_pref")}
# Name of an axis in the results: what stands below the panel, and its scale.
AXES = {
    "k": ("candidates $K$", "log"),
    "split": (r"$\beta_\pi/\beta_r$ at fixed product", "log"),
    "label_smoothing": (r"label smoothing $\varepsilon$", "log"),
    "completions": ("completions of a prompt", "log"),
    "capacity": ("order of the policy", "linear"),
    "reward_order": ("order of the reward model", "linear"),
}
COMPARED = {
    "exo_rw - ppo": "EXO-rw against PPO",
    "ppo - dpo_rw": "PPO against DPO-rw",
    "exo_rw - dpo_rw": "EXO-rw against DPO-rw",
    "exo_pref - dpo_pref": "EXO-pref against DPO-pref",
}
CONDITIONS = {
    "capacity": "policy of order",
    "reward_order": "reward model of order",
    "completions": "completions",
    "k": "K =",
    "split": r"$\beta_\pi/\beta_r$ =",
    "label_smoothing": r"$\varepsilon$ =",
    "hard_labels": "labels:",
}
# Below it a divergence is zero up to rounding.
ROUNDING = 1e-15

CAPTIONS = {
    "alignment_ablations": """\
One setting changed at a time; dotted: the unchanged value. Top: KL(policy || optimal policy of the reward that the
method was given), the reward model's for EXO-rw, DPO-rw and PPO, the oracle's for methods on labelled pairs. Bottom:
nats of oracle reward below the exact frontier at the policy's own divergence, which grow with that divergence. Ends of
training, means over seeds and prompts; bars: 95 % bootstrap interval over seeds. A k-gram policy of the highest order
is the full table, and a reward model of that order can be any function; the reference changes with the order of the
policy.
""",
    "alignment_conditions": """\
Which of two methods ends with the higher J of the oracle's reward at the temperature of its training (reward less β
times the divergence from the reference, exact): nats by which the first exceeds the second, paired by seed, with the
95 % bootstrap interval over seeds. Right of zero the order of the paper holds (EXO at least as good as PPO, PPO as
DPO); filled: the interval excludes zero. Each row is the unchanged setting or one with a single change that concerns
one of the two methods.
""",
    "alignment_limits": """\
Where methods meet. (a) Each method's loss in expectation over candidates and labels, exact, minimised over k-gram
policies (of PPO, J itself, which its steps ascend): KL(policy || optimal policy of the oracle's reward). The highest
order is the full table, where all but EXO-pref reach the optimal policy (up to rounding and what is left of the
minimisation). (b) A full table trained on samples: KL(policy || optimal policy of the reward that was given) against
completions of a prompt, means over seeds with 95 % bootstrap intervals. PPO, which draws its own completions, has the
data for its reward model alone.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """Ablations, conditions of the order, limits."""
    return [
        path
        for name, drawn in (
            ("alignment_ablations", _ablations),
            ("alignment_conditions", _conditions),
            ("alignment_limits", _limits),
        )
        for path in _saved(name, drawn(results), out_dir)
    ]


def _saved(name: str, figure: Any, out_dir: Path) -> list[Path]:
    paths = style.save(figure, name, out_dir)
    plt.close(figure)
    return paths


def _ablations(results: style.StoredResult) -> Any:
    half = len(AXES) // 2
    figure, axes = plt.subplots(4, half, figsize=(style.PAGE, 7.6), sharey="row", squeeze=False)
    for i, (axis, (label, scale)) in enumerate(AXES.items()):
        row, column = 2 * (i // half), i % half
        top, bottom = axes[row, column], axes[row + 1, column]
        for ax, measure in ((top, "kl_to_given_optimum"), (bottom, "below_frontier")):
            _curves(ax, results, axis, measure)
            ax.set_xscale(scale)
            _ticks(ax, results, axis)
            base = results.config.get(axis)
            if base is not None:
                ax.axvline(base, color="0.5", linestyle=":", linewidth=1.0)
        top.set_yscale("log")
        top.sharex(bottom)
        top.tick_params(labelbottom=False)
        bottom.set(xlabel=label)
        top.set_title(f"({'abcdef'[i]})")
        if column == 0:
            top.set_ylabel(r"$\mathrm{KL}(\pi_\theta\|\pi^*)$ (nats)")
            bottom.set_ylabel("below frontier (nats)")
    entries: dict[str, Any] = {}
    for ax in axes.flat:
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries))
    return figure


def _curves(ax: Axes, results: style.StoredResult, axis: str, measure: str) -> None:
    """Each method that the axis concerns, with bars of its interval."""
    entries = results.numbers["axes"][axis]
    values = [float(value) for value in entries]
    for method, look in METHODS.items():
        found = [entry["methods"][method][measure] for entry in entries.values() if method in entry["methods"]]
        if found:
            mean = [one["mean"] for one in found]
            below, above = [one["mean"] - one["low"] for one in found], [one["high"] - one["mean"] for one in found]
            ax.errorbar(values, mean, yerr=[below, above], elinewidth=0.8, **look.line())


def _ticks(ax: Axes, results: style.StoredResult, axis: str) -> None:
    """The values themselves, and no others."""
    values = [float(value) for value in results.numbers["axes"][axis]]
    short = _fraction if axis == "split" else _thousands
    ax.set_xticks(values, [short(value) for value in values])
    ax.minorticks_off()


def _fraction(value: float) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


def _value(axis: str, value: float) -> str:
    """As it stands in a row."""
    if axis == "hard_labels":
        return ("drawn", "hard")[int(value)]
    return _fraction(value) if axis == "split" else f"{value:g}"


def _thousands(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:.2g}" if value < 1 else f"{value:g}"


def _conditions(results: style.StoredResult) -> Any:
    rows = [("", "", "unchanged")]
    rows += [
        (axis, value, f"{text} {_value(axis, float(value))}")
        for axis, text in CONDITIONS.items()
        for value in results.numbers["axes"][axis]
    ]
    figure, axes = plt.subplots(1, len(COMPARED), figsize=(style.PAGE, 0.17 * len(rows) + 0.9), sharey=True)
    for ax, (pair, title) in zip(axes, COMPARED.items(), strict=True):
        for y, (axis, value, _) in enumerate(rows):
            source = results.numbers["axes"][axis][value] if axis else results.numbers["base"]
            difference = source["differences"].get(pair)
            if difference:
                _difference(ax, y, difference["oracle_objective"])
        ax.axvline(0.0, color="black", linewidth=0.8)
        ax.set_title(title.replace(" against ", "\nagainst "), fontsize=7.5)
        ax.set_xlabel(r"$\Delta J_\beta$ (nats)")
    axes[0].set_yticks(range(len(rows)), [text for *_, text in rows], fontsize=6.5)
    axes[0].invert_yaxis()
    return figure


def _difference(ax: Axes, y: int, found: dict[str, float]) -> None:
    """A mean with its interval."""
    mean, low, high = found["mean"], found["low"], found["high"]
    color = "#0072B2" if low > 0 else "#D55E00" if high < 0 else "0.5"
    face = color if low > 0 or high < 0 else "white"
    ax.errorbar(
        mean, y, xerr=[[mean - low], [high - mean]],
        color=color, marker="o", markersize=3, markerfacecolor=face, elinewidth=0.8,
    )  # fmt: skip


def _limits(results: style.StoredResult) -> Any:
    figure, (exact, sampled) = plt.subplots(1, 2, figsize=(style.PAGE, 2.9))
    for i, (method, look) in enumerate(METHODS.items()):
        found = results.numbers["limits"][method]
        # Side by side, so that markers at one divergence do not lie on each other.
        orders = [int(order) + 0.06 * (i - 2) for order in found]
        exact.plot(orders, [max(one["kl_to_optimum"], ROUNDING) for one in found.values()], **look.line())
    exact.set(yscale="log", xlabel="order of the policy", title="(a) expected losses, minimised")
    exact.set_ylabel(r"$\mathrm{KL}(\pi_\theta\|\pi^*)$ (nats)")
    exact.set_xticks([int(order) for order in results.numbers["limits"]["exo_rw"]])
    _curves(sampled, results, "limit_completions", "kl_to_given_optimum")
    sampled.set(xscale="log", yscale="log", xlabel="completions of a prompt", title="(b) full table, samples")
    _ticks(sampled, results, "limit_completions")
    figure.legend(*exact.get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))
    return figure


if __name__ == "__main__":
    style.main("alignment_ablations")
