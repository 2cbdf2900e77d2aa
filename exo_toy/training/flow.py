"""The gradient flow of an exact objective: descent with steps so small that their size no longer matters."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.integrate
import scipy.optimize
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from exo_toy import checks
from exo_toy.policies import KGramPolicy
from exo_toy.spaces import SequenceSpace

METRICS = ("euclidean", "natural")
# A flow has no last moment: what ends it is how far it came.
FOREVER = 1e15


@dataclass(frozen=True)
class Flow:
    """Where a flow stood when its clock first passed each level, and where it was left.

    ``parameters`` is NaN at a level that was not reached. At the ``end`` the clock showed ``clock``, and the velocity
    was ``speed`` times that of the start.
    """

    parameters: Float64[Tensor, "L P"]
    end: Float64[Tensor, " P"]
    clock: float
    speed: float


def gradient_flow(
    policy: KGramPolicy,
    objective: Callable[[Tensor], Tensor],
    clock: Callable[[Tensor], Tensor],
    levels: Sequence[float],
    *,
    metric: str,
    rtol: float = 1e-6,
    still: float = 1e-6,
) -> Flow:
    r"""Follow the gradient flow of an objective from where a policy stands, noting where a clock passes given levels.

    .. math:: \frac{d\theta}{dt} = -G(\theta)^{+} \, \nabla_\theta \, \mathrm{objective}(\log \pi_\theta)

    with G the identity ("euclidean": gradient descent on the logits, whose path depends on how the policy is
    parametrised) or the Fisher information ("natural": the steepest descent per nat of KL, whose path does not).

    Source: Amari, Natural gradient works efficiently in learning, 1998; the solver is LSODA (Petzold, 1983), which
    changes to an implicit method where the flow is stiff.

    Args:
        policy: k-gram, any number of prompts; its parameters are set to the end.
        objective: ``log_pi`` [X, N] -> scalar, differentiable.
        clock: ``log_pi`` [X, N] -> scalar, continuous.
        levels: of the clock, ascending, above what it shows at the start. The flow is left after the last.
        metric: "euclidean" or "natural".
        rtol: the solver's tolerance per step, relative to a parameter or to 1, whichever is larger; in (0, 0.01).
        still: the flow is left where its speed has fallen below this share of the start's; in (0, 1).

    Returns:
        Flow.

    Raises:
        ValueError: an argument out of range, or a gradient that is 0 or not finite at the start.
        RuntimeError: the solver failed.

    Example:
        >>> from exo_toy.divergences import kl_divergence
        >>> from exo_toy.spaces import SequenceSpace
        >>> policy, target = KGramPolicy(SequenceSpace(2, 1), 0), torch.tensor([[0.2, 0.8]]).double().log()
        >>> towards = lambda log_pi: kl_divergence(log_pi, target).sum()
        >>> flow = gradient_flow(policy, towards, lambda log_pi: log_pi[0, 1].exp(), [0.7, 0.9], metric="natural")
        >>> flow.parameters.softmax(-1)[0], flow.parameters[1].isnan().all().item(), round(flow.clock, 4)
        (tensor([0.3000, 0.7000], dtype=torch.float64), True, 0.8)
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be 'euclidean' or 'natural'; got {metric!r}")
    checks.require_real("rtol", rtol, allowed="in (0, 0.01)", low=0.0, high=0.01)
    checks.require_real("still", still, allowed="in (0, 1)", low=0.0, high=1.0)
    parameters = list(policy.parameters())
    start = parameters_to_vector(parameters).detach().numpy().copy()

    def shown(vector: np.ndarray) -> float:
        vector_to_parameters(torch.from_numpy(vector), parameters)
        with torch.no_grad():
            return clock(policy.log_probs()).item()

    if not all(low < high for low, high in zip([shown(start), *levels], levels, strict=False)) or not levels:
        raise ValueError(f"levels must ascend from above the clock's start, {shown(start):.6g}; got {list(levels)}")

    def downhill(vector: np.ndarray) -> np.ndarray:
        vector_to_parameters(torch.from_numpy(vector.copy()), parameters)
        slopes = list(torch.autograd.grad(objective(policy.log_probs()), parameters))
        if metric == "natural":
            slopes = natural_gradient(policy, slopes)
        return -parameters_to_vector(slopes).numpy()

    first = float(np.linalg.norm(downhill(start)))
    if not 0 < first < math.inf:
        raise ValueError(f"objective must have a finite gradient other than 0 at the start; got one of length {first}")
    speed = 1.0

    def velocity(_: float, vector: np.ndarray) -> np.ndarray:
        nonlocal speed
        found = downhill(vector) / first
        speed = float(np.linalg.norm(found))
        return found

    solver = scipy.integrate.LSODA(velocity, 0.0, start, FOREVER, rtol=rtol, atol=rtol)
    found = np.full((len(levels), len(start)), np.nan)
    now, passed = shown(start), 0
    while passed < len(levels) and speed > still:
        message = solver.step()
        if solver.status == "failed":
            raise RuntimeError(f"the flow could not be followed: {message}")
        now = shown(solver.y)
        while passed < len(levels) and now >= levels[passed]:
            found[passed] = _where(solver, shown, levels[passed])
            passed += 1
    vector_to_parameters(torch.from_numpy(solver.y.copy()), parameters)
    return Flow(torch.from_numpy(found), torch.from_numpy(solver.y.copy()), now, speed)


