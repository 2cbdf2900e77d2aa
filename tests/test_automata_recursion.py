"""Exact measures of k-gram models and automata: enumeration, gradients, a plain programme, underflow, long spaces."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from exo_toy import divergences, objectives, targets
from exo_toy.automata import RewardAutomaton, block, carry, recursion
from exo_toy.automata import measures as exact
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.distribution import reward_distribution
from exo_toy.automata.optimal import OptimalPolicy
from exo_toy.policies import KGramPolicy
from exo_toy.spaces import SequenceSpace
from tests import automata_cases, sequence_strategies
from tests.automata_cases import INF
from tests.tolerances import assert_close


def moments(log_p, reward):
    """Mean and variance by summing over completions; zero probability counts nothing."""
    reward = reward.masked_fill(log_p == -INF, 0.0)
    mean = (log_p.exp() * reward).sum(-1)
    return mean, (log_p.exp() * (reward - mean.unsqueeze(-1)).square()).sum(-1)


def eos_automaton():
    """Ones are counted; eos 0 earns 5; ending in state 1 costs 1."""
    return RewardAutomaton(
        torch.tensor([[0, 1], [1, 0]]),
        torch.tensor([[5.0, 1.0], [5.0, 1.0]]).double(),
        torch.tensor([0.0, -1.0]).double(),
    )


def test_plain_programme_by_hand():
    space = SequenceSpace(2, 2, eos=0)
    model = KGramModel(
        space, 1, (torch.tensor([[[0.5, 0.5]]]).double().log(), torch.tensor([[[0.2, 0.8]]]).double().log())
    )
    # 0 earns 5; 10 earns 1 + 5 and ends in state 1; 11 earns 2 and ends in state 0.
    wanted = math.log(0.5 * math.exp(5) + 0.1 * math.exp(5) + 0.4 * math.exp(2))
    own = eos_automaton()
    arguments = own.transitions.tolist(), own.rewards.tolist(), own.final.tolist(), 0, 1.0
    assert automata_cases.plain_log_z(space, 1, automata_cases.plain_tables(model), *arguments) == pytest.approx(wanted)
    assert_close(exact.log_partition(model, own, beta=1.0), [wanted])


@given(case=automata_cases.cases())
def test_log_partition_is_that_of_enumeration(case):
    reward = case.reward.masked_fill(case.log_ref == -INF, -INF)
    wanted = (case.log_ref + reward / case.beta).logsumexp(-1)
    assert_close(exact.log_partition(case.ref, case.automaton, beta=case.beta), wanted, scale=case.scale)


@automata_cases.few
@given(case=automata_cases.cases())
def test_measures_of_models_are_those_of_enumeration(case):
    assert_close(exact.entropy(case.ref), divergences.entropy(case.log_ref))
    wanted = divergences.kl_divergence(case.log_pi.expand_as(case.log_ref), case.log_ref)
    assert_close(exact.kl_divergence(case.pi, case.ref), wanted)
    wanted = divergences.kl_divergence(case.log_ref, case.log_pi.expand_as(case.log_ref))
    assert_close(exact.kl_divergence(case.ref, case.pi), wanted)
    found = exact.reward_moments(case.ref, case.automaton)
    mean, variance = moments(case.log_ref, case.reward)
    largest = case.scale * case.beta
    assert_close(found.mean, mean, scale=largest)
    finite = mean.isfinite()
    assert_close(found.variance[finite], variance[finite], scale=largest**2)
    assert (found.variance[~finite] == INF).all()


@automata_cases.few
@given(case=automata_cases.cases())
def test_measures_of_the_optimal_policy_are_those_of_enumeration(case):
    assume(case.possible)
    log_pi = case.log_pi.expand_as(case.log_ref)
    log_star, _ = targets.optimal_policy(case.log_ref, case.reward, beta=case.beta)
    beta, automaton = case.beta, case.automaton
    assert_close(
        exact.kl_optimal_to_policy(case.pi, case.ref, automaton, beta=beta),
        divergences.kl_divergence(log_star, log_pi),
        scale=case.scale,
    )
    assert_close(
        exact.kl_policy_to_optimal(case.pi, case.ref, automaton, beta=beta),
        divergences.kl_divergence(log_pi, log_star),
        scale=case.scale,
    )
    assert_close(exact.optimal_entropy(case.ref, automaton, beta=beta), divergences.entropy(log_star), scale=case.scale)
    found, largest = exact.optimal_reward_moments(case.ref, automaton, beta=beta), case.scale * case.beta
    mean, variance = moments(log_star, case.reward)
    assert_close(found.mean, mean, scale=largest)
    assert_close(found.variance, variance, scale=largest**2)


@automata_cases.few
@given(case=automata_cases.cases(holes=False))
def test_objective_is_that_of_enumeration_and_of_its_identity(case):
    log_pi = case.log_pi.expand_as(case.log_ref)
    wanted = objectives.alignment_objective(log_pi, case.log_ref, case.reward, beta=case.beta)
    found = exact.alignment_objective(case.pi, case.ref, case.automaton, beta=case.beta)
    assert_close(found, wanted, scale=case.scale * case.beta)
    log_z = exact.log_partition(case.ref, case.automaton, beta=case.beta)
    kl = exact.kl_policy_to_optimal(case.pi, case.ref, case.automaton, beta=case.beta)
    assert_close(found, case.beta * (log_z - kl), scale=case.scale * case.beta)


@automata_cases.few
@given(case=automata_cases.cases(scale=1.0))
def test_gradients_are_those_of_enumeration(case):
    """In the logits of both, the rewards and beta, -inf among them."""
    assume(case.possible)
    case, inputs, beta = automata_cases.leaves(case)
    allowed = case.reward > -INF
    log_ref, log_pi = case.log_ref, case.log_pi.expand_as(case.log_ref)
    reward = case.reward.masked_fill(~allowed, 0.0)
    log_weight = (log_ref + reward / beta).masked_fill(~allowed, -INF)
    log_z = log_weight.logsumexp(-1)
    log_star = log_weight - log_z.unsqueeze(-1)
    pairs = [
        (exact.log_partition(case.ref, case.automaton, beta=beta), log_z),
        (exact.optimal_entropy(case.ref, case.automaton, beta=beta), divergences.entropy(log_star)),
        (
            exact.kl_optimal_to_policy(case.pi, case.ref, case.automaton, beta=beta),
            divergences.kl_divergence(log_star, log_pi),
        ),
        *zip(exact.optimal_reward_moments(case.ref, case.automaton, beta=beta), moments(log_star, reward), strict=True),
        (exact.kl_divergence(case.ref, case.pi), divergences.kl_divergence(log_ref, log_pi)),
    ]
    if not (log_star == -INF).any():
        pairs += [
            (
                exact.kl_policy_to_optimal(case.pi, case.ref, case.automaton, beta=beta),
                divergences.kl_divergence(log_pi, log_star),
            ),
            *zip(exact.reward_moments(case.pi, case.automaton), moments(log_pi, reward), strict=True),
        ]
    for found, wanted in pairs:
        scale = max(10.0, wanted.detach().abs().max().item()) * 100  # rewards of a standard deviation of 1, squared
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        for a, b in zip(
            torch.autograd.grad(found.expand_as(wanted).sum(), inputs, **options),
            torch.autograd.grad(wanted.sum(), inputs, **options),
            strict=True,
        ):
            assert_close(a, b, scale=scale)


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("order", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradcheck_to_second_order(order, eos):
    space, generator = SequenceSpace(3, 4, eos), torch.Generator().manual_seed(order)
    n_live = space.n_live
    table = sequence_strategies.normal((1, n_live**order, 3), generator).requires_grad_()
    rewards = sequence_strategies.normal((2, 3), generator).requires_grad_()
    final = sequence_strategies.normal((2,), generator).requires_grad_()
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    transitions = torch.tensor([[0, 1, 1], [1, 0, 1]])

    def log_z(table, rewards, final, beta):
        tables = [table[:, : n_live**t] for t in range(order)]
        model = KGramModel(space, order, (*tables, table))
        return exact.log_partition(model, RewardAutomaton(transitions, rewards, final), beta=beta)

    assert torch.autograd.gradcheck(log_z, (table, rewards, final, beta))
    assert torch.autograd.gradgradcheck(log_z, (table, rewards, final, beta))


@pytest.mark.parametrize("eos", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_divergences_are_differentiable_twice(eos):
    space, generator = SequenceSpace(2, 3, eos), torch.Generator().manual_seed(0)
    ref, pi = (sequence_strategies.normal((1, space.n_live, 2), generator).requires_grad_() for _ in range(2))
    rewards = sequence_strategies.normal((2, 2), generator)

    def both(pi, ref):
        models = [KGramModel(space, 1, (table[:, :1], table)) for table in (pi, ref)]
        own = RewardAutomaton(torch.tensor([[0, 1], [1, 0]]), rewards, rewards[0])
        divergences = (
            exact.kl_policy_to_optimal(*models, own, beta=0.7),
            exact.kl_optimal_to_policy(*models, own, beta=0.7),
        )
        return torch.cat(divergences)

    assert torch.autograd.gradcheck(both, (pi, ref))
    assert torch.autograd.gradgradcheck(both, (pi, ref))


def test_all_devices_agree(device):
    """A bigram model over several blocks of positions, with an eos: values and gradients are those of the CPU."""
    found = []
    for where in (torch.device("cpu"), device):
        space, generator = SequenceSpace(4, 30, eos=3), torch.Generator().manual_seed(2)
        models = [automata_cases.model(space, 1, 1, generator, homogeneous=True, holes=False) for _ in range(2)]
        leaves = [[x.to(where).requires_grad_() for x in model.logits] for model in models]
        pi, ref = (KGramModel(space, 1, tuple(tables)) for tables in leaves)
        own = automata_cases.automaton(3, 4, generator, scale=1.0, forbids=False).to(where)
        both = [f(pi, ref, own, beta=0.5) for f in (exact.kl_policy_to_optimal, exact.kl_optimal_to_policy)]
        values = [*both, exact.optimal_entropy(ref, own, beta=0.5), *exact.reward_moments(pi, own)]
        found.append([*values, *torch.autograd.grad(torch.stack(values).sum(), [*leaves[0], *leaves[1]])])
    for a, b in zip(*found, strict=True):
        assert b.device.type == device.type
        assert_close(b.cpu(), a.detach(), scale=100.0)


@pytest.mark.parametrize(("order", "eos"), [(0, None), (1, None), (1, 2), (2, 0)])
def test_log_partition_is_that_of_the_plain_programme_at_length_300(order, eos):
    space, generator = SequenceSpace(3, 300, eos), torch.Generator().manual_seed(3)
    model = automata_cases.model(space, order, 2, generator, homogeneous=True, holes=False)
    # An eos that is rare, so that completions run to the end.
    if eos is not None:
        shift = -6 * torch.nn.functional.one_hot(torch.tensor(eos), 3).double()
        model = KGramModel(space, order, tuple(table + shift for table in model.logits))
    own = automata_cases.automaton(3, 3, generator, scale=2.0, forbids=False)
    arguments = own.transitions.tolist(), own.rewards.tolist(), own.final.tolist(), own.start, 0.5
    wanted = [
        automata_cases.plain_log_z(space, order, automata_cases.plain_tables(model, prompt), *arguments)
        for prompt in range(2)
    ]
    assert_close(exact.log_partition(model, own, beta=0.5), wanted)


def block_inputs(space, order, generator, *, n_prompts=1, n_tables=1, dead=False, scale=1.0):
    """A lattice of three states, and values, ends, weights and tables for a block of positions; state 2 may be dead."""
    n_live, n_vocab = space.n_live, space.vocab_size
    transitions = torch.randint(3, (3, n_vocab), generator=generator)
    lattice = recursion.Lattice(space, order, transitions)
    values = sequence_strategies.normal((n_prompts, 3, n_live**order), generator)
    end, edge = (scale * sequence_strategies.normal(shape, generator) for shape in ((1, 3), (3, n_vocab)))
    if dead:
        transitions[2] = 2
        edge[2], end[0, 2], values[:, 2] = -INF, -INF, -INF
    logs = [
        lattice.group(sequence_strategies.normal((n_prompts, n_live**order, n_vocab), generator).log_softmax(-1), order)
        for _ in range(n_tables)
    ]
    return lattice, [x.requires_grad_() for x in (values, end, edge, *logs)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("n_prompts", [1, 2])
@pytest.mark.parametrize(("order", "eos"), [(0, None), (0, 1), (1, None), (1, 0), (2, None), (2, 2)])
@pytest.mark.parametrize(("n_tables", "dead"), [(1, False), (1, True), (20, False), (20, True)])
def test_a_block_in_linear_space_is_that_in_log_space(order, eos, n_prompts, n_tables, dead, whole):
    """Values and gradients, over positions enough to be scaled anew twice."""
    space, generator = SequenceSpace(3, 40, eos), torch.Generator().manual_seed(7)
    lattice, inputs = block_inputs(space, order, generator, n_prompts=n_prompts, n_tables=n_tables, dead=dead)
    positions = range(30, 10, -1)
    linear = inputs[3].detach().exp() if n_tables == 1 else None
    values, end, edge, *logs = (x.detach() for x in inputs)
    for keep in (False, True):
        run = block.Linear(lattice, 20, linear, values, end, edge, logs, keep=keep)
        assert run.high <= block.LARGE
        assert run.trusted or (dead and not keep)
    found = block.LogBlock.apply(lattice, positions, whole, linear, *inputs)
    wanted = block._careful(lattice, positions, whole, *inputs)
    assert len(found) == (20 if whole else 1)
    assert_close(found, wanted)
    weights = sequence_strategies.normal(found.shape, generator).masked_fill(wanted.detach() == -INF, 0.0)
    gradients = [
        torch.autograd.grad(x, inputs, weights, allow_unused=True, materialize_grads=True) for x in (found, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        # Sums over 20 positions, for each of which the weights come to some units, and values at up to 20 of them.
        assert_close(a, b, scale=400.0 if whole else 20.0)


@pytest.mark.parametrize(("order", "eos"), [(0, None), (0, 1), (1, 0), (2, 2)])
@pytest.mark.parametrize(("n", "n_prompts", "n_tables"), [(5, 1, 1), (5, 1, 5), (1, 1, 1), (1, 3, 1), (1, 3, 3)])
@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_by_hand_are_those_of_plain_operations(order, eos, n, n_prompts, n_tables, weighed):
    """Sums carried over n positions, or over one for several prompts."""
    space, generator = SequenceSpace(3, 20, eos), torch.Generator().manual_seed(5)
    lattice = recursion.Lattice(space, order, torch.randint(2, (2, 3), generator=generator))
    n_groups, n_contexts = lattice.n_groups(order), lattice.n_contexts
    rows, n_dropped = max(n, n_prompts), n_contexts // n_groups

    def normal(*shape):
        return sequence_strategies.normal(shape, generator).requires_grad_()

    table, local = normal(n_tables, n_groups, n_dropped, 3), normal(rows, n_groups, 2, n_dropped)
    weights, inverse = (normal(rows, n_groups, 2, 3), normal(rows, n_groups, 2, n_dropped)) if weighed else (None, None)
    later, center = normal(n_prompts, 2, n_contexts), torch.full((1, 2, 1), 0.7).double()
    inputs = [x for x in (table, weights, inverse, local, later) if x is not None]
    found, wanted = (f(lattice, n, center, table, weights, inverse, local, later)
                     for f in (carry.Carry.apply, carry._plain))  # fmt: skip
    assert found.shape == (n, n_prompts, 2, n_contexts)
    largest = wanted.detach().abs().max().item()
    assert_close(found, wanted, scale=largest)
    shares = sequence_strategies.normal(found.shape, generator)
    gradients = [torch.autograd.grad(x, inputs, shares) for x in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, scale=b.abs().max().item())


@pytest.mark.parametrize("log_p", [-30.0, -800.0])
@pytest.mark.parametrize("dead", [False, True])
def test_a_block_that_underflows_is_not_trusted(log_p, dead):
    """The only allowed token has this log-probability at every position: e^-240, or nothing, when scaled anew."""
    space = SequenceSpace(2, 40)
    lattice = recursion.Lattice(space, 0, torch.tensor([[0, 0], [1, 1]]))
    table = torch.tensor([[[[0.0, log_p]]]]).double()
    edge = torch.tensor([[-INF, 0.0], [-INF, -INF] if dead else [0.0, 0.0]]).double()
    values = torch.tensor([[[0.0], [-INF if dead else 0.0]]]).double()
    end = torch.zeros(1, 2).double()
    for keep in (False, True):
        assert not block.Linear(lattice, 20, table.exp(), values, end, edge, [table], keep=keep).trusted
    found = block.LogBlock.apply(lattice, range(30, 10, -1), False, table.exp(), values, end, edge, table)
    assert_close(found[0, 0, 0], [20 * log_p])


def test_sums_that_underflow_are_taken_in_log_space():
    """Token 1 has probability e^-800, and from state 0 token 0 is worth e^-900: beside each other both vanish."""
    space = SequenceSpace(2, 40)
    log_p = torch.tensor([[[0.0, -800.0]]]).double()
    rewards = torch.tensor([[-900.0, 0.0]]).double().requires_grad_()
    own = RewardAutomaton(torch.tensor([[0, 0]]), rewards, torch.zeros(1).double())
    log_z = exact.log_partition(KGramModel(space, 0, (log_p,)), own, beta=1.0)
    assert_close(log_z, [-40 * 800.0])
    (gradient,) = torch.autograd.grad(log_z.sum(), rewards)
    assert_close(gradient, [[40 * math.exp(-100.0), 40.0]])
    # The product alone says that nothing is left.
    weights = (rewards - rewards.amax()).exp()[None, None]
    assert (recursion.product(weights, log_p.exp().unsqueeze(1)) == 0).all()
    # And where nothing is left in truth, it says so.
    never = KGramModel(space, 0, (torch.tensor([[[0.0, -INF]]]).double(),))
    only_ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[-INF, 0.0]]).double(), torch.zeros(1).double())
    assert exact.log_partition(never, only_ones, beta=1.0).tolist() == [-INF]


def test_underflow_leaves_expectations_right():
    """The same, for the optimal policy's moments, entropy and divergences: token 1 always, but for e^-100."""
    space = SequenceSpace(2, 10)
    model = KGramModel(space, 0, (torch.tensor([[[0.0, -800.0]]]).double(),))
    fair = KGramModel(space, 0, (torch.zeros(1, 1, 2).double(),))
    own = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[-900.0, 0.0]]).double(), torch.zeros(1).double())
    q = math.exp(-100.0)
    found = exact.optimal_reward_moments(model, own, beta=1.0)
    assert_close(found.mean, [-9000 * q])
    assert_close(found.variance, [10 * 900.0**2 * q])
    assert_close(exact.kl_optimal_to_policy(fair, model, own, beta=1.0), [10 * math.log(2)], scale=900.0)
    assert_close(exact.kl_policy_to_optimal(fair, model, own, beta=1.0), [10 * (50 - math.log(2))], scale=900.0)


