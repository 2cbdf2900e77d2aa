"""TabularPolicy, KGramPolicy and closest_kgram: oracle, exact zeros, gradients, samples, capacity, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from exo_toy.policies import KGramPolicy, TabularPolicy, closest_kgram
from exo_toy.spaces import SequenceSpace
from tests import sequence_oracles, sequence_strategies
from tests.tolerances import assert_close

INF = math.inf
POLICIES = [TabularPolicy, lambda space, **kwargs: KGramPolicy(space, min(1, space.length - 1), **kwargs)]
both_policies = pytest.mark.parametrize("policy_class", POLICIES, ids=["tabular", "kgram"])


def randomised(policy: nn.Module, generator: torch.Generator, *, holes: bool = False) -> nn.Module:
    """The policy with normal logits; with ``holes``, half of them -inf."""
    for parameter in policy.parameters():
        logits = 2 * sequence_strategies.normal(parameter.shape, generator)
        parameter.data = sequence_strategies.with_holes(logits, generator) if holes else logits
    return policy


@st.composite
def kgram_policies(draw: st.DrawFn, *, holes: bool = False) -> KGramPolicy:
    space = draw(sequence_strategies.spaces())
    order, n_prompts = draw(sequence_strategies.orders(space)), draw(sequence_strategies.prompt_counts(space))
    policy = KGramPolicy(space, order, n_prompts=n_prompts)
    return randomised(policy, draw(sequence_strategies.generators()), holes=holes)


def probabilities(space: SequenceSpace, log_p: Tensor) -> dict[sequence_oracles.Completion, float]:
    """A table [N] as the oracles take it."""
    return dict(zip(sequence_strategies.completions(space), log_p.exp().tolist(), strict=True))


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) over the last dimension; p may have zeros."""
    return (log_p.exp() * torch.where(log_p > -INF, log_p - log_q, 0.0)).sum(-1)


# The oracles


def test_oracle_of_kgram_conditionals_by_hand():
    p = {(0, 0): 0.4, (0, 1): 0.1, (1, 0): 0.0, (1, 1): 0.5}
    assert sequence_oracles.kgram_conditionals(p, None, 0)[0] == {((), 0): 0.5, ((), 1): 0.5}
    assert sequence_oracles.kgram_conditionals(p, None, 0)[1] == pytest.approx({((), 0): 0.4, ((), 1): 0.6})
    given_first = {((0,), 0): 0.8, ((0,), 1): 0.2, ((1,), 0): 0.0, ((1,), 1): 1.0}
    assert sequence_oracles.kgram_conditionals(p, None, 1)[1] == pytest.approx(given_first)
    # With 0 the eos, only what goes on after the first position counts at the second.
    ended = {(0, 0): 0.5, (1, 0): 0.2, (1, 1): 0.3}
    assert sequence_oracles.kgram_conditionals(ended, 0, 0)[1] == pytest.approx({((), 0): 0.4, ((), 1): 0.6})


def test_oracle_of_dependence_by_hand():
    copies = {(0, 0): 0.5, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 0.5}
    assert sequence_oracles.dependence_on_older_tokens(copies, None, 0) == pytest.approx(math.log(2))
    assert sequence_oracles.dependence_on_older_tokens(copies, None, 1) == 0
    # 2 is the eos: half of the completions end at once; the others copy a fair token and end or are cut.
    p = {(2, 2, 2): 0.5, (0, 0, 2): 0.25, (1, 1, 2): 0.25}
    assert sequence_oracles.dependence_on_older_tokens(p, 2, 0) == pytest.approx(0.5 * math.log(2))


# Log-probabilities


@given(policy=kgram_policies(holes=True))
def test_kgram_log_probs_agree_with_the_oracle(device, policy):
    space = policy.space
    tables = [table.detach().log_softmax(-1) for table in policy.logits]
    expected = [
        [
            sequence_oracles.path_sum(
                string, [table[x].tolist() for table in tables], space.vocab_size, space.eos, policy.order
            )
            for string in sequence_strategies.completions(space)
        ]
        for x in range(policy.n_prompts)
    ]
    log_probs = policy.to(device).log_probs()
    assert log_probs.dtype == torch.float64
    assert_close(log_probs, expected)
    assert_close(log_probs.logsumexp(-1), torch.zeros(policy.n_prompts, dtype=torch.float64))


@given(policy=kgram_policies(holes=True), data=st.data())
def test_kgram_log_prob_of_given_completions_is_that_of_the_table(device, policy, data):
    space = policy.to(device).space
    index = torch.tensor(data.draw(st.lists(st.integers(0, space.size - 1), max_size=8)), dtype=torch.int64)
    expected = policy.log_probs()[:, index]
    for tokens in (space.tokens(index), space.tokens(index).to(torch.int8)):
        assert_close(policy.log_prob(tokens.to(device)), expected)