def _where(solver: scipy.integrate.LSODA, shown: Callable[[np.ndarray], float], level: float) -> np.ndarray:
    """The state within the last step at which the clock shows a level."""
    between = solver.dense_output()
    at = scipy.optimize.brentq(lambda t: shown(between(t)) - level, solver.t_old, solver.t, xtol=1e-300)
    state: np.ndarray = between(at)
    return state


@torch.no_grad()
def choices(policy: KGramPolicy) -> list[Float64[Tensor, "X _ V"]]:
    r"""How often each token is chosen in each context: the expected count per completion, for every logit.

    .. math:: m_t(c, a) = P(\text{context } c \text{ at position } t) \; \pi(a \mid c)

    Args:
        policy: k-gram, over a space that can be enumerated.

    Returns:
        Tensors like ``policy.logits``, in [0, 1]; those of a position sum to the probability that it is reached.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> choices(KGramPolicy(SequenceSpace(2, 2), 1))[1].tolist()
        [[[0.25, 0.25], [0.25, 0.25]]]
    """
    p = policy.log_probs().exp()
    places, counted = _places(policy.space, policy.order)
    return [
        torch.zeros_like(logits).flatten(1).index_add_(1, place, p * counts).view_as(logits)
        for logits, place, counts in zip(policy.logits, places, counted, strict=True)
    ]


@functools.lru_cache(maxsize=8)
def _places(space: SequenceSpace, order: int) -> tuple[Tensor, Tensor]:
    """Of every completion, by position: the place of its token in the flattened logits, and whether it counts; [T, N].

    A flow asks for them at every step.
    """
    tokens = space.tokens()
    counted = space.counted(tokens)
    places = space.contexts(tokens, order=order) * space.vocab_size + tokens
    return torch.where(counted, places, 0).T.contiguous(), counted.T.contiguous()


def natural_gradient(
    policy: KGramPolicy, gradient: Sequence[Float64[Tensor, "X _ V"]]
) -> list[Float64[Tensor, "X _ V"]]:
    r"""The Fisher information's pseudo-inverse times a gradient with respect to the logits.

    The information of a k-gram policy is one block per context, :math:`P(c) (\mathrm{diag}\,\pi_c - \pi_c \pi_c^T)`,
    so that with m of :func:`choices`

    .. math:: (G^{+} g)(c, a) = \frac{g(c, a)}{m(c, a)} - \frac1V \sum_b \frac{g(c, b)}{m(c, b)}

    Source: Kakade, A Natural Policy Gradient, 2001, for a table of conditionals.

    Args:
        policy: k-gram, every token of positive probability.
        gradient: like ``policy.logits``, of sum 0 in each context, as is every gradient through a softmax.

    Returns:
        Tensors like ``policy.logits``, of sum 0 in each context.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> natural_gradient(KGramPolicy(SequenceSpace(2, 1), 0), [torch.tensor([[[0.25, -0.25]]]).double()])
        [tensor([[[ 0.5000, -0.5000]]], dtype=torch.float64)]
    """
    scaled = [slope / chosen for slope, chosen in zip(gradient, choices(policy), strict=True)]
    return [slope - slope.mean(-1, keepdim=True) for slope in scaled]


def squared_length(policy: KGramPolicy, step: Sequence[Float64[Tensor, "X _ V"]]) -> float:
    r"""The length of a step in the metric of the Fisher information, squared: twice the KL that a small step makes.

    .. math:: u^T G u = \sum_{t, c} P(c) \, \mathrm{Var}_{a \sim \pi(\cdot \mid c)} \, u_t(c, a)

    Args:
        policy: k-gram.
        step: like ``policy.logits``.

    Returns:
        At least 0, summed over prompts; 0 where the step changes no probability.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> squared_length(KGramPolicy(SequenceSpace(2, 1), 0), [torch.tensor([[[1.0, -1.0]]]).double()])
        1.0
    """
    square = 0.0
    for slope, chosen in zip(step, choices(policy), strict=True):
        # An unreached context has no mean, and no weight.
        mean = (chosen * slope).sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True).clamp(min=1e-300)
        square += (chosen * (slope - mean) ** 2).sum().item()
    return square
