"""Gradient flows against closed forms, against Euler's method, and the Fisher information against plain sums."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from exo_toy.divergences import kl_divergence
from exo_toy.finite_k import expected_exo_rw_loss
from exo_toy.policies import KGramPolicy, closest_kgram
from exo_toy.spaces import SequenceSpace
from exo_toy.training.flow import choices, gradient_flow, natural_gradient, squared_length

RTOL = 1e-8
# Local errors of some hundred steps, each below rtol, may add up.
GLOBAL = 300 * RTOL


def drawn(space: SequenceSpace, order: int, seed: int = 0, scale: float = 1.0) -> KGramPolicy:
    policy = KGramPolicy(space, order)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in policy.parameters():
            logits.copy_(scale * torch.randn(logits.shape, generator=generator, dtype=logits.dtype))
    return policy


def test_natural_flow_of_one_divergence_is_straight_in_probabilities():
    """Of KL(pi*||pi), for independent positions: every marginal goes straight to pi*'s, all at one pace."""
    space = SequenceSpace(3, 2)
    policy, target = drawn(space, 0), torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = target.log_softmax(-1)
    start = [logits.detach().softmax(-1)[0, 0] for logits in policy.logits]
    wanted = [logits.detach().softmax(-1)[0, 0] for logits in closest_kgram(space, target, 0).logits]
    before = kl_divergence(target, policy.log_probs()).item()

    def fallen(log_pi):
        return before - kl_divergence(target, log_pi).sum()

    levels = [0.1 * before, 0.3 * before]
    flow = gradient_flow(policy, lambda log_pi: -fallen(log_pi), fallen, levels, metric="natural", rtol=RTOL)
    for level, parameters in zip(levels, flow.parameters, strict=True):
        vector_to_parameters(parameters, policy.parameters())
        assert fallen(policy.log_probs()).item() == pytest.approx(level, abs=1e-12)
        left = []
        for logits, first, last in zip(policy.logits, start, wanted, strict=True):
            left += ((logits.detach().softmax(-1)[0, 0] - last) / (first - last)).tolist()
        assert left == pytest.approx([left[0]] * 6, rel=100 * GLOBAL)
        assert 0 < left[0] < 1


def test_natural_flow_of_the_other_divergence_is_straight_in_log_probabilities():
    """Of KL(pi||pi*), for a full table."""
    space = SequenceSpace(4, 1)
    policy, target = drawn(space, 0), torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log()
    first = policy.log_probs().detach()[0] - target
    clock = lambda log_pi: (log_pi.exp() * torch.arange(4.0)).sum()  # noqa: E731
    start = clock(policy.log_probs()).item()
    flow = gradient_flow(
        policy,
        lambda log_pi: kl_divergence(log_pi, target).sum(),
        clock,
        [start + 0.3 * (2.0 - start), start + 0.7 * (2.0 - start)],
        metric="natural",
        rtol=RTOL,
    )
    shares = []
    for parameters in flow.parameters:
        left = parameters.log_softmax(-1) - target
        ratios = (left - left.mean()) / (first - first.mean())
        assert ratios.tolist() == pytest.approx([ratios[0].item()] * 4, rel=100 * GLOBAL)
        shares.append(ratios[0].item())
    assert 1 > shares[0] > shares[1] > 0


@pytest.mark.parametrize("metric", ["euclidean", "natural"])
def test_flow_is_the_limit_of_small_steps(metric):
    """Euler's method with two step sizes, extrapolated; the error is judged by a third."""
    space = SequenceSpace(2, 3)
    log_ref = torch.full((8,), -math.log(8), dtype=torch.float64)
    reward = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def objective(log_pi):
        return expected_exo_rw_loss(log_pi, log_ref, reward, k=3, beta_pi=1.0, beta_r=0.5).sum()

    def clock(log_pi):
        return kl_divergence(log_pi, log_ref).sum()

    level = 0.05
    flow = gradient_flow(KGramPolicy(space, 1), objective, clock, [level], metric=metric, rtol=RTOL)

    def euler(step):
        policy = KGramPolicy(space, 1)
        shown, before = 0.0, None
        while shown < level:
            before = (shown, parameters_to_vector(policy.parameters()).detach().clone())
            slopes = list(torch.autograd.grad(objective(policy.log_probs()), list(policy.parameters())))
            slopes = natural_gradient(policy, slopes) if metric == "natural" else slopes
            with torch.no_grad():
                for logits, slope in zip(policy.parameters(), slopes, strict=True):
                    logits -= step * slope
            shown = clock(policy.log_probs()).item()
        # The clock is quadratic near the start: its root is linear within the step.
        share = (math.sqrt(level) - math.sqrt(before[0])) / (math.sqrt(shown) - math.sqrt(before[0]))
        return before[1] + share * (parameters_to_vector(policy.parameters()).detach() - before[1])

    step = 0.1 if metric == "euclidean" else 0.02
    coarse, middle, fine = euler(step), euler(step / 2), euler(step / 4)
    once, twice = 2 * middle - coarse, 2 * fine - middle
    error = (twice - once).abs().max().item()
    assert error < (fine - middle).abs().max().item() / 2
    assert (flow.parameters[0] - twice).abs().max().item() < 2 * error + GLOBAL


