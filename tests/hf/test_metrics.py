"""Logged numbers against plain formulas over lists."""

import math

import pytest
import torch

from exo_toy import estimators
from exo_toy.integrations.metrics import SPARE, RunningMeans, prompt_metrics
from tests.tolerances import assert_close

MASK = [[True, True, True, True], [True, True, False, False], [True, True, True, False]]
BETA_PI, BETA = 0.3, 0.15


def tables():
    """Three prompts with four, two and three candidates; what is masked is not a number."""
    generator = torch.Generator().manual_seed(0)
    policy, ref, weights = (-10 * torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    rewards = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.5, 0.25, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor(MASK)
    return *(table.masked_fill(~mask, math.nan) for table in (policy, ref, rewards, weights)), mask


def softmax(values):
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def plain(policy, ref, rewards, weights):
    """One prompt, from lists of its candidates."""
    ratio = [p - q for p, q in zip(policy, ref, strict=True)]
    best = [i for i, r in enumerate(rewards) if r == max(rewards)]
    worst = [i for i, r in enumerate(rewards) if r == min(rewards)]
    chosen, rejected = (BETA * sum(ratio[i] for i in some) / len(some) for some in (best, worst))
    k = len(ratio)
    used = softmax([BETA_PI * x + w for x, w in zip(ratio, weights, strict=True)])
    of_policy = softmax([x + w for x, w in zip(ratio, weights, strict=True)])
    of_reference = softmax(weights)
    optimal = softmax([r / BETA + w for r, w in zip(rewards, weights, strict=True)])
    ess = 1 / sum(p * p for p in used)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": float(chosen > rejected),
        "logps/chosen": sum(policy[i] for i in best) / len(best),
        "logps/rejected": sum(policy[i] for i in worst) / len(worst),
        "ess": ess / k,
        SPARE: (ess - 1) / (k - 1),
        "kl/ref": kl(of_policy, of_reference),
        "kl/policy_to_optimal": kl(of_policy, optimal),
        "kl/optimal_to_policy": kl(optimal, of_policy),
        "top_reward_leads": float(ratio.index(max(ratio)) in best),
    }


@pytest.mark.parametrize("weighted", [False, True])
def test_each_number_against_its_formula(weighted):
    policy, ref, rewards, weights, mask = tables()
    given = weights if weighted else None
    metrics = prompt_metrics(policy, ref, rewards, mask, beta_pi=BETA_PI, beta=BETA, log_weights=given)
    for row, keep in enumerate(MASK):
        k = sum(keep)
        lists = [table[row, :k].tolist() for table in (policy, ref, rewards)]
        expected = plain(*lists, weights[row, :k].tolist() if weighted else [0.0] * k)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name][row].item() == pytest.approx(value, rel=1e-10, abs=1e-10), name


def test_estimates_are_the_librarys_where_nothing_is_masked():
    policy, ref, rewards, _, mask = tables()
    policy, ref, rewards, mask = (table[:1] for table in (policy, ref, rewards, mask))
    metrics = prompt_metrics(policy, ref, rewards, mask, beta_pi=BETA_PI, beta=BETA)
    ratio = policy - ref
    assert_close(metrics["ess"], estimators.effective_sample_size(BETA_PI * ratio) / 4)
    assert_close(metrics["kl/ref"], estimators.snis_kl(ratio, torch.zeros_like(ratio)).value)
    assert_close(metrics["kl/policy_to_optimal"], estimators.snis_kl(ratio, rewards / BETA).value)
    assert_close(metrics["kl/optimal_to_policy"], estimators.snis_kl(rewards / BETA, ratio).value)