@given(data=st.data(), generator=sequence_strategies.generators())
def test_a_full_table_is_the_softmax_of_its_logits(data, generator):
    space = data.draw(sequence_strategies.spaces())
    policy = TabularPolicy(space, n_prompts=data.draw(sequence_strategies.prompt_counts(space)))
    randomised(policy, generator, holes=True)
    log_probs = policy.log_probs()
    weights = policy.logits.detach().exp()
    assert_close(log_probs.exp(), weights / weights.sum(-1, keepdim=True))
    index = torch.tensor(data.draw(st.lists(st.integers(0, space.size - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(policy.log_prob(space.tokens(index)), log_probs[:, index])


@given(space=sequence_strategies.spaces(), data=st.data())
def test_policies_start_uniform(space, data):
    n_prompts = data.draw(sequence_strategies.prompt_counts(space))
    tabular = TabularPolicy(space, n_prompts=n_prompts).log_probs()
    assert_close(tabular, torch.full((n_prompts, space.size), -math.log(space.size), dtype=torch.float64))
    kgram = KGramPolicy(space, data.draw(sequence_strategies.orders(space)), n_prompts=n_prompts).log_probs()
    lengths = [sequence_oracles.length(string, space.eos) for string in sequence_strategies.completions(space)]
    assert_close(kgram, [[-length * math.log(space.vocab_size) for length in lengths]] * n_prompts)


@both_policies
def test_parameters_are_float64_and_the_state_can_be_restored(policy_class):
    space = SequenceSpace(3, 2, eos=2)
    policy = randomised(policy_class(space, n_prompts=4), torch.Generator().manual_seed(0))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float64}
    other = policy_class(space, n_prompts=4)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.log_probs(), policy.log_probs())


@pytest.mark.parametrize("eos", [None, 3])
def test_kgram_policies_work_on_spaces_too_large_to_enumerate(eos):
    generator = torch.Generator().manual_seed(0)
    policy = randomised(KGramPolicy(SequenceSpace(16, 300, eos), 1, n_prompts=2), generator)
    tokens = policy.sample(5, generator).flatten(0, 1)
    assert tokens.shape == (10, 300)
    tables = [table.detach().log_softmax(-1).tolist() for table in policy.logits]
    expected = [
        [sequence_oracles.path_sum(tuple(row), [table[x] for table in tables], 16, eos, 1) for row in tokens.tolist()]
        for x in range(2)
    ]
    assert_close(policy.log_prob(tokens), expected)
    with pytest.raises(ValueError, match="above the space's memory_budget"):
        policy.log_probs()


# Gradients


@pytest.mark.parametrize("eos", [None, 1])
@both_policies
def test_log_probabilities_differentiate_twice(policy_class, eos):
    space = SequenceSpace(3, 3, eos)
    policy = randomised(policy_class(space, n_prompts=2), torch.Generator().manual_seed(0))
    names = [name for name, _ in policy.named_parameters()]
    tokens = space.tokens()[::3]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self):
            return self.policy.log_probs(), self.policy.log_prob(tokens)

    both = Both()

    def by_parameters(*values):
        parameters = {f"policy.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(both, parameters, ())

    parameters = tuple(parameter.detach().requires_grad_() for parameter in policy.parameters())
    assert torch.autograd.gradcheck(by_parameters, parameters)
    assert torch.autograd.gradgradcheck(by_parameters, parameters)


@pytest.mark.parametrize("eos", [None, 0, 2])
@pytest.mark.parametrize("given_tokens", [False, True])
@both_policies
def test_gradients_at_probability_zero_are_the_limit_of_finite_ones(policy_class, given_tokens, eos):
    space = SequenceSpace(3, 3, eos)

    def derivatives(log_zero: float) -> list[Tensor]:
        """Of a curved function of the log-probabilities above -600, with half of the logits at log_zero."""
        generator = torch.Generator().manual_seed(0)
        policy = randomised(policy_class(space), generator, holes=True)
        for parameter in policy.parameters():
            parameter.data = parameter.data.clamp(min=log_zero)
        log_probs = policy.log_prob(space.tokens()) if given_tokens else policy.log_probs()
        weights = sequence_strategies.normal(tuple(log_probs.shape), generator)
        possible = log_probs > -600
        assert 0 < possible.sum() < possible.numel()
        value = (weights * torch.where(possible, log_probs, 0.0).sin()).sum()
        first = torch.autograd.grad(value, list(policy.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), list(policy.parameters()))
        return [*first, *second]

    for at_zero, near_zero in zip(derivatives(-INF), derivatives(-800.0), strict=True):
        assert at_zero.isfinite().all()
        assert_close(at_zero, near_zero, scale=10.0)


def test_a_completion_of_probability_zero_still_has_a_gradient():
    policy = TabularPolicy(SequenceSpace(3, 1))
    policy.logits.data = torch.tensor([[0.0, -INF, 0.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(policy.log_probs()[0, 1], policy.logits)
    assert gradient.tolist() == [[-0.5, 1.0, -0.5]]


# Samples


def dkw_bound(n: int, events: int) -> float:
    """Sup distance of an empirical distribution function that is exceeded with probability below 1e-9 in all."""
    return math.sqrt(math.log(2 * events / 1e-9) / (2 * n))


@pytest.mark.parametrize("eos", [None, 1])
@both_policies
def test_samples_follow_the_policy(device, policy_class, eos):
    space, n = SequenceSpace(3, 4, eos), 20_000
    policy = randomised(policy_class(space, n_prompts=2), torch.Generator().manual_seed(0), holes=True).to(device)
    tokens = policy.sample(n, torch.Generator(device).manual_seed(1))
    assert tokens.shape == (2, n, 4)
    assert tokens.dtype == torch.int64
    index = space.index(tokens)
    log_probs = policy.log_probs().detach()
    assert log_probs.isinf().any()
    for x in range(2):
        frequencies = torch.bincount(index[x], minlength=space.size) / n
        assert frequencies[log_probs[x].isinf()].sum() == 0
        distance = (frequencies.cumsum(-1) - log_probs[x].exp().cumsum(-1)).abs().max()
        assert distance < dkw_bound(n, events=2)


@both_policies
def test_samples_come_from_the_generator_alone(policy_class):
    policy = policy_class(SequenceSpace(3, 4), n_prompts=2)
    before = torch.get_rng_state()
    first, again, other = (policy.sample(9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    assert policy.sample(9).shape == (2, 9, 4)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@both_policies
def test_the_extreme_uniform_numbers_draw_possible_completions(policy_class, uniform, monkeypatch):
    policy = policy_class(SequenceSpace(24, 1))
    logits = torch.tensor([-INF] + 22 * [0.0] + [-INF], dtype=torch.float64)
    # As added up in floating point, these 22 equal probabilities stay below the largest uniform number.
    assert logits.softmax(-1).cumsum(-1)[-1] < 1 - 2.0**-53
    for parameter in policy.parameters():
        parameter.data = logits.reshape(parameter.shape)

    def constant(shape, *, generator, dtype, device):
        return torch.full(shape, uniform, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "rand", constant)
    assert policy.sample(1).item() == (1 if uniform == 0 else 22)


# The closest k-gram policy


@st.composite
def targets(draw: st.DrawFn, *, holes: bool = False) -> tuple[SequenceSpace, Tensor]:
    """A space and a table [X, N] of log-probabilities over it."""
    space = draw(sequence_strategies.spaces(min_vocab=2))
    shape = (draw(sequence_strategies.prompt_counts(space)), len(sequence_strategies.completions(space)))
    generator = draw(sequence_strategies.generators())
    logits = 2 * sequence_strategies.normal(shape, generator)
    return space, (sequence_strategies.with_holes(logits, generator) if holes else logits).log_softmax(-1)


@given(target=targets(holes=True), data=st.data())
def test_the_closest_kgram_has_the_conditionals_of_the_target(target, data):
    space, log_p = target
    order = data.draw(sequence_strategies.orders(space))
    policy = closest_kgram(space, log_p, order)
    tables = [logits.detach().softmax(-1) for logits in policy.logits]
    for x in range(len(log_p)):
        conditionals = sequence_oracles.kgram_conditionals(probabilities(space, log_p[x]), space.eos, order)
        expected = [torch.full_like(table[x], 1 / space.vocab_size) for table in tables]
        for t, entries in enumerate(conditionals):
            for (context, token), probability in entries.items():
                expected[t][sequence_oracles.context_number(context, space.vocab_size, space.eos), token] = probability
        for table, wanted in zip(tables, expected, strict=True):
            assert_close(table[x], wanted)


@given(target=targets(holes=True), data=st.data())
def test_what_separates_it_from_the_target_is_dependence_on_older_tokens(target, data):
    space, log_p = target
    order = data.draw(sequence_strategies.orders(space))
    distance = kl(log_p, closest_kgram(space, log_p, order).log_probs())
    assert_close(
        distance,
        [sequence_oracles.dependence_on_older_tokens(probabilities(space, row), space.eos, order) for row in log_p],
        scale=log_p[log_p > -INF].abs().max().item(),
    )


@given(target=targets(holes=True))
def test_with_the_whole_past_in_view_it_is_the_target(target):
    space, log_p = target
    assert_close(closest_kgram(space, log_p, space.length - 1).log_probs(), log_p)


@given(target=targets(), data=st.data(), generator=sequence_strategies.generators())
def test_the_closest_kgram_minimises(target, data, generator):
    space, log_p = target
    policy = closest_kgram(space, log_p, data.draw(sequence_strategies.orders(space)))
    distance = kl(log_p, policy.log_probs())
    for gradient in torch.autograd.grad(distance.sum(), list(policy.parameters())):
        assert_close(gradient, torch.zeros_like(gradient))
    for parameter in policy.parameters():
        parameter.data += sequence_strategies.normal(tuple(parameter.shape), generator)
    farther = kl(log_p, policy.log_probs())
    assert (farther > distance).all()


@given(policy=kgram_policies(holes=True), data=st.data())
def test_a_kgram_policy_is_closest_to_itself(policy, data):
    higher = data.draw(st.integers(policy.order, policy.space.length - 1))
    log_probs = policy.log_probs().detach()
    assert_close(closest_kgram(policy.space, log_probs, higher).log_probs(), log_probs)


def test_a_table_without_prompts_gives_one_prompt():
    space = SequenceSpace(2, 2)
    log_p = torch.tensor([0.5, 0.0, 0.0, 0.5]).log()
    log_probs = closest_kgram(space, log_p, 1).log_probs()
    assert_close(log_probs, [[math.log(0.5), -INF, -INF, math.log(0.5)]])
    assert torch.equal(closest_kgram(space, log_p.expand(3, 4), 1).log_probs(), log_probs.expand(3, 4))


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda space: KGramPolicy(space, 3), r"order must be in 0\.\.2 on completions of length 3 .*; got 3"),
        (lambda space: KGramPolicy(space, -1), "order must be an integer of at least 0; got -1"),
        (lambda space: KGramPolicy(space, 1, n_prompts=0), "n_prompts must be an integer of at least 1; got 0"),
        (lambda space: TabularPolicy(space, n_prompts=0), "n_prompts must be an integer of at least 1; got 0"),
        (
            lambda space: TabularPolicy(SequenceSpace(2, 3, memory_budget=100), n_prompts=2),
            "TabularPolicy of 8 completions .* above the space's memory_budget",
        ),
        (
            lambda space: KGramPolicy(SequenceSpace(100, 1000), 9),
            r"the tables of KGramPolicy of order 9 would take 10\*\*14\.87 GiB",
        ),
        (lambda space: closest_kgram(space, torch.zeros(9), 0), r"log_p must have shape \[X, 8\] or \[8\]; got \[9\]"),
        (lambda space: closest_kgram(space, torch.zeros(1, 1, 8), 0), r"got \[1, 1, 8\]"),
        (lambda space: closest_kgram(space, torch.zeros(8), 0), "log_p must hold normalised log-probabilities"),
        (lambda space: closest_kgram(space, torch.full((8,), 1 / 8).log(), 3), r"order must be in 0\.\.2"),
    ],
)
def test_construction_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build(SequenceSpace(2, 3))


@pytest.mark.unchecked
@both_policies
def test_methods_refuse(policy_class):
    policy = policy_class(SequenceSpace(2, 3))
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.1; got 2"):
        policy.log_prob(torch.full((1, 3), 2))
    with pytest.raises(ValueError, match="n must be an integer of at least 1; got 0"):
        policy.sample(0)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [0.0, math.nan], [0.0, INF], [-INF, -INF]])
@both_policies
def test_logits_that_define_no_distribution_are_refused(policy_class, bad):
    space = SequenceSpace(2, 1) if policy_class is TabularPolicy else SequenceSpace(2, 2)
    policy = policy_class(space, n_prompts=3)
    list(policy.parameters())[-1].data[1, -2:] = torch.tensor(bad)
    name = "logits" if policy_class is TabularPolicy else r"logits\[1\]"
    for call in (policy.log_probs, lambda: policy.log_prob(space.tokens()), lambda: policy.sample(1)):
        with pytest.raises(ValueError, match=rf"{name} must be finite or -inf, with a finite entry in every row .*\[1"):
            call()


@pytest.mark.parametrize("at", [0, 40, 99])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_one_bad_logit_is_found_wherever_it_stands(value, at):
    policy = TabularPolicy(SequenceSpace(100, 1))
    policy.logits.data[0, at] = value
    with pytest.raises(ValueError, match="logits must be finite or -inf"):
        policy.log_probs()
