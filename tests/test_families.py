"""The families' answers against the oracles, and the hook and strategies against what they promise."""

import jaxtyping
import pytest
import torch
from hypothesis import given

from exo_toy.losses import dpo_loss
from tests import oracles, strategies
from tests.families import FAMILIES, Solved
from tests.tolerances import assert_close


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_answers_agree_with_the_oracles(family):
    solved: Solved = family()
    rows = zip(solved.log_ref.tolist(), solved.reward.tolist(), strict=True)
    answers = [oracles.optimal_policy(log_ref, reward, solved.beta) for log_ref, reward in rows]
    assert_close(solved.log_pi_star, [log_pi_star for log_pi_star, _ in answers])
    assert_close(solved.log_z, [log_z for _, log_z in answers])


def test_annotations_are_checked():
    batch_2, batch_3 = torch.zeros(2), torch.zeros(3)
    with pytest.raises(jaxtyping.TypeCheckError):
        dpo_loss(batch_2, batch_3, batch_2, batch_2, beta=1.0)


@pytest.mark.unchecked
def test_annotations_are_not_checked_where_marked():
    batch_2, batch_3 = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="policy_rejected_logps"):
        dpo_loss(batch_2, batch_3, batch_2, batch_2, beta=1.0)


@given(strategies.problems(holes=True))
def test_problems_keep_their_promises(problem):
    n_prompts, n_completions = problem.log_ref.shape
    assert n_prompts != n_completions
    for log_p in (problem.log_ref, problem.log_pi):
        assert_close(log_p.logsumexp(-1), [0.0] * n_prompts)
    assert ((problem.log_pi == -torch.inf) | (problem.log_ref > -torch.inf)).all()
    assert ((problem.reward > -torch.inf) & (problem.log_ref > -torch.inf)).any(-1).all()


@given(strategies.candidates(holes=True))
def test_candidates_keep_their_promises(drawn):
    assert drawn.log_ratio.shape[0] != drawn.log_ratio.shape[1]
    for values in (drawn.log_ratio, drawn.rewards):
        assert (drawn.mask & (values > -torch.inf)).any(-1).all()


def test_tolerances_tell_apart():
    assert_close(torch.tensor([1.0, torch.inf, torch.nan]), [1.0, torch.inf, torch.nan])
    assert_close(torch.tensor([torch.inf], dtype=torch.float16), [7e4])
    for actual, expected in [(1.0, 1.0 + 1e-11), (torch.inf, 1e300), (torch.nan, 0.0), (0.0, 1e-11)]:
        with pytest.raises(AssertionError):
            assert_close(torch.tensor([actual], dtype=torch.float64), [expected])