@pytest.mark.parametrize("length", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_positions(length):
    """Independent tokens: everything is T times that of one token, and nothing is lost on the way."""
    space, generator = SequenceSpace(3, length), torch.Generator().manual_seed(0)
    log_p, log_q = (sequence_strategies.normal((3,), generator).log_softmax(-1) for _ in range(2))
    reward = 5 * sequence_strategies.normal((3,), generator)
    ref, pi = (KGramModel(space, 0, (x.view(1, 1, 3),)) for x in (log_p, log_q))
    own = RewardAutomaton(torch.tensor([[0] * 3]), reward.view(1, 3), torch.zeros(1).double())
    log_star, log_z = targets.optimal_policy(log_p, reward, beta=2.0)
    assert_close(exact.log_partition(ref, own, beta=2.0), [length * log_z.item()])
    wanted = length * divergences.kl_divergence(log_q, log_star)
    assert_close(exact.kl_policy_to_optimal(pi, ref, own, beta=2.0), [wanted.item()])
    # The optimal policy against itself: what cancels is as large as log Z.
    star = KGramModel(space, 0, (log_star.view(1, 1, 3),))
    assert_close(exact.kl_policy_to_optimal(star, ref, own, beta=2.0), [0.0], scale=length * log_z.item())
    mean, variance = moments(log_star, reward)
    found = exact.optimal_reward_moments(ref, own, beta=2.0)
    assert_close(found.mean, [length * mean.item()])
    assert_close(found.variance, [length * variance.item()])
    found = exact.reward_moments(pi, own)
    mean, variance = moments(log_q, reward)
    assert_close(found.mean, [length * mean.item()])
    assert_close(found.variance, [length * variance.item()])


@pytest.mark.slow
def test_ten_thousand_positions_split_in_two():
    """A bigram model and states: the second half's values are those of a space of half the length."""
    generator = torch.Generator().manual_seed(1)
    logits = sequence_strategies.normal((4, 4), generator)
    own = automata_cases.automaton(3, 4, generator, scale=3.0, forbids=False)
    beta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def log_z(length):
        model = KGramModel.after_prompts(SequenceSpace(4, length), logits, torch.tensor([[0], [3]]))
        return exact.log_partition(model, own, beta=beta)

    # The growth per position is the logarithm of the largest eigenvalue of the matrix over contexts and states.
    matrix = torch.zeros(4, 3, 4, 3, dtype=torch.float64)
    for c in range(4):
        for s in range(3):
            for a in range(4):
                weight = logits.log_softmax(-1)[c, a] + own.rewards[s, a] / 0.5
                matrix[c, s, a, own.transitions[s, a]] += weight.exp()
    rate = torch.linalg.eigvals(matrix.reshape(12, 12)).abs().max().log()
    assert_close(log_z(10_000) - log_z(9_000), (1000 * rate).expand(2))
    # The mean reward is the derivative of log Z in 1 / beta.
    (slope,) = torch.autograd.grad(log_z(1000).sum(), beta)
    model = KGramModel.after_prompts(SequenceSpace(4, 1000), logits, torch.tensor([[0], [3]]))
    assert_close(slope, -exact.optimal_reward_moments(model, own, beta=0.5).mean.sum().item() / 0.25)


@given(generator=sequence_strategies.generators(), n_prompts=st.integers(1, 3))
def test_prompts_start_in_their_contexts_and_states(generator, n_prompts):
    space = SequenceSpace(3, 4, eos=1)
    logits = sequence_strategies.normal((4, 3), generator)
    prompts = torch.tensor([0, 2])[torch.randint(2, (n_prompts, 3), generator=generator)]
    model = KGramModel.after_prompts(space, logits, prompts)
    own = automata_cases.automaton(3, 3, generator, scale=1.0, forbids=False)
    starts = torch.randint(3, (n_prompts,), generator=generator)
    found = exact.log_partition(model, own, beta=0.5, starts=starts)
    log_ref = model.log_prob(space.tokens())
    for x in range(n_prompts):
        started = RewardAutomaton(own.transitions, own.rewards, own.final, int(starts[x]))
        reward = started.reward(space.tokens(), space.lengths())
        assert_close(found[x], (log_ref[x] + reward / 0.5).logsumexp(-1))
    # log-probabilities of a completion after a prompt, by hand
    digits = torch.tensor([0, 9, 1])
    for x, prompt in enumerate(prompts.tolist()):
        string, total = [*prompt, 2, 0, 2, 1], 0.0
        for t in range(3, 7):
            context = digits[string[t - 2]] * 2 + digits[string[t - 1]]
            total += logits.log_softmax(-1)[context, string[t]].item()
        assert model.log_prob(torch.tensor([[2, 0, 2, 1]]))[x].item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("order", "eos"), [(0, None), (1, 1), (2, None)])
