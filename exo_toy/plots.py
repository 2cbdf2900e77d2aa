"""The pictures that audit and laboratory hand their user. Needs matplotlib and seaborn, the extra ``figures``."""

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import matplotlib as mpl
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde
from torch import Tensor

from exo_toy.estimators import effective_sample_size, log_density_ratio_over_reward, snis_density_ratio

# Prompts with a panel of their own: as many as the paper shows, and none with too few candidates for a curve.
MOST_PROMPTS, FEWEST_CANDIDATES = 7, 16
COLUMNS, PANEL = 4, (1.9, 2.1)
GRID = 161
MOST_POINTS = 1000
# Ratios below are cut off.
LOWEST = 1e-5
# Label, colour, line, marker.
LOOKS = {
    "optimal": (r"$\pi^*_\beta$", "#000000", "-", "D"),
    "policy": (r"$\pi_\theta$", "#AA4499", "--", "o"),
}
# As of the other figures: the same run gives the same bytes.
METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
    "png": {"Software": None},
}
NOTE = (
    "Lines: ratio of two densities of the reward, by self-normalised importance weights and one Gaussian kernel for "
    "both (Scott's rule), where there are candidates. Bands: pointwise 95 % intervals of this smoothed ratio (delta "
    "method), over the prompts in the panel of all prompts, otherwise over the candidates. Markers: ratio of each "
    "candidate, K at most. Grey: density of the reward under the reference, not to scale. ESS: effective sample size; "
    "in the panel of all prompts its median."
)
RC: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


class Panel(NamedTuple):
    """What one panel shows: tables [X, M] of log weights by name and of rewards."""

    title: str
    log_weights: dict[str, list[Tensor]]
    rewards: list[Tensor]

    @property
    def n_prompts(self) -> int:
        """Of all tables."""
        return sum(map(len, self.rewards))


def density_ratios(
    tables: Sequence[tuple[Sequence[str], Tensor | None, Tensor]], *, beta: float | int, folder: Path
) -> list[Path]:
    r"""Draw the density ratios of the policy and of the optimal one to the reference over the reward.

    A panel for all prompts together, and one each for the prompts with the most candidates.

    Source: Ji et al., arXiv:2402.00856v4, the visualisation of density ratios.

    Args:
        tables: prompts with equally many candidates each: their names, log ratios of the policy
            [X, K] where known, rewards [X, K].
        beta: strength of the KL penalty of the optimal policy, above 0, in the unit of the reward.
        folder: to write ``density_ratio.pdf`` and ``density_ratio.png`` to.

    Returns:
        The files written; none where no prompt's rewards vary.

    Raises:
        ValueError: what :func:`exo_toy.estimators.log_density_ratio_over_reward` refuses.

    Example:
        >>> density_ratios([(["a"], None, torch.zeros(1, 2))], beta=1.0, folder=Path())
        []
    """
    panels = list(_panels(tables, beta))
    if not panels:
        return []
    with theme():
        return save(_draw(panels), folder / "density_ratio")


