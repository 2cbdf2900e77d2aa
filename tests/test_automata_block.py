"""Blocks whose states have scales of their own, and blocks that the backward pass finds as the forward left them."""

import math

import pytest
import torch

from exo_toy import automata, candidates
from exo_toy.automata import KGramModel, RewardAutomaton, block, recursion
from exo_toy.spaces import SequenceSpace
from tests import sequence_strategies
from tests.tolerances import assert_close

INF = math.inf
CASES = [(0, None), (0, 1), (1, None), (1, 0), (2, None), (2, 2)]


def waking(space, order, generator, *, step, n_prompts=1):
    """Four states in a row, the last alone alive behind the block; a step on weighs e^step. Inputs of a block."""
    n_vocab, on = space.vocab_size, 0 if space.eos == 2 else 2
    state, token = torch.arange(4).unsqueeze(1), torch.arange(n_vocab)
    transitions = torch.where(token == on, (state + 1).clamp(max=3), state)
    lattice = recursion.Lattice(space, order, transitions)
    values = sequence_strategies.normal((n_prompts, 4, space.n_live**order), generator)
    values[:, :3] = -INF
    end = torch.tensor([[-INF, -INF, -INF, 0.5]]).double()
    edge = sequence_strategies.normal((4, n_vocab), generator) + step * (transitions != state)
    log = sequence_strategies.normal((n_prompts, space.n_live**order, n_vocab), generator).log_softmax(-1)
    return lattice, [x.requires_grad_() for x in (values, end, edge, lattice.group(log, order))]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("n_prompts", [1, 2])