def test_at_the_reference_nothing_has_moved():
    _, ref, rewards, _, mask = tables()
    metrics = prompt_metrics(ref, ref, rewards, mask, beta_pi=BETA_PI, beta=BETA)
    assert_close(metrics["ess"], [1.0] * 3)
    assert_close(metrics[SPARE], [1.0] * 3)
    assert_close(metrics["kl/ref"], [0.0] * 3)
    assert_close(metrics["rewards/accuracies"], [0.0] * 3)
    # All candidates lead: the share of them with the highest reward, no matter in which place.
    assert_close(metrics["top_reward_leads"], [2 / 4, 1 / 2, 1 / 3])


def test_at_the_optimum_both_divergences_vanish():
    _, ref, rewards, _, mask = tables()
    metrics = prompt_metrics(ref + rewards / BETA, ref, rewards, mask, beta_pi=BETA_PI, beta=BETA)
    for name in ("kl/policy_to_optimal", "kl/optimal_to_policy"):
        assert_close(metrics[name], [0.0] * 3)
    assert_close(metrics["rewards/margins"], [4.0, 0.25, 2.0])
    assert (metrics["top_reward_leads"] > 0.4).all()


def test_the_order_of_candidates_is_no_matter():
    policy, ref, rewards, weights, mask = tables()
    order = torch.tensor([2, 0, 3, 1])
    given = dict(beta_pi=BETA_PI, beta=BETA)
    metrics = prompt_metrics(policy, ref, rewards, mask, log_weights=weights, **given)
    moved = [table[:, order] for table in (policy, ref, rewards, mask)]
    for name, value in prompt_metrics(*moved, log_weights=weights[:, order], **given).items():
        assert_close(value, metrics[name])


def test_pairs_have_no_optimum():
    policy, ref, _, _, _ = tables()
    policy, ref = policy[:, :2], ref[:, :2]
    rewards, mask = torch.tensor([[1.0, 0.0]] * 3), torch.ones(3, 2, dtype=torch.bool)
    metrics = prompt_metrics(policy, ref, rewards, mask, beta_pi=BETA, beta=BETA, preference=True)
    assert metrics.keys() == {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected", "ess", "kl/ref",
    }  # fmt: skip
    assert_close(metrics["rewards/chosen"], BETA * (policy - ref)[:, 0])
    assert_close(metrics["logps/rejected"], policy[:, 1])


def test_half_precision_is_computed_in_double():
    policy, ref, rewards, _, mask = tables()
    halves = [table.nan_to_num().to(torch.bfloat16) for table in (policy, ref, rewards)]
    metrics = prompt_metrics(*halves, mask, beta_pi=BETA_PI, beta=BETA)
    wide = prompt_metrics(*(half.double() for half in halves), mask, beta_pi=BETA_PI, beta=BETA)
    for name, value in metrics.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        assert torch.equal(value, wide[name])


@pytest.mark.unchecked
def test_bad_arguments():
    policy, ref, rewards, _, mask = tables()
    with pytest.raises(ValueError, match="beta_pi must be"):
        prompt_metrics(policy, ref, rewards, mask, beta_pi=0.0, beta=BETA)
    with pytest.raises(ValueError, match="rewards must have the same shape"):
        prompt_metrics(policy, ref, rewards[:, :2], mask, beta_pi=BETA_PI, beta=BETA)
    with pytest.raises(ValueError, match=r"mask must be a torch.bool tensor"):
        prompt_metrics(policy, ref, rewards, mask.double(), beta_pi=BETA_PI, beta=BETA)


def test_running_means_weigh_prompts_and_start_anew():
    means = RunningMeans()
    assert means.pop() == {}
    means.add({"a": torch.tensor([1.0, 2.0, 3.0])}, torch.ones(3))
    # Infinity that does not count is no NaN.
    means.add({"a": torch.tensor([10.0, math.inf])}, torch.tensor([1.0, 0.0]))
    assert means.pop() == {"a": 4.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor([1.0])}, torch.ones(1))
    # Two processes: this one's sums and those of another with three prompts of mean 5.
    assert means.pop(lambda sums: sums + torch.tensor([15.0, 3.0], dtype=torch.float64)) == {"a": 4.0}