def test_each_prompt_is_as_it_would_be_alone(order, eos):
    """Prompts with states of their own to start in, and a table of their own each; a policy that they share."""
    space, starts, generator = SequenceSpace(3, 4, eos), torch.tensor([2, 0, 2]), torch.Generator().manual_seed(order)
    ref = automata_cases.model(space, order, 3, generator, homogeneous=True, holes=False)
    pi = automata_cases.model(space, 1, 1, generator, homogeneous=False, holes=False)
    own = automata_cases.automaton(3, 3, generator, scale=2.0, forbids=False)
    own = RewardAutomaton(own.transitions, own.rewards.round(), own.final.round(), own.start)

    def measures(pi, ref, own, starts):
        both = {"beta": 0.7, "starts": starts}
        found = [
            exact.log_partition(ref, own, **both),
            *exact.reward_moments(ref, own, starts=starts),
            *exact.optimal_reward_moments(ref, own, **both),
            exact.alignment_objective(pi, ref, own, **both),
            exact.kl_policy_to_optimal(pi, ref, own, **both),
            exact.kl_optimal_to_policy(pi, ref, own, **both),
            exact.optimal_entropy(ref, own, **both),
        ]
        distribution = reward_distribution(ref, own, starts=starts)
        log_probs = OptimalPolicy(ref, own, **both).log_prob(space.tokens())
        return torch.cat([torch.stack(found, -1), distribution.log_probs, log_probs], -1)

    together = measures(pi, ref, own, starts)
    for x, start in enumerate(starts.tolist()):
        mine = KGramModel(space, order, tuple(table[x : x + 1] for table in ref.logits))
        alone = RewardAutomaton(own.transitions, own.rewards, own.final, start)
        assert_close(together[x], measures(pi, mine, alone, None)[0], scale=100.0)


