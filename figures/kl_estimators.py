"""Which gradient a sampled KL penalty has: a table of verdicts; error and noise against the distance."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from figures import style

# Colours light enough for black text; a mark tells them apart in grey.
VERDICTS = {
    "right": ("#8FD3BE", "✓", r"$\nabla\mathrm{KL}(\pi\|\pi_\mathrm{ref})$: right"),
    "the other KL's": ("#F4C77B", "⇄", r"$\nabla\mathrm{KL}(\pi_\mathrm{ref}\|\pi)$: the other's"),
    "zero": ("#D0D0D0", "∅", "zero"),
    "biased": ("#E9A6A0", "", "neither: biased"),
}
COLUMNS = {
    "policy": r"$\pi$",
    "reference": r"$\pi_\mathrm{ref}$",
    "reference, weighted": r"$\pi_\mathrm{ref}$" + "\nweighted",
    "old policy": "old",
    "old policy, weighted": "old\nweighted",
}
# Rows whose error and noise are drawn, with one look each.
BIASED = {
    "sequence k3 loss": style.Look("k3 as loss", "#D55E00", "-", "o"),
    "token k3 loss": style.Look("k3 as loss, by token", "#D55E00", "--", "s"),
    "token k2 loss": style.Look("k2 as loss, by token", "#E69F00", "-.", "^"),
    "sequence k3 reward": style.Look("k3 as reward", "#CC79A7", "-", "D"),
    "sequence k2 reward": style.Look("k2 as reward", "#CC79A7", ":", "x"),
    "sequence k1 loss": style.Look("k1 as loss", "#999999", ":", "+"),
}
RIGHT = {
    "sequence k1 importance": style.Look("k1 times ratio", "#999999", ":", "x"),
    "token k1 importance": style.Look("k1 times ratio, by token", "#999999", "--", "+"),
    "sequence k2 loss": style.Look("k2 as loss = k1 as reward = k3 times ratio", "#E69F00", "--", "s"),
    "sequence k1 reward (baseline)": style.Look("k1 as reward, mean baseline", "#56B4E9", "-.", "^"),
    "token k1 reward": style.Look("k1 as reward to go", "#0072B2", (0, (5, 1)), "v"),
    "token k1 reward (baseline)": style.Look("k1 as reward to go, mean baseline", "#0072B2", "-", "o"),
    "token k3 importance": style.Look("k3 by token, times ratio of prefix", "#009E73", "-", "D"),
}

CAPTIONS = {
    "kl_estimators": """\
The exact expectation of the gradient that automatic differentiation makes of a KL penalty, for every estimator and use
(rows) and every way of drawing completions (columns): from the policy itself, from the reference, and from an old
policy half way between them, without and with importance weights. Colour: which divergence's gradient it is, the same
verdict in all cases (classes of policies, directions, distances); a mixed cell would be white, with a "?". Number:
distance from the gradient of KL(π‖π_ref), relative to its length, at the distance from the reference nearest to 1 nat;
median over policies. It is 1 with no gradient at all and 2 where it points the other way. Left: one term of a
completion's log ratio. Right: one of each token's; rewards are then rewards to go, weights those of the prefix, or of
the token alone. A dash: such a use needs weights.
""",
    "kl_estimators_noise": """\
Left: distance of wrong expected gradients from that of KL(π‖π_ref), relative to its length, against the distance from
the reference; completions from the policy. What falls agrees with it to first order, what stays near 1 has no part of
it. Middle and right: exact noise of the right ones, per sample: trace of the covariance over the squared length of the
expected gradient, for completions from the policy and from the reference with weights. Lines: medians over classes of
policies and directions (left), geometric means (middle and right); bands: half of the policies lie within. Uses joined
by an equals sign have one gradient sample by sample.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """The table, then the curves."""
    return [*_draw_table(results, out_dir), *_draw_curves(results, out_dir)]