def theme() -> AbstractContextManager[None]:
    """The settings of all these pictures, inside the block."""
    return mpl.rc_context({**sns.axes_style("whitegrid"), **sns.plotting_context("paper"), **RC})


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure in each format, the same bytes for the same figure.

    Args:
        figure: drawn within :func:`theme`.
        stem: path without a suffix.

    Returns:
        The files written.
    """
    paths = []
    for suffix, metadata in METADATA.items():
        paths.append(stem.with_name(f"{stem.name}.{suffix}"))
        figure.savefig(paths[-1], metadata=metadata)
    return paths


def _panels(tables: Sequence[tuple[Sequence[str], Tensor | None, Tensor]], beta: float) -> Iterator[Panel]:
    """All prompts, where there are several, and then some alone; those with log ratios if there are any."""
    if any(log_ratio is not None for _, log_ratio, _ in tables):
        tables = [table for table in tables if table[1] is not None]
    everything = Panel("", {name: [] for name in LOOKS}, [])
    for _, log_ratio, rewards in tables:
        everything.rewards.append(rewards)
        everything.log_weights["optimal"].append(rewards / beta)
        if log_ratio is not None:
            everything.log_weights["policy"].append(log_ratio)
    if everything.n_prompts > 1 and _varies(torch.cat([rewards.flatten() for rewards in everything.rewards])):
        yield everything._replace(title=f"all {everything.n_prompts} prompts")
    alone = [table for table in tables if everything.n_prompts == 1 or table[2].shape[-1] >= FEWEST_CANDIDATES]
    # The sort is stable: of equally many candidates the first in the file.
    alone.sort(key=lambda table: -table[2].shape[-1])
    rows = ((*table, row) for table in alone for row in range(len(table[2])) if _varies(table[2][row]))
    for names, log_ratio, rewards, row in itertools.islice(rows, MOST_PROMPTS):
        own = rewards[row : row + 1]
        log_weights = {"policy": [] if log_ratio is None else [log_ratio[row : row + 1]], "optimal": [own / beta]}
        yield Panel(f"{names[row]}, K = {own.shape[-1]}", log_weights, [own])


def _varies(rewards: Tensor) -> bool:
    """Whether a kernel density of the rewards exists, in float64 as well."""
    return bool(rewards.std() > 1e-9 * rewards.abs().max())


def _draw(panels: Sequence[Panel]) -> Figure:
    n_columns = min(COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(max(PANEL[0] * n_columns + 0.6, 4.0), PANEL[1] * n_rows + 1.2))
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(ax, panel)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel(r"density ratio $\rho = \pi/\pi_\mathrm{ref}$")
    low, high = axes.flat[0].get_ylim()
    axes.flat[0].set_ylim(max(low, LOWEST), high)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    # So many characters of six points fit in an inch.
    note = textwrap.fill(NOTE, int(figure.get_figwidth() * 22))
    figure.supxlabel(note, fontsize=6, x=0.01, ha="left")
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    rewards = torch.cat([table.flatten() for table in panel.rewards])
    reference = gaussian_kde(rewards.numpy())
    bandwidth = float(np.sqrt(reference.covariance[0, 0]))
    grid = np.linspace(float(rewards.min()) - bandwidth, float(rewards.max()) + bandwidth, GRID)
    density = reference(grid)
    # Heights in parts of the panel: the axis is that of the ratios.
    ax.fill_between(grid, 0.25 * density / density.max(), color="0.85", linewidth=0, transform=ax.get_xaxis_transform())
    # In kernels at their centre: one candidate alone gives exp(-2) at two bandwidths from it.
    kernels = density * len(rewards) * bandwidth * math.sqrt(2 * math.pi)
    far = torch.from_numpy(kernels < math.exp(-2))
    sizes = []
    for name, (label, color, linestyle, marker) in LOOKS.items():
        log_weights = panel.log_weights[name]
        if not log_weights:
            continue
        estimate = log_density_ratio_over_reward(
            log_weights, panel.rewards, torch.from_numpy(grid), bandwidth=bandwidth
        )
        curves = [curve.exp().masked_fill(far, torch.nan).numpy() for curve in (estimate.value, *estimate.interval())]
        value, low, high = curves
        ax.plot(grid, value, color=color, linestyle=linestyle, label=label)
        ax.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)
        if panel.n_prompts == 1 and len(rewards) <= MOST_POINTS:
            ratio = snis_density_ratio(log_weights[0])[0]
            ax.plot(rewards, ratio, marker, color=color, markersize=2.5, markerfacecolor="none", markeredgewidth=0.6)
        size = torch.cat([effective_sample_size(table) for table in log_weights]).median()
        sizes.append(f"{label} {size:.3g}")
    ax.set(yscale="log", xlabel="reward $r$")
    ax.set_title(panel.title, fontsize=8)
    ax.text(0.04, 0.96, "ESS\n" + "\n".join(sizes), transform=ax.transAxes, va="top", fontsize=6)


@runtime_checkable
class LossReport(Protocol):
    """What :func:`loss_page` reads of a report of the laboratory."""

    @property
    def name(self) -> str:
        """Of the loss."""

    @property
    def kind(self) -> str:
        """Which tensors it takes."""

    @property
    def equals(self) -> tuple[str, ...]:
        """Known losses that it equals."""

    @property
    def alignment(self) -> Any:
        """Cosines and biases of expected gradients by number of candidates, or None."""

    @property
    def optima(self) -> Any:
        """Minimisers over full tables."""

    @property
    def capacities(self) -> Any:
        """Minimisers in a family with one mode."""

    @property
    def curve(self) -> Any:
        """Loss and gradient weight against the margin."""

    @property
    def unchanged_by(self) -> Any:
        """What leaves the loss as it is."""

    @property
    def findings(self) -> Any:
        """Defects."""


# The order-blind sequence of a colour-blind safe palette, with lines that stay apart in grey.
SERIES = (("#332288", "-", "o"), ("#CC6677", "--", "s"), ("#117733", "-.", "^"), ("#DDCC77", ":", "D"))
# Losses and weights beyond this are drawn on a logarithmic axis.
LINEAR = 100.0
# Characters of the findings in a line, and findings that a panel has room for.
WIDTH, MOST_FINDINGS = 58, 6


def loss_page(report: LossReport, path: Path) -> Path:
    """Draw a loss as the laboratory found it, on one page.

    For losses on lists, how far its expected gradient is from those of divergences as K grows, in direction and, if it
    tends to one, in size. For all, loss and gradient weight against the margin, the optimum over full tables beside
    pi*, where a family with one mode puts its mass, and what was found wrong.

    Args:
        report: of :func:`exo_toy.lab.characterize`.
        path: to write to; its suffix is the format.

    Returns:
        The path.

    Raises:
        OSError: it cannot be written.
        ValueError: a suffix that stands for no format.

    Example:
        >>> from exo_toy.losses import dpo_loss
        >>> from exo_toy.lab import characterize
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loss_page(characterize(dpo_loss, settings={"beta": 0.5}), Path(folder) / "dpo.png").name
        'dpo.png'
    """
    with theme():
        n_columns = 2 if report.alignment is None else 3
        figure = Figure(figsize=(3.3 * n_columns, 5.6))
        (*above, last), below = figure.subplots(2, n_columns)
        if report.alignment is not None:
            _draw_alignment(above[0], report.alignment)
            _draw_bias(above[1], report.alignment)
            _draw_curve(last, report.curve)
        else:
            _draw_curve(above[0], report.curve)
            below = [last, *below]
        _draw_optimum(below[0], report.optima[-1])
        _draw_capacities(below[1], report.capacities)
        _write_findings(below[2], report)
        for ax in figure.axes:
            ax.xaxis.label.set_fontsize(8)
            ax.yaxis.label.set_fontsize(8)
            ax.tick_params(labelsize=7)
        equal = f", equal to {', '.join(report.equals)}" if report.equals else ""
        title = f"{report.name}: a loss of kind '{report.kind}'{equal}"
        figure.suptitle(textwrap.fill(title, 50 * n_columns), fontsize=9)
        figure.savefig(path, metadata=METADATA.get(path.suffix.removeprefix(".")))
    return path


def _draw_alignment(ax: Axes, alignment: Any) -> None:
    if alignment.target == "undefined":
        ax.set_axis_off()
        ax.text(0.5, 0.5, "the expected gradient is undefined:\nit has NaN", ha="center", fontsize=8)
        return
    for (name, cosines), (color, linestyle, marker) in zip(alignment.cosines.items(), SERIES, strict=True):
        off = [max(1 - cosine, 1e-12) for cosine in cosines[:-1]]
        ax.plot(alignment.candidates, off, color=color, linestyle=linestyle, marker=marker, markersize=3, label=name)
    _candidates_axis(ax, alignment)
    ax.set_ylabel("1 - cosine with the gradient of")
    target = "none of these" if alignment.target == "none" else alignment.target
    ax.set_title(f"Expected gradient tends to: {target}", fontsize=8)
    ax.legend(fontsize=6)


def _draw_bias(ax: Axes, alignment: Any) -> None:
    if not alignment.bias:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no bias: no divergence is known\nthat the gradient tends to", ha="center", fontsize=8)
        return
    sides = (("gradient, relative", alignment.bias), ("value (nats)", alignment.value_bias))
    for (label, bias), (color, linestyle, marker) in zip(sides, SERIES, strict=False):
        ax.plot(alignment.candidates, bias, color=color, linestyle=linestyle, marker=marker, markersize=3, label=label)
    _candidates_axis(ax, alignment)
    ax.set_ylabel("largest over four policies")
    ax.set_title(f"Bias of the expected loss, which tends to {alignment.scale:.3g} times that", fontsize=8)
    ax.legend(fontsize=6)


def _candidates_axis(ax: Axes, alignment: Any) -> None:
    ax.set(xscale="log", yscale="log", xlabel="candidates $K$")
    ax.set_xticks(alignment.candidates, [str(k) for k in alignment.candidates])
    ax.minorticks_off()
    # Whole decades, so that there are ticks.
    low, high = (math.log10(limit) for limit in ax.get_ylim())
    ax.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))


def _draw_curve(ax: Axes, curve: Any) -> None:
    sides = (("loss (nats)", curve.losses), ("minus its derivative", curve.weight))
    for (label, values), (color, linestyle, _) in zip(sides, SERIES, strict=False):
        ax.plot(curve.margin.numpy(), values.numpy(), color=color, linestyle=linestyle, label=label)
    if max(float(values.abs().max()) for _, values in sides) > LINEAR:
        ax.set_yscale("symlog", linthresh=1.0)
    ax.set_xlabel(r"margin $\beta\Delta$ of a pair (nats), the first preferred")
    ax.set_title("Loss of a pair and gradient weight", fontsize=8)
    ax.legend(fontsize=6)


def _draw_optimum(ax: Axes, optimum: Any) -> None:
    places = np.arange(len(optimum.log_pi))
    reached = "where the loss leads to" if optimum.verdict == "unbounded" else "minimiser of the loss"
    for shift, log_p, label, name in (
        (-0.2, optimum.log_pi_star, r"optimal policy $\pi^*_\beta$", "optimal"),
        (0.2, optimum.log_pi, reached, "policy"),
    ):
        ax.bar(places + shift, log_p.exp().numpy(), 0.4, color=LOOKS[name][1], label=label)
    ax.set(xlabel="completion", ylabel="probability", xticks=places)
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
    ax.set_title(f"Optimum over full tables, K = {optimum.k}: {optimum.verdict}", fontsize=8)
    ax.legend(fontsize=6, loc="upper left")


def _draw_capacities(ax: Axes, capacities: Any) -> None:
    places = np.arange(3)
    width = 0.8 / len(capacities)
    for i, (found, (color, _, _)) in enumerate(zip(capacities, SERIES, strict=False)):
        ax.bar(
            places + (i - (len(capacities) - 1) / 2) * width, found.masses, width, color=color, label=f"K = {found.k}"
        )
    ax.set_xticks(places, ["first mode", "between", "second mode"])
    ax.set(ylabel="probability", ylim=(0, 1.15))
    ax.set_title("Two modes, a family that holds one", fontsize=8)
    ax.legend(fontsize=6, loc="upper left")


def _write_findings(ax: Axes, report: LossReport) -> None:
    ax.set_axis_off()
    found = [
        f"• {finding.code}: {finding.text}" + (f", at {finding.example}" if finding.example else "")
        for finding in report.findings
    ]
    left = [f"and {len(found) - MOST_FINDINGS} more"] if len(found) > MOST_FINDINGS else []
    paragraphs = ["Found wrong:" if found else "Nothing found wrong.", *found[:MOST_FINDINGS], *left, ""]
    for head, wanted in (("Unchanged by:", True), ("Changed by:", False)):
        what = [what for what, unchanged in report.unchanged_by.items() if unchanged is wanted]
        paragraphs += [head, *(f"• {each}" for each in what)] if what else []
    lines = [textwrap.fill(text, WIDTH, subsequent_indent="   ", max_lines=4, placeholder=" …") for text in paragraphs]
    # No mathematics: a dollar sign would begin some.
    ax.text(0.0, 1.0, "\n".join(lines).replace("$", r"\$"), transform=ax.transAxes, va="top", fontsize=6.5)