def test_level_out_of_reach():
    space = SequenceSpace(3, 2)
    target = drawn(space, 0, seed=4, scale=0.5).log_probs().detach()[0]
    policy = KGramPolicy(space, 0)
    reference = policy.log_probs().detach()[0]
    distance = kl_divergence(target, reference).item()

    def clock(log_pi):
        return kl_divergence(log_pi, reference).sum()

    levels = [distance / 2, 2 * distance]
    towards = lambda log_pi: kl_divergence(log_pi, target).sum()  # noqa: E731
    flow = gradient_flow(policy, towards, clock, levels, metric="euclidean")
    assert flow.parameters.isnan().all(-1).tolist() == [False, True]
    assert flow.speed <= 1e-6
    assert flow.clock == pytest.approx(distance, rel=1e-5)
    assert torch.equal(parameters_to_vector(policy.parameters()), flow.end)


@pytest.mark.parametrize(("space", "order"), [(SequenceSpace(3, 3), 1), (SequenceSpace(3, 3, eos=1), 1)])
def test_choices_are_plain_sums(space, order):
    policy = drawn(space, order)
    p = policy.log_probs().detach().exp()[0].tolist()
    live = [token for token in range(3) if token != space.eos]
    wanted = {}
    for probability, tokens in zip(p, space.tokens().tolist(), strict=True):
        for t, token in enumerate(tokens):
            context = live.index(tokens[t - 1]) if t else 0
            wanted[t, context, token] = wanted.get((t, context, token), 0.0) + probability
            if token == space.eos:
                break
    for t, table in enumerate(choices(policy)):
        for context, token in itertools.product(range(table.shape[1]), range(3)):
            assert table[0, context, token].item() == pytest.approx(wanted[t, context, token], rel=1e-12)


@pytest.mark.parametrize("eos", [None, 0])
def test_natural_gradient_is_the_pseudo_inverse(eos):
    space = SequenceSpace(3, 3, eos=eos)
    policy = drawn(space, 1)
    parameters = list(policy.parameters())
    log_pi = policy.log_probs()[0]
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in log_pi]
    scores = torch.stack([parameters_to_vector(row) for row in rows])
    fisher = scores.T @ (log_pi.detach().exp()[:, None] * scores)
    gradient = torch.autograd.grad((log_pi.exp() * torch.arange(float(space.size))).sum(), parameters)
    wanted = torch.linalg.pinv(fisher, rtol=1e-10, hermitian=True) @ parameters_to_vector(gradient)
    found = natural_gradient(policy, gradient)
    assert np.abs((parameters_to_vector(found) - wanted).numpy()).max() < 1e-9 * wanted.abs().max().item()
    step = parameters_to_vector(gradient)
    assert squared_length(policy, gradient) == pytest.approx((step @ fisher @ step).item(), rel=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "fisher"}, "metric must be"),
        ({"rtol": 0.0}, "rtol must be in"),
        ({"still": 1.0}, "still must be in"),
        ({"levels": []}, "levels must ascend"),
        ({"levels": [0.2, 0.1]}, "levels must ascend"),
        ({"levels": [0.0]}, "levels must ascend"),
        ({"objective": lambda log_pi: 0.0 * log_pi.sum()}, "objective must have a finite gradient"),
    ],
)
def test_errors(change, message):
    policy = KGramPolicy(SequenceSpace(2, 1), 0)
    options = {
        "objective": lambda log_pi: log_pi[0, 0],
        "clock": lambda log_pi: log_pi.exp()[0, 1] - 0.5,
        "levels": [0.1],
        "metric": "euclidean",
    }
    with pytest.raises(ValueError, match=message):
        gradient_flow(policy, **{**options, **change})