@pytest.mark.parametrize(("order", "eos"), CASES)
def test_states_that_wake_are_those_of_log_space(order, eos, n_prompts, whole, monkeypatch):
    """With steps of e^-90 one scale for all loses them within three positions."""
    space, generator = SequenceSpace(3, 40, eos), torch.Generator().manual_seed(3)
    lattice, inputs = waking(space, order, generator, step=-90.0, n_prompts=n_prompts)
    positions, linear = range(30, 20, -1), inputs[3].detach().exp()
    wanted = block._careful(lattice, positions, whole, *inputs)
    with monkeypatch.context() as patch:
        patch.setattr(block, "_careful", None)
        found = block.LogBlock.apply(lattice, positions, whole, linear, *inputs)
    # Log-weights of up to 270, to the precision of their own size.
    assert_close(found, wanted, scale=300.0)
    assert (found > -INF).any(-1)[-1].all()
    weights = sequence_strategies.normal(found.shape, generator).masked_fill(wanted.detach() == -INF, 0.0)
    gradients = [
        torch.autograd.grad(x, inputs, weights, allow_unused=True, materialize_grads=True) for x in (found, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, scale=300.0)


def test_numbers_that_are_too_small_for_a_scale_are_left_to_log_space():
    """Beside a token of weight 1, one of e^-300 that alone is allowed behind it: 0 would be no true one."""
    space = SequenceSpace(2, 40)
    lattice = recursion.Lattice(space, 0, torch.tensor([[0, 1], [1, 1]]))
    log = torch.tensor([[[[0.0, -300.0]]]]).double()
    values, end = torch.tensor([[[-INF], [0.0]]]).double(), torch.tensor([[-INF, 0.0]]).double()
    edge = torch.tensor([[0.0, 0.0], [0.0, 0.0]]).double()
    assert block.levelled(lattice, 10, None, values, end, edge, [log], whole=False) is None
    found = block.LogBlock.apply(lattice, range(30, 20, -1), False, None, values, end, edge, log)
    # One of ten positions takes the step, in ten ways.
    assert_close(found[0, 0, :, 0], [math.log(10) - 300, 0.0], scale=300.0)
    # The same where the weight is the transition's.
    heavy = torch.tensor([[0.0, -300.0], [0.0, -300.0]]).double()
    assert block.levelled(lattice, 10, None, values, end, heavy, [torch.zeros_like(log)], whole=False) is None


def test_rare_values_of_a_count_are_right():
    """The chances of up to 12 occurrences of a run of three, from e^-0 to e^-1000."""
    space = SequenceSpace(2, 36)
    log_p = math.log1p(-math.exp(-28.0))
    model = KGramModel(space, 0, (torch.tensor([[[log_p, -28.0]]]).double(),))
    # Every third token in a row of ones counts.
    own = RewardAutomaton(
        torch.tensor([[0, 1], [0, 2], [0, 0]]),
        torch.tensor([[0.0, 0], [0, 0], [0, 1]]).double(),
        torch.zeros(3).double(),
    )
    found = automata.reward_distribution(model, own)
    steps, rewards = own.transitions.tolist(), own.rewards.int().tolist()
    # By the number of ones as well, whose weight is known.
    ways = {(0, 0, 0): 1}
    for _ in range(space.length):
        new = {}
        for (state, count, ones), n in ways.items():
            for token in (0, 1):
                key = steps[state][token], count + rewards[state][token], ones + token
                new[key] = new.get(key, 0) + n
        ways = new
    wanted = [
        math.log(math.fsum(n * math.exp(-28 * (ones - 3 * count)) * math.exp(log_p * (36 - ones))
                           for (_, c, ones), n in ways.items() if c == count)) - 84 * count
        for count in range(13)
    ]  # fmt: skip
    assert found.values.tolist() == list(range(13))
    assert_close(found.log_probs[0], wanted, scale=1000.0)


@pytest.mark.parametrize(("order", "eos"), CASES)
def test_what_is_kept_and_what_is_made_again_have_one_gradient(order, eos, monkeypatch):
    space, generator = SequenceSpace(3, 40, eos), torch.Generator().manual_seed(9)
    tables = sequence_strategies.table_shapes(space, order, 1)[: order + 1]
    logits = [sequence_strategies.normal(shape, generator).requires_grad_() for shape in tables]
    rewards = sequence_strategies.normal((2, 3), generator).requires_grad_()
    own = RewardAutomaton(torch.tensor([[0, 1, 1], [1, 0, 0]]), rewards, torch.zeros(2).double())
    made, make = [], block.Linear.__init__
    monkeypatch.setattr(block.Linear, "__init__", lambda self, *a, **b: (made.append(1), make(self, *a, **b))[1])
    gradients, counts = [], []
    for most in (block.MOST_KEPT, 0):
        monkeypatch.setattr(block, "MOST_KEPT", most)
        made.clear()
        log_z = automata.log_partition(KGramModel(space, order, tuple(logits)), own, beta=1.0)
        gradients.append(torch.autograd.grad(log_z.sum(), [*logits, rewards]))
        counts.append(len(made))
    assert counts[1] == 2 * counts[0] > 0
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_the_nearest_model_covers_what_is_rarer_than_float64_can_say(homogeneous):
    """Tokens of probability e^-1000 and e^-2000, and one that is forbidden."""
    fair = KGramModel(SequenceSpace(4, 6), 0, (torch.zeros(1, 1, 4).double(),))
    own = automata.per_token(torch.tensor([0.0, 1.0, 2.0, -INF]))
    closest = automata.OptimalPolicy(fair, own, beta=1e-3).closest_kgram(1, homogeneous=homogeneous)
    assert_close(closest.table(0)[0, 0, 2:], [0.0, -INF])
    assert (closest.table(0)[0, 0, :2] > -INF).all()
    assert_close(automata.kl_optimal_to_policy(closest, fair, own, beta=1e-3), [0.0], scale=12000.0)
    # Without a forbidden token it is the other way finite, too.
    free = automata.per_token(torch.tensor([0.0, 1.0, 2.0, 0.0]))
    closest = automata.OptimalPolicy(fair, free, beta=1e-3).closest_kgram(1, homogeneous=homogeneous)
    for measure in (automata.kl_optimal_to_policy, automata.kl_policy_to_optimal):
        assert_close(measure(closest, fair, free, beta=1e-3), [0.0], scale=12000.0)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, r: automata.log_partition(m, r, beta=1e-300), r"below 1e\+290 in size; got beta 1e-300"),
        (lambda m, r: automata.log_partition(m, -1 * r, beta=1e-320), "beta must be so large"),
        (lambda m, r: automata.alignment_objective(m, m, r, beta=1e-320), "beta must be so large"),
        (lambda m, r: automata.log_partition(m, r, beta=1, starts=[0]), "starts must be a tensor .* got list"),
        (lambda m, r: automata.log_partition(m, r, beta=1, starts=torch.zeros(1)), "starts .* got torch.float32"),
        (lambda m, r: automata.log_partition(m, r, beta=1, starts=torch.zeros(0, dtype=torch.int64)), r"shape \[1\]"),
        (lambda m, r: automata.tempered_policy(m, m, beta_pi=0), "beta_pi must be a finite number above 0; got 0"),
        (lambda m, r: KGramModel(m.space, 0, ([[[0.0, 0.0]]],)), "logits must be a sequence of tensors"),
        (lambda m, r: KGramModel(m.space, 0, 5), "logits must be a sequence of tensors; got 5"),
        (lambda m, r: automata.from_regex("a", 5), "vocabulary must be a sequence of strings; got int"),
        (lambda m, r: automata.from_keywords(["a"], "ab"), "keywords must be a mapping .* got list"),
        (lambda m, r: automata.even_count(torch.tensor([True]), reward="1"), "reward must be finite"),
        (lambda m, r: automata.reward_distribution(m, 10**9 * r), r"rewards in 0\.\.5000000000, .* would take"),
        (lambda m, r: candidates.draw_candidates(m, m, automata.per_token(torch.zeros(3)), groups=1, k=2,
                                                 generator=torch.Generator()), "automaton must read the 2 tokens"),
        (lambda m, r: candidates.effective_sizes(m, m, r, None, beta_pi="1", beta_r=1), "beta_pi must be"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    model = KGramModel(SequenceSpace(2, 5), 0, (torch.zeros(1, 1, 2).double(),))
    with pytest.raises(ValueError, match=message):
        call(model, automata.per_token(torch.tensor([0.0, 1.0])))