def _draw_table(results: style.StoredResult, out_dir: Path) -> list[Path]:
    cells, shown = results.numbers["cells"], _shown(results)
    levels = {level: [row for row in cells if row.startswith(level)] for level in ("sequence", "token")}
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE * 1.2, 4.1))
    for ax, (level, rows) in zip(axes, levels.items(), strict=True):
        for i, row in enumerate(rows):
            for j, column in enumerate(COLUMNS):
                _cell(ax, j, i, cells[row].get(column), shown)
        ax.set(xlim=(0, len(COLUMNS)), ylim=(len(levels["token"]), 0), title=f"by {level}")
        ax.set_xticks(np.arange(len(COLUMNS)) + 0.5, COLUMNS.values())
        ax.set_yticks(np.arange(len(rows)) + 0.5, [_use(row) for row in rows])
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        for i in range(1, len(rows)):
            if rows[i].split()[1] != rows[i - 1].split()[1]:
                ax.axhline(i, color="black", linewidth=0.8)
    handles = [Patch(facecolor=color, label=f"{mark} {label}".strip()) for color, mark, label in VERDICTS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    paths = style.save(figure, "kl_estimators", out_dir)
    plt.close(figure)
    return paths


def _shown(results: style.StoredResult) -> str:
    """The distance nearest to 1 nat."""
    distances: list[str] = results.numbers["distances"]
    return min(distances, key=lambda distance: abs(np.log(float(distance))))


def _use(row: str) -> str:
    """As "k3 reward", without the level."""
    return row.partition(" ")[2].replace("importance", "× ratio").replace("(token ratio)", "of token")


def _cell(ax: Axes, x: int, y: int, cell: dict[str, dict[str, float]] | None, shown: str) -> None:
    if cell is None:
        ax.text(x + 0.5, y + 0.5, "–", ha="center", va="center", color="0.5")
        return
    verdicts = list(cell["verdicts"])
    color, mark, _ = VERDICTS[verdicts[0]] if len(verdicts) == 1 else ("white", "?", "")
    error = cell["error"][shown]
    number = "" if mark == "✓" else f"{error:.2f}" if error < 9.995 else f"{error:.2g}"
    ax.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white"))
    ax.text(x + 0.5, y + 0.5, f"{number} {mark}".strip(), ha="center", va="center", fontsize=7)


def _draw_curves(results: style.StoredResult, out_dir: Path) -> list[Path]:
    arrays, rows = results.arrays, list(results.numbers["cells"])
    distances = arrays["distances"]
    figure, axes = plt.subplots(1, 3, figsize=(style.PAGE * 1.2, 3.6))
    for row, look in BIASED.items():
        error = arrays["error"][..., rows.index(row), 0]
        _curve(axes[0], distances, np.median(error, (0, 1)), error, look)
    for ax, column in ((axes[1], 0), (axes[2], 2)):
        for row, look in RIGHT.items():
            noise = arrays["noise_to_signal"][..., rows.index(row), column]
            _curve(ax, distances, np.exp(np.log(noise).mean((0, 1))), noise, look)
        ax.sharey(axes[1])
    titles = ("wrong: error", r"right: noise, $\pi$ draws", r"right: noise, $\pi_\mathrm{ref}$ draws, weighted")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(xscale="log", yscale="log", xlabel=r"$\mathrm{KL}(\pi\|\pi_\mathrm{ref})$ (nats)")
        ax.set_title(title, fontsize=8)
    axes[0].set_ylabel("relative error")
    axes[1].set_ylabel("noise / signal of one sample")
    axes[0].legend(fontsize=6, loc="lower right")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=6.5, loc="outside lower center", ncols=3)
    paths = style.save(figure, "kl_estimators_noise", out_dir)
    plt.close(figure)
    return paths


def _curve(ax: Axes, x: np.ndarray, middle: np.ndarray, values: np.ndarray, look: style.Look) -> None:
    """A line and the band of the middle half of [classes, seeds, distances]."""
    low, high = np.quantile(values, (0.25, 0.75), axis=(0, 1))
    ax.plot(x, middle, **look.line())
    ax.fill_between(x, low, high, color=look.color, alpha=0.1, linewidth=0)


if __name__ == "__main__":
    style.main("kl_estimators")
