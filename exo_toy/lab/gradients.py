"""Which divergence's gradient the exact expected gradient of a loss on K candidates tends to."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.optimize
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from exo_toy.divergences import alpha_divergence, jensen_shannon, kl_divergence
from exo_toy.lab.draws import draws, expected_loss
from exo_toy.lab.optimum import of_kind
from exo_toy.lab.subject import Scene, Subject
from exo_toy.targets import optimal_policy, tempered_policy

Divergence = Callable[[Tensor, Tensor], Tensor]
NAMED: dict[str, Divergence] = {
    "KL(policy||optimal)": kl_divergence,
    "KL(optimal||policy)": lambda log_p, log_q: kl_divergence(log_q, log_p),
    "JS(policy, optimal)": jensen_shannon,
}
# Nothing fits, these K are too few to tell, or there is NaN among the expected gradients.
NONE, UNDECIDED, UNDEFINED = "none", "undecided", "undefined"
# Of tuples, where their order matters, there are many.
FEW, MANY = (2, 4, 8), (2, 4, 8, 16, 32, 64)
# One minus the cosine up to which directions count as one.
ALIGNED = 1e-6
# And beyond which no further K would make them one.
NEAR = 0.1
LISTED = Scene(
    torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64).log(),
    torch.tensor([0.0, 1.7, 0.8], dtype=torch.float64),
    torch.tensor([1, 1, 1]),
)
# Where gradients are compared, one policy a row; none at the reference, all far from pi*.
POLICIES = torch.tensor(
    [[0.7, 0.2, 0.1], [0.1, 0.15, 0.75], [0.5, 0.05, 0.45], [0.15, 0.8, 0.05]], dtype=torch.float64
).log()


@dataclass(frozen=True)
class Alignment:
    """How the expected gradient of a loss turns as K grows.

    Attributes:
        target: the divergence whose gradient it tends to: a name of ``NAMED``, "alpha = ...", "none",
            "undecided" where the limit cannot be told from these K as closely as one fits, or "undefined" where it
            is not finite.
        alpha: of the alpha-divergence that fits best; 1 is KL(policy||optimal), 0 is KL(optimal||policy).
        scale: expected gradient over the target's, in the limit; NaN without one.
        candidates: the K.
        cosines: per divergence and K, the smallest over the policies; the last entry is the limit.
        at_reference: per K, the cosine with KL(policy||optimal) where the policy is the reference.
        bias: per K, the norm of expected gradient less target, over the target's, largest over the policies.
        value_bias: per K, the same of the values, relative to that at the first policy, in nats.
    """

    target: str
    alpha: float
    scale: float
    candidates: tuple[int, ...]
    cosines: dict[str, tuple[float, ...]]
    at_reference: tuple[float, ...]
    bias: tuple[float, ...]
    value_bias: tuple[float, ...]


def candidate_counts(subject: Subject) -> tuple[int, ...]:
    """The K at which a loss on lists is examined."""
    return FEW if subject.ordered else MANY


def align(subject: Subject, *, candidates: Sequence[int], on_step: Callable[[str], None] = lambda _: None) -> Alignment:
    """Compare exact expected gradients by the logits of a full table with those of the divergences."""
    scene = of_kind(subject, LISTED)
    log_ratio = (POLICIES - scene.log_ref) / subject.beta_pi
    policies = (scene.log_ref + torch.cat([log_ratio, torch.zeros_like(log_ratio[:1])])).log_softmax(-1)
    results = []
    for k in candidates:
        on_step(f"expected gradients, K = {k}")
        results.append(expected(subject, scene, policies, k))
    values, gradients = (torch.stack(parts) / subject.size for parts in zip(*results, strict=True))
    limit = extrapolated(gradients)
    away = torch.cat([gradients, limit[None]])[:, :-1]

    def cosines(divergence: Divergence) -> Tensor:
        return cosine_similarity(away, target_gradients(subject, scene, policies, divergence)[1][:-1], dim=-1)

    table = {name: tuple(cosines(divergence).min(-1).values.tolist()) for name, divergence in NAMED.items()}

    def misfit(alpha: float) -> float:
        return 1 - cosines(_alpha(alpha))[-1].min().item()

    grid = [i / 2 for i in range(-4, 7)]
    around = min(grid, key=misfit)
    bounds = (around - 0.5, around + 0.5)
    alpha = float(scipy.optimize.minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)
    fitted = f"alpha = {round(alpha, 2) + 0.0:.2f}"
    table[fitted] = tuple(cosines(_alpha(alpha)).min(-1).values.tolist())
    target = max(NAMED, key=lambda name: table[name][-1])
    if 1 - table[target][-1] > ALIGNED:
        target = fitted if 1 - table[fitted][-1] <= ALIGNED else NONE
    if not limit.isfinite().all():
        target = UNDEFINED
    if target == NONE:
        # What the limit still moves by as the last K is added, which two do not show.
        earlier = extrapolated(gradients[:-1]) if len(candidates) > 2 else torch.zeros_like(limit)
        moved = 1 - cosine_similarity(earlier, limit, dim=-1)[:-1].min().item()
        target = UNDECIDED if min(1 - cosines[-1] for cosines in table.values()) <= min(moved, NEAR) else NONE
    reference = target_gradients(subject, scene, policies, kl_divergence)[1][-1]
    at_reference = tuple(cosine_similarity(gradients[:, -1], reference, dim=-1).tolist())
    scale, bias, value_bias = math.nan, (), ()
    if target not in (NONE, UNDECIDED, UNDEFINED):
        divergence = NAMED.get(target, _alpha(alpha))
        wanted_values, wanted = target_gradients(subject, scene, policies, divergence)
        scale = float((limit * wanted).sum() / wanted.square().sum())
        off = (gradients / scale - wanted)[:, :-1].norm(dim=-1) / wanted[:-1].norm(dim=-1)
        bias = tuple(off.max(-1).values.tolist())
        drop = (values - values[:, :1]) / scale - (wanted_values - wanted_values[0])
        value_bias = tuple(drop.abs().max(-1).values.tolist())
    return Alignment(target, alpha, scale * subject.size, tuple(candidates), table, at_reference, bias, value_bias)


def expected(subject: Subject, scene: Scene, policies: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact expected losses [P] of policies [P, N] on K candidates, and gradients [P, N] by their logits."""
    index, weight = draws(subject.kind, scene, k, ordered=subject.ordered)
    values, gradients = [], []
    for policy in policies:
        logits = policy.clone().requires_grad_()
        value = expected_loss(subject, scene, logits.log_softmax(-1), index, weight)
        gradients.append(torch.autograd.grad(value, logits)[0])
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


def target_gradients(subject: Subject, scene: Scene, policies: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence of each tempered policy from the optimal one [P], and gradients [P, N] by the logits."""
    logits = policies.clone().requires_grad_()
    log_pi_star = optimal_policy(scene.log_ref, scene.reward, beta=subject.beta_r)[0].expand_as(policies)
    log_ref = scene.log_ref.expand_as(policies)
    tempered = tempered_policy(logits.log_softmax(-1), log_ref, beta_pi=subject.beta_pi)
    values = divergence(tempered, log_pi_star)
    return values.detach(), torch.autograd.grad(values.sum(), logits)[0]


def extrapolated(gradients: Tensor) -> Tensor:
    """The limit of a series in 1/K from its values at K, 2K, 4K ..., along the first dimension: Richardson's."""
    terms = list(gradients[-5:])
    for order in range(1, len(terms)):
        terms = [(2**order * after - before) / (2**order - 1) for before, after in itertools.pairwise(terms)]
    return terms[0]


def _alpha(alpha: float) -> Divergence:
    return lambda log_p, log_q: alpha_divergence(log_p, log_q, alpha=alpha)