@given(case=automata_cases.cases(), more=st.integers(0, 4))
def test_a_lifted_model_is_the_same_distribution(case, more):
    lifted = case.ref.lifted(min(case.ref.order + more, case.space.length - 1))
    assert_close(lifted.log_prob(case.tokens), case.log_ref)
    assert_close(case.log_ref.logsumexp(-1), torch.zeros(len(case.log_ref)).double().tolist())


def test_the_model_of_a_policy_is_the_policy():
    policy = KGramPolicy(SequenceSpace(3, 4, eos=0), 2, n_prompts=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = sequence_strategies.normal(parameter.shape, generator)
    model = KGramModel.of(policy)
    tokens = policy.space.tokens()
    assert_close(model.log_prob(tokens), policy.log_prob(tokens))
    first, second = (x.sample(7, torch.Generator().manual_seed(3)) for x in (model, policy))
    assert torch.equal(first, second)


@pytest.mark.unchecked
def test_errors():
    space = SequenceSpace(3, 4)
    fair = KGramModel(space, 0, (torch.zeros(1, 1, 3).double(),))
    own = RewardAutomaton(torch.tensor([[0, 0, 0]]), torch.zeros(1, 3).double(), torch.zeros(1).double())
    with pytest.raises(ValueError, match="beta must be"):
        exact.log_partition(fair, own, beta=0.0)
    with pytest.raises(ValueError, match="beta must be"):
        exact.log_partition(fair, own, beta=torch.tensor(-1.0).double())
    with pytest.raises(ValueError, match=r"starts must be states in 0\.\.0; got 1"):
        exact.log_partition(fair, own, beta=1.0, starts=torch.tensor([1]))
    with pytest.raises(ValueError, match="automaton must read the 3 tokens"):
        exact.log_partition(fair, eos_automaton(), beta=1.0)
    never = RewardAutomaton(own.transitions, torch.full((1, 3), -INF).double(), own.final)
    with pytest.raises(ValueError, match="automaton must allow a completion"):
        exact.kl_policy_to_optimal(fair, fair, never, beta=1.0)
    with pytest.raises(ValueError, match="models must be over one space"):
        exact.kl_divergence(fair, KGramModel(SequenceSpace(3, 5), 0, (torch.zeros(1, 1, 3).double(),)))
    with pytest.raises(ValueError, match="logits must be 1 tables"):
        KGramModel(space, 0, (torch.zeros(1, 1, 3).double(),) * 2)
    with pytest.raises(ValueError, match=r"logits\[0\] must have shape"):
        KGramModel(space, 0, (torch.zeros(1, 2, 3).double(),))
    with pytest.raises(ValueError, match=r"logits\[0\] must be finite"):
        KGramModel(space, 0, (torch.full((1, 1, 3), -INF).double(),))
    with pytest.raises(ValueError, match=r"logits\[0\] must be torch.float64"):
        KGramModel(space, 0, (torch.zeros(1, 1, 3),))
    with pytest.raises(ValueError, match="prompts must have at least 1 tokens"):
        KGramModel.after_prompts(space, torch.zeros(3, 3).double(), torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must have shape"):
        KGramModel.after_prompts(space, torch.zeros(2, 3).double(), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("reward", [1.0, 2000.0])  # 2000: beyond linear space
def test_prompts_that_share_late_tables(reward):
    """Tables of all prompts behind each prompt's own: as if every prompt had its own throughout."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, 1, 2, generator=generator).double() for n in (3, 3, 1, 3, 1, 1, 1)]
    space = SequenceSpace(2, len(tables))
    automaton = RewardAutomaton(
        torch.tensor([[0, 1], [1, 1]]),
        torch.tensor([[0.0, -reward], [-reward, -reward]]).double(),
        torch.zeros(2).double(),
    )
    found, wanted = (
        OptimalPolicy(KGramModel(space, 0, logits), automaton, beta=1.0)
        for logits in (tables, [table.expand(3, -1, -1) for table in tables])
    )
    assert_close(found.log_z, wanted.log_z)
    drawn = [policy.sample(9, torch.Generator().manual_seed(1)) for policy in (found, wanted)]
    assert torch.equal(*drawn)


def test_infinite_divergences_elsewhere_leave_gradients():
    """Where only another prompt's divergence is infinite, or that of a context never reached, gradients are finite."""
    space = SequenceSpace(2, 1)
    logits = torch.tensor([[[-INF, 0.0]], [[0.0, 1.0]]]).double().requires_grad_()
    other = torch.tensor([[[1.0, 0.0]], [[-INF, 0.0]]]).double().requires_grad_()
    beta = torch.tensor(2.0).double().requires_grad_()
    zero = RewardAutomaton(torch.zeros(1, 2).long(), torch.zeros(1, 2).double(), torch.zeros(1).double())
    pi, ref = KGramModel(space, 0, (logits,)), KGramModel(space, 0, (other,))
    value = exact.alignment_objective(pi, ref, zero, beta=beta)
    surprise = math.log(1 + math.e)  # -log of the reference's second token, for the first prompt
    assert_close(value, torch.tensor([-2 * surprise, -INF], dtype=torch.float64))
    by_pi, by_ref, by_beta = torch.autograd.grad(value[0], [logits, other, beta])
    share = math.e / (1 + math.e)
    assert_close(by_pi, torch.zeros_like(logits))
    assert_close(by_ref, 2 * torch.tensor([[[-share, share]], [[0.0, 0.0]]], dtype=torch.float64))
    assert_close(by_beta, torch.tensor(-surprise, dtype=torch.float64))

    second = torch.zeros(1, 1, 2).double()
    first = torch.tensor([[[-INF, 0.0]]]).double()
    pi_row = torch.zeros(1, 2, 2).double().requires_grad_()
    ref_row = torch.tensor([[[-INF, 0.0], [0.0, 0.0]]]).double()
    space = SequenceSpace(2, 2)
    value = exact.kl_divergence(KGramModel(space, 1, (first, pi_row)), KGramModel(space, 1, (second, ref_row)))
    assert_close(value, torch.tensor([math.log(2)], dtype=torch.float64))
    assert_close(torch.autograd.grad(value.sum(), pi_row)[0], torch.zeros_like(pi_row))
