r"""Assertions for the tests of other projects: that a loss of theirs is the one they mean.

Copy this into a test file of a trainer, put its loss in the place of ``my_trainer.exo_loss``, and run pytest::

    from exo_toy.losses import exo_rw_loss
    from exo_toy.testing import assert_conforms, assert_gradient_targets, assert_sound
    from my_trainer import exo_loss

    SETTINGS = {"beta_pi": 0.1, "beta_r": 0.1}

    def test_the_loss_is_exo():
        assert_conforms(exo_loss, like=exo_rw_loss, settings=SETTINGS)

    def test_it_follows_the_policy_gradient():
        assert_gradient_targets(exo_loss, "KL(policy||optimal)", settings=SETTINGS)

    def test_it_has_no_known_defect():
        assert_sound(exo_loss, settings=SETTINGS)

Parameters without a default are tensors, unless they are in the settings. Temperatures among the settings that the loss
does not take are those that it has, and those of divergences on candidates are found where nobody tells them; a loss
with other keywords is wrapped, as ``lambda log_ratio, rewards: exo_loss(log_ratio, rewards, temperature=0.1)``.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from exo_toy.lab import FINDINGS, NAMED, defects
from exo_toy.lab.binding import examine
from exo_toy.lab.gradients import NONE, UNDECIDED, UNDEFINED, align, candidate_counts
from exo_toy.lab.subject import ASSUMED, ROUNDING, Subject, loss_and_gradients, name_of, probe, shown

# From the plainest to the most extreme, so that the first to fail is the smallest.
SIZES = (0.0, 1.0, 3.0, 10.0, 100.0, 1e4)
DRAWN = 4
# Examples at once, of losses that mix them.
BATCH = 4


def assert_conforms(
    function: Callable[..., Any],
    *,
    like: Callable[..., Any],
    settings: Mapping[str, Any] | None = None,
    like_settings: Mapping[str, Any] | None = None,
    kind: str | None = None,
    dtypes: Collection[torch.dtype] = (torch.float64, torch.float32),
) -> None:
    """Fail unless a loss has the values and the gradients of another one.

    Both get the same log ratios, from 0 to 10,000 in size, and rewards; the first example to differ is the smallest.
    Losses that mix the examples of a batch are compared by their mean over batches of four.

    Args:
        function: a loss per example, see :func:`exo_toy.lab.characterize`.
        like: the loss that it should be, one of :mod:`exo_toy.losses`, say.
        settings: keywords of ``function``.
        like_settings: keywords of ``like``; as ``settings`` where nothing is said.
        kind: which tensors both take, where the signatures do not tell.
        dtypes: of the tensors. Tolerances are relative: 1e-9 in float64, 1e-5 in float32, 2**-9 in float16 and 2**-6 in
            bfloat16, four times one rounding, since half types should be computed in float32.

    Raises:
        AssertionError: they differ; the message has what was wanted, what came, the tolerance and the example.
        ValueError: one of them cannot be called so.

    Example:
        >>> from exo_toy.losses import dpo_loss, ipo_loss
        >>> assert_conforms(dpo_loss, like=dpo_loss, settings={"beta": 0.1})
        >>> assert_conforms(ipo_loss, like=dpo_loss, settings={"beta": 0.1})
        Traceback (most recent call last):
            ...
        AssertionError: ipo_loss is not dpo_loss: its loss in torch.float64
          want       0.69314718056
          have       25
          tolerance  6.9e-10
          at         policy_chosen_logps 0, policy_rejected_logps 0, ref_chosen_logps 0, ref_rejected_logps 0
    """
    settings = dict(settings or {})
    wanted = examine(like, kind=kind, settings=settings if like_settings is None else dict(like_settings))
    subject = examine(function, kind=kind or wanted.kind, settings=settings)
    mixing = [each.name for each in (subject, wanted) if each.batching == "mixed"]
    if len(mixing) == 1:
        text = f"an example's loss in {mixing[0]} depends on the others of its batch"
        raise AssertionError(f"{subject.name} is not {wanted.name}: {text}")
    rows = BATCH if mixing else 1
    for dtype in dtypes:
        for log_ratio, rewards in _examples(wanted, dtype, rows):
            _compare(subject, wanted, log_ratio, rewards)


def assert_gradient_targets(
    function: Callable[..., Any],
    target: str,
    *,
    settings: Mapping[str, Any] | None = None,
    kind: str | None = None,
    tolerance: float = 1e-5,
) -> None:
    r"""Fail unless the expected gradient of a loss on K candidates tends to that of a divergence as K grows.

    Expected gradients are exact, for candidates from the reference; see :func:`exo_toy.lab.characterize`.

    Args:
        function: a loss on log ratios and rewards [B, K].
        target: "KL(policy||optimal)", "KL(optimal||policy)", "JS(policy, optimal)" or "alpha = 0.5", with any number,
            of the tempered policy :math:`\pi_\theta^{\beta_\pi}` and the optimal one :math:`\pi^*_{\beta_r}`.
        settings: its keywords, the temperatures of both policies among them, unless the loss shows these itself, as
            divergences between both do.
        kind: "list" where the signature does not tell.
        tolerance: how far from 1 the cosine may be, in the limit.

    Raises:
        AssertionError: it tends to another one, or none.
        ValueError: an unknown target, or a loss that is not one on lists.

    Example:
        >>> from exo_toy.losses import exo_rw_loss
        >>> betas = {"beta_pi": 0.5, "beta_r": 1.0}
        >>> assert_gradient_targets(exo_rw_loss, "KL(policy||optimal)", settings=betas)
        >>> assert_gradient_targets(exo_rw_loss, "KL(optimal||policy)", settings=betas)
        Traceback (most recent call last):
            ...
        AssertionError: the expected gradient of exo_rw_loss does not tend to that of KL(optimal||policy)
          want       a cosine of 1
          have       0.985
          tolerance  1e-05
          it tends to that of KL(policy||optimal)
    """
    alpha = re.fullmatch(r"alpha\s*=\s*(-?(?:\d+\.?\d*|\.\d+))", target)
    if target not in NAMED and alpha is None:
        raise ValueError(f"target must be one of {', '.join(NAMED)} or 'alpha = ...'; got {target!r}")
    subject = examine(function, kind=kind, settings=dict(settings or {}))
    if subject.kind != "list":
        raise ValueError("function must be a loss on log ratios and rewards [B, K]: pairs have no K that grows")
    alignment = align(subject, candidates=candidate_counts(subject))
    words = {
        NONE: "it tends to that of no divergence known here",
        UNDECIDED: "it cannot be told from so few candidates to which it tends",
        UNDEFINED: "it is NaN or infinite",
    }
    tends = words.get(alignment.target, f"it tends to that of {alignment.target}")
    assumed = [f"{name} = 1" for name, origin in subject.temperatures.items() if origin == ASSUMED]
    if assumed:
        tends += f"; {' and '.join(assumed)} assumed, for it was not told: put it into the settings"
    head = f"the expected gradient of {name_of(function)} does not tend to that of {target}"
    if alpha is not None:
        # What is left of 1/K moves the fitted alpha by some thousandths.
        if abs(float(alpha[1]) - alignment.alpha) > 1e-2 or not alignment.scale > 0:
            raise AssertionError(
                f"{head}\n  want       {target}\n  have       alpha = {alignment.alpha:.2f}\n  {tends}"
            )
        return
    have = alignment.cosines[target][-1]
    if not 1 - have <= tolerance:
        text = f"  want       a cosine of 1\n  have       {have:.3g}\n  tolerance  {tolerance:g}"
        raise AssertionError(f"{head}\n{text}\n  {tends}")


def assert_sound(
    function: Callable[..., Any],
    *,
    settings: Mapping[str, Any] | None = None,
    kind: str | None = None,
    allow: Collection[str] = (),
) -> None:
    """Fail if the laboratory finds a defect in a loss.

    Args:
        function: a loss per example, see :func:`exo_toy.lab.characterize`.
        settings: its keywords.
        kind: which tensors it takes, where its signature does not tell.
        allow: codes of ``exo_toy.lab.FINDINGS`` that are meant.

    Raises:
        AssertionError: with every finding and the smallest input that shows it.
        ValueError: the loss cannot be called so, or there is no such code.

    Example:
        >>> from exo_toy.losses import dpo_loss
        >>> assert_sound(dpo_loss, settings={"beta": 0.1})
    """
    if unknown := sorted(set(allow) - FINDINGS.keys()):
        raise ValueError(f"allow must be among {', '.join(FINDINGS)}; got {', '.join(unknown)}")
    found = defects(function, kind=kind, settings=settings)
    left = [finding for finding in found if finding.code not in allow]
    if left:
        lines = [f"  {f.code}: {f.text}" + (f"\n    at {f.example}" if f.example else "") for f in left]
        raise AssertionError("\n".join([f"{name_of(function)} has {len(left)} defect(s)", *lines]))


def _examples(subject: Subject, dtype: torch.dtype, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Log ratios and rewards of so many examples each: plain, then with more candidates, then larger."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 8) if subject.kind in ("list", "ranked") else (2,)
    for size in SIZES if subject.kind != "reference-free" else SIZES[:4]:
        for n in sizes:
            for _ in range(1 if size == 0 else DRAWN):
                # Whole numbers, which every dtype holds up to the largest.
                log_ratio = (size * torch.randint(-3, 4, (rows, n), generator=generator)).to(dtype)
                rewards = (subject.beta_r * torch.randint(-3, 4, (rows, n), generator=generator)).to(dtype)
                yield log_ratio, rewards


def _compare(subject: Subject, wanted: Subject, log_ratio: Tensor, rewards: Tensor) -> None:
    dtype = log_ratio.dtype
    whole = len(log_ratio) > 1
    results = [loss_and_gradients(each, probe(each, log_ratio, rewards), whole=whole) for each in (subject, wanted)]
    for what, have, want in zip(("loss", "gradient"), *results, strict=True):
        room = ROUNDING[dtype] * want.abs().max().clamp(min=1e-6 if dtype == torch.float64 else 1e-3)
        # Infinities agree where they are equal; NaN nowhere.
        if not bool(((have == want) | ((have - want).abs() <= room)).all()):
            at = int(torch.where(have == want, 0.0, (have - want).abs().nan_to_num(torch.inf)).argmax())
            example = "; ".join(
                shown(wanted, probe(wanted, *pair)) for pair in zip(log_ratio.split(1), rewards.split(1), strict=True)
            )
            raise AssertionError(
                f"{subject.name} is not {wanted.name}: its {what} in {dtype}\n  want       {want[at]:.12g}\n"
                f"  have       {have[at]:.12g}\n  tolerance  {room:.1e}\n  at         {example}"
            )
