"""LowRankPolicy, GRUPolicy, TransformerPolicy: step-by-step oracles, shared prefixes, transforms, samples, capacity.

The oracles run every completion by itself and every prefix from its beginning, through torch's own modules where torch
has them. Where a law holds for all policies, those made of tables are tested with them.
"""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from exo_toy.policies import (
    GRUPolicy,
    KGramPolicy,
    LowRankPolicy,
    Policy,
    TabularPolicy,
    TransformerPolicy,
    autoregressive,
)
from exo_toy.spaces import SequenceSpace
from exo_toy.training import minimize
from tests import sequence_oracles, sequence_strategies
from tests.tolerances import assert_close

NEURAL = {
    "low_rank": lambda space, **options: LowRankPolicy(space, 2, **options),
    "gru": lambda space, **options: GRUPolicy(space, 5, **options),
    "transformer": lambda space, **options: TransformerPolicy(space, 6, 2, 2, **options),
}
TABLES = {
    "tabular": lambda space, *, n_prompts, generator: TabularPolicy(space, n_prompts=n_prompts),
    "kgram": lambda space, *, n_prompts, generator: KGramPolicy(space, 1, n_prompts=n_prompts),
}
EACH_EOS = [None, 0, 1, 3]
neural_policies = pytest.mark.parametrize("build", NEURAL.values(), ids=NEURAL)
all_policies = pytest.mark.parametrize("build", [*NEURAL.values(), *TABLES.values()], ids=[*NEURAL, *TABLES])
each_eos = pytest.mark.parametrize("eos", EACH_EOS)


def randomised(
    build: Callable[..., nn.Module], space: SequenceSpace, *, n_prompts: int = 1, seed: int = 0
) -> nn.Module:
    """A policy of which no parameter is where it began: the readout would hide all that comes before it."""
    generator = torch.Generator().manual_seed(seed)
    policy = build(space, n_prompts=n_prompts, generator=generator)
    for parameter in policy.parameters():
        parameter.data += 0.5 * sequence_strategies.normal(tuple(parameter.shape), generator)
    return policy


@st.composite
def neural(draw: st.DrawFn) -> Callable[[], nn.Module]:
    """How to build a policy: the run-time checks of annotations draw random numbers, which is not allowed in here."""
    space = draw(sequence_strategies.spaces(max_vocab=3, max_length=4))
    kind = draw(st.sampled_from(sorted(NEURAL)))
    n_prompts = draw(sequence_strategies.prompt_counts(space).filter(lambda size: size <= 4))
    return partial(randomised, NEURAL[kind], space, n_prompts=n_prompts, seed=draw(st.integers(0, 2**32 - 1)))


def functions(policy: nn.Module) -> nn.Module:
    """The same policy for torch.func: no parameters of its own."""
    return copy.deepcopy(policy).to("meta")


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# The oracles: logits [V] of the token that follows a prefix


def low_rank_logits(policy: LowRankPolicy, x: int, prefix: tuple[int, ...]) -> Tensor:
    t = len(prefix)
    features = [policy.prompts[x], *(policy.features[token] for token in prefix)]
    predicted = sum(policy.maps[s][t - s] @ feature for s, feature in enumerate(features))
    return policy.outputs @ predicted + policy.biases[t]


def gru_logits(policy: GRUPolicy, x: int, prefix: tuple[int, ...]) -> Tensor:
    none = torch.zeros_like(policy.candidate_bias)
    weights = {
        "weight_ih": policy.inputs.T,
        "weight_hh": policy.recurrent.T,
        "bias_ih": torch.cat([none, none, none]),
        "bias_hh": torch.cat([none, none, policy.candidate_bias]),
    }
    cell = nn.GRUCell(len(policy.inputs), policy.width, device=none.device, dtype=torch.float64)
    hidden = policy.prompts[x]
    for token in prefix:
        one_hot = torch.eye(len(policy.inputs), device=none.device, dtype=torch.float64)[token]
        hidden = torch.func.functional_call(cell, weights, (one_hot, hidden))
    return policy.readout.weight @ hidden + policy.readout.bias


def transformer_logits(policy: TransformerPolicy, x: int, prefix: tuple[int, ...]) -> Tensor:
    stream = torch.stack([policy.prompts[x], *(policy.embeddings[token] for token in prefix)])
    stream = (stream + policy.positions[: len(stream)]).unsqueeze(0)
    mask = torch.ones(2 * [stream.shape[1]], dtype=torch.bool, device=stream.device).triu(1)
    block = nn.TransformerEncoderLayer(
        policy.width,
        policy.n_heads,
        4 * policy.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        device=stream.device,
        dtype=torch.float64,
    )
    for layer in policy.layers:
        weights = {
            "self_attn.in_proj_weight": layer.queries_keys_values.weight,
            "self_attn.in_proj_bias": layer.queries_keys_values.bias,
            "self_attn.out_proj.weight": layer.attention_out.weight,
            "self_attn.out_proj.bias": layer.attention_out.bias,
            "linear1.weight": layer.network_in.weight,
            "linear1.bias": layer.network_in.bias,
            "linear2.weight": layer.network_out.weight,
            "linear2.bias": layer.network_out.bias,
            "norm1.weight": layer.attention_norm.weight,
            "norm1.bias": layer.attention_norm.bias,
            "norm2.weight": layer.network_norm.weight,
            "norm2.bias": layer.network_norm.bias,
        }
        stream = torch.func.functional_call(block, weights, (stream,), {"src_mask": mask}, strict=True)
    return policy.readout.weight @ policy.norm(stream[0, -1]) + policy.readout.bias


ORACLES = {LowRankPolicy: low_rank_logits, GRUPolicy: gru_logits, TransformerPolicy: transformer_logits}


def one_by_one(policy: nn.Module, strings: list[sequence_oracles.Completion]) -> Tensor:
    """Log-probabilities [X, M], every completion by itself and every step from the beginning."""
    logits = ORACLES[type(policy)]
    rows = []
    for x in range(policy.n_prompts):
        row = []
        for string in strings:
            length = sequence_oracles.length(string, policy.space.eos)
            steps = [logits(policy, x, string[:t]).log_softmax(-1)[string[t]] for t in range(length)]
            row.append(torch.stack(steps).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def load(policy: nn.Module, **values: list) -> None:
    policy.load_state_dict(
        {name.replace("__", "."): torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    )


def test_oracle_of_the_low_rank_policy_by_hand():
    policy = LowRankPolicy(SequenceSpace(2, 3), 1, n_prompts=2)
    load(
        policy,
        prompts=[[1.0], [-2.0]],
        features=[[0.5], [3.0]],
        maps__0=[[[1.0]], [[10.0]], [[100.0]]],
        maps__1=[[[2.0]], [[20.0]]],
        maps__2=[[[4.0]]],
        outputs=[[1.0], [-1.0]],
        biases=[[0.0, 0.1], [0.0, 0.2], [0.0, 0.3]],
    )
    # -2 from the prompt; -20 and 3 * 2 = 6 at the second position; -200, 3 * 20 = 60 and 0.5 * 4 = 2 at the third.
    for prefix, predicted, bias in (((), -2.0, 0.1), ((1,), -14.0, 0.2), ((1, 0), -138.0, 0.3)):
        assert_close(low_rank_logits(policy, 1, prefix), [predicted, -predicted + bias])


def test_oracle_of_the_gru_by_hand():
    policy = GRUPolicy(SequenceSpace(2, 2), 1)
    load(
        policy,
        prompts=[[0.5]],
        inputs=[[9.0, 9.0, 9.0], [0.1, 0.2, 0.3]],
        recurrent=[[1.0, 2.0, 3.0]],
        candidate_bias=[0.4],
        readout__weight=[[1.0], [2.0]],
        readout__bias=[0.0, 5.0],
    )
    reset, keep = 1 / (1 + math.exp(-0.6)), 1 / (1 + math.exp(-1.2))
    hidden = (1 - keep) * math.tanh(0.3 + reset * (0.5 * 3 + 0.4)) + keep * 0.5
    assert_close(gru_logits(policy, 0, (1,)), [hidden, 2 * hidden + 5])


def test_oracle_of_the_transformer_by_hand():
    policy = TransformerPolicy(SequenceSpace(2, 2), 2, 1, 1)
    for parameter in policy.parameters():
        parameter.data.zero_()
    (layer,) = policy.layers
    # Their norms are (1, -1) and (-1, 1), to within the eps of 1e-5 in a variance of 1e4.
    policy.prompts.data[:] = torch.tensor([100.0, -100.0])
    policy.embeddings.data[1] = torch.tensor([-100.0, 100.0])
    layer.attention_norm.weight.data.fill_(1.0)
    # Values: 4 + 6 for the prompt, 4 - 6 for the token. Keys: 1 and -1, so that weights are as 3 to 1.
    layer.queries_keys_values.weight.data[4, 0] = 6.0
    layer.queries_keys_values.bias.data[4] = 4.0
    layer.queries_keys_values.weight.data[2, 0] = 1.0
    layer.queries_keys_values.bias.data[0] = math.log(3) / 2 * math.sqrt(2)
    layer.attention_out.weight.data[0, 0] = 1.0
    # The network adds a tenth of gelu(50) = 50.
    layer.network_in.bias.data[0] = 50.0
    layer.network_out.weight.data[0, 0] = 0.1
    # With so large an eps the last norm takes the mean away, and that is all.
    policy.norm.eps = 1e14
    policy.norm.weight.data.fill_(1e7)
    policy.readout.weight.data[:] = torch.eye(2)
    # The prompt alone: (100 + 10 + 5, -100). After the token: (-100 + 3/4 * 10 - 1/4 * 2 + 5, 100) = (-88, 100).
    assert transformer_logits(policy, 0, ()).tolist() == pytest.approx([107.5, -107.5], abs=1e-6)
    assert transformer_logits(policy, 0, (1,)).tolist() == pytest.approx([-94.0, 94.0], abs=1e-6)


# Log-probabilities and their gradients


@given(build=neural())
def test_all_completions_agree_with_one_by_one(device, build):
    policy = build().to(device)
    strings = sequence_strategies.completions(policy.space)
    log_probs, expected = policy.log_probs(), one_by_one(policy, strings)
    assert log_probs.dtype == torch.float64
    assert_close(log_probs, expected)
    assert_close(log_probs.logsumexp(-1), torch.zeros(policy.n_prompts, dtype=torch.float64))
    weights = torch.linspace(-1, 1, log_probs.numel(), dtype=torch.float64, device=device).reshape(log_probs.shape)
    parameters = list(policy.parameters())
    gradients, wanted = (
        torch.autograd.grad((weights * table).mean(), parameters, materialize_grads=True)
        for table in (log_probs, expected)
    )
    for gradient, one in zip(gradients, wanted, strict=True):
        assert_close(gradient, one)


@given(build=neural(), data=st.data())
def test_given_completions_agree_with_the_table(device, build, data):
    policy = build().to(device)
    space = policy.space
    index = torch.tensor(data.draw(st.lists(st.integers(0, space.size - 1), max_size=8)), dtype=torch.int64)
    for tokens in (space.tokens(index), space.tokens(index).to(torch.int8)):
        assert_close(policy.log_prob(tokens.to(device)), policy.log_probs()[:, index])


@each_eos
@all_policies
def test_each_prompt_may_have_completions_of_its_own(device, build, eos):
    space = SequenceSpace(4, 3, eos)
    policy = randomised(build, space, n_prompts=2).to(device)
    index = torch.randint(space.size, (2, 7), generator=torch.Generator().manual_seed(0))
    assert_close(policy.log_prob(space.tokens(index).to(device)), policy.log_probs().gather(1, index.to(device)))
    shared = space.tokens(index[0]).to(device)
    assert_close(policy.log_prob(shared.expand(2, -1, -1)), policy.log_prob(shared))


AUTOREGRESSIVE = [*NEURAL.values(), TABLES["kgram"]]
autoregressive_policies = pytest.mark.parametrize("build", AUTOREGRESSIVE, ids=[*NEURAL, "kgram"])


@each_eos
@autoregressive_policies
def test_tokens_have_the_conditionals_of_the_table(device, build, eos):
    """Of the completions that agree up to a token: the share of those that agree in it too. After the end it is 0."""
    space = SequenceSpace(4, 3, eos)
    policy = randomised(build, space, n_prompts=2).to(device)
    strings, p = sequence_strategies.completions(space), policy.log_probs().exp().tolist()
    expected = [
        [
            [
                math.log(
                    math.fsum(
                        mass for mass, other in zip(row, strings, strict=True) if other[: t + 1] == string[: t + 1]
                    )
                    / math.fsum(mass for mass, other in zip(row, strings, strict=True) if other[:t] == string[:t])
                )
                if t < sequence_oracles.length(string, eos)
                else 0.0
                for t in range(3)
            ]
            for string in strings
        ]
        for row in p
    ]
    found = policy.token_log_probs(space.tokens().to(device))
    assert found.dtype == torch.float64
    assert_close(found.flatten(1), torch.tensor(expected, dtype=torch.float64).flatten(1))
    assert (found[:, ~space.counted(space.tokens())] == 0.0).all()


@each_eos
@autoregressive_policies
def test_tokens_sum_to_their_completion(device, build, eos):
    """Shared completions and each prompt's own, with gradients."""
    space = SequenceSpace(4, 3, eos)
    policy = randomised(build, space, n_prompts=2).to(device)
    index = torch.randint(space.size, (2, 7), generator=torch.Generator().manual_seed(0))
    for tokens in (space.tokens(index), space.tokens(index[0]), space.tokens(index).to(torch.int8)):
        tokens = tokens.to(device)
        of_tokens = policy.token_log_probs(tokens)
        assert of_tokens.shape == (2, 7, 3) and (of_tokens <= 0).all()
        assert_close(of_tokens.sum(-1), policy.log_prob(tokens))
    wanted, found = (
        torch.autograd.grad(values.square().sum(), list(policy.parameters()), materialize_grads=True)
        for values in (
            policy.log_probs().gather(-1, index.to(device)),
            policy.token_log_probs(space.tokens(index).to(device)).sum(-1),
        )
    )
    for gradient, one in zip(found, wanted, strict=True):
        assert_close(gradient, one, scale=one.abs().max().item())


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(1, 2, dtype=torch.int64), torch.full((2, 3), 4)])
def test_tokens_that_are_no_completions_are_refused(bad):
    policy = TABLES["kgram"](SequenceSpace(4, 3), n_prompts=1, generator=None)
    with pytest.raises(ValueError, match="tokens must"):
        policy.token_log_probs(bad)


@pytest.mark.parametrize("eos", [None, 3])
@neural_policies
def test_spaces_too_large_to_enumerate(build, eos):
    policy = randomised(build, SequenceSpace(8, 30, eos), n_prompts=2)
    tokens = policy.sample(2, torch.Generator().manual_seed(0)).flatten(0, 1)
    assert_close(policy.log_prob(tokens), one_by_one(policy, [tuple(row) for row in tokens.tolist()]))
    with pytest.raises(ValueError, match=rf"{type(policy).__name__}\.log_probs .* above the space's memory_budget"):
        policy.log_probs()


@pytest.mark.parametrize("eos", [None, 1])
@neural_policies
def test_log_probabilities_differentiate_twice(build, eos):
    space = SequenceSpace(3, 3, eos)
    policy = randomised(build, space, n_prompts=2)
    names = [name for name, _ in policy.named_parameters()]
    parameters = tuple(parameter.detach().requires_grad_() for parameter in policy.parameters())

    def table(*values):
        return torch.func.functional_call(policy, dict(zip(names, values, strict=True)), ())

    assert torch.autograd.gradcheck(table, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(table, parameters, fast_mode=True)


# Prefixes


@each_eos
@pytest.mark.parametrize("block", [1, 100, 2**19])
@neural_policies
def test_every_prefix_is_evaluated_once_whatever_the_blocks(build, block, eos, monkeypatch):
    space = SequenceSpace(4, 4, eos)
    policy = randomised(build, space, n_prompts=2)
    expected = policy.log_probs()
    rows = []
    original = type(policy)._next

    def counted(self, state, t):
        log_probs = original(self, state, t)
        rows.append((t, log_probs.shape[1]))
        return log_probs

    monkeypatch.setattr(type(policy), "_next", counted)
    monkeypatch.setattr(autoregressive, "BLOCK", block)
    assert_close(policy.log_probs(), expected)
    counts = [sum(n for position, n in rows if position == t) for t in range(4)]
    assert counts == [space.n_live**t for t in range(4)]
    assert len(rows) == 4 if block == 2**19 else len(rows) > 4


@each_eos
def test_keys_and_values_stand_once_for_all_that_share_them(eos):
    space = SequenceSpace(4, 4, eos)
    policy = randomised(NEURAL["transformer"], space, n_prompts=2)
    read = []
    policy.layers[1].register_forward_hook(lambda layer, arguments, output: read.append((*arguments[1], output[1])))
    policy.log_probs()
    assert [[part.shape[1] for part in past] for past in read] == [
        [space.n_live**s for s in range(t + 1)] for t in range(4)
    ]
    # The same memory from one position to the next.
    for past, longer in itertools.pairwise(read):
        assert [part.data_ptr() for part in past] == [part.data_ptr() for part in longer[:-1]]


@each_eos
@neural_policies
def test_what_is_said_of_the_first_tokens_does_not_depend_on_later_ones(build, eos):
    """The distribution of completions cut short is that of the policy with its later positions taken away."""
    long, short = SequenceSpace(4, 4, eos), SequenceSpace(4, 2, eos)
    policy = randomised(build, long, n_prompts=2)
    shorter = build(short, n_prompts=2)
    state = policy.state_dict()
    for name, wanted in shorter.state_dict().items():
        state[name] = state[name][: len(wanted)]
    shorter.load_state_dict({name: state[name] for name in shorter.state_dict()})
    first = short.index(long.tokens()[:, :2])
    mass = torch.zeros(2, short.size, dtype=torch.float64).index_add(1, first, policy.log_probs().exp())
    assert_close(shorter.log_probs(), mass.log())


# Prompts


@neural_policies
def test_a_prompt_is_known_by_its_vector_alone(build):
    space = SequenceSpace(3, 4, eos=1)
    policy = randomised(build, space, n_prompts=5)
    log_probs = policy.log_probs()
    for x in range(5):
        alone = build(space, n_prompts=1)
        alone.load_state_dict({**policy.state_dict(), "prompts": policy.prompts[x : x + 1]})
        assert_close(alone.log_probs()[0], log_probs[x])
        others = torch.cat([log_probs[:x], log_probs[x + 1 :]])
        assert ((others - log_probs[x]).abs().amax(-1) > 1e-3).all()


# Construction


@neural_policies
def test_policies_start_uniform_and_random_beneath(build):
    space = SequenceSpace(3, 4, eos=0)
    before = torch.get_rng_state()
    policy, again, other = (
        build(space, n_prompts=2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(policy, Policy)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float64}
    for name, parameter in policy.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])
    assert not torch.equal(policy.prompts, other.prompts)
    lengths = [sequence_oracles.length(string, 0) for string in sequence_strategies.completions(space)]
    assert_close(policy.log_probs(), 2 * [[-length * math.log(3) for length in lengths]])
    assert build(space).log_probs().shape == (1, space.size)
    # The start is no stationary point.
    gradients = torch.autograd.grad(policy.log_probs()[0, 5], list(policy.parameters()), allow_unused=True)
    assert any((gradient != 0).any() for gradient in gradients if gradient is not None)


# Side by side


@pytest.mark.parametrize("eos", [None, 1])
@all_policies
def test_stacked_policies_equal_a_loop_over_them(build, eos):
    space = SequenceSpace(3, 3, eos)
    policies = [randomised(build, space, n_prompts=2, seed=seed) for seed in range(4)]
    stacked = torch.func.stack_module_state(policies)
    function = functions(policies[0])
    assert all(parameter.is_meta for parameter in function.parameters())

    tables = torch.func.vmap(lambda *state: torch.func.functional_call(function, state, ()))(*stacked)
    assert_close(tables, torch.stack([policy.log_probs() for policy in policies]))
    gradients = torch.autograd.grad(tables.sin().sum(), list(stacked[0].values()))
    for policy, *of_one in zip(policies, *gradients, strict=True):
        expected = torch.autograd.grad(policy.log_probs().sin().sum(), list(policy.parameters()))
        for gradient, wanted in zip(of_one, expected, strict=True):
            assert_close(gradient, wanted)

    tokens = torch.stack([policy.sample(5, torch.Generator().manual_seed(0)) for policy in policies])

    def score(parameters, buffers, tokens):
        return torch.func.functional_call(function, (parameters, buffers), (tokens,))

    scores = torch.func.vmap(score)(*stacked, tokens)
    assert_close(scores, torch.stack([policy.log_prob(own) for policy, own in zip(policies, tokens, strict=True)]))
    by_function = torch.func.vmap(torch.func.grad(lambda *state: score(*state).sin().sum()))(*stacked, tokens)
    wanted = torch.autograd.grad(scores.sin().sum(), list(stacked[0].values()))
    for gradient, one in zip(by_function.values(), wanted, strict=True):
        assert_close(gradient, one)


# Samples


@each_eos
@neural_policies
def test_samples_follow_the_policy(device, build, eos):
    space, n = SequenceSpace(4, 3, eos), 20_000
    policy = randomised(build, space, n_prompts=2).to(device)
    tokens = policy.sample(n, torch.Generator(device).manual_seed(1))
    assert tokens.shape == (2, n, 3)
    assert tokens.dtype == torch.int64
    index = space.index(tokens)
    # Exceeded with probability below 1e-9 by the two prompts together (Dvoretzky, Kiefer, Wolfowitz, Massart).
    bound = math.sqrt(math.log(2 * 2 / 1e-9) / (2 * n))
    for x, log_p in enumerate(policy.log_probs().detach()):
        frequencies = torch.bincount(index[x], minlength=space.size) / n
        assert (frequencies.cumsum(-1) - log_p.exp().cumsum(-1)).abs().max() < bound


@neural_policies
def test_samples_come_from_the_generator_alone(build):
    policy = randomised(build, SequenceSpace(3, 4), n_prompts=2)
    before = torch.get_rng_state()
    first, again, other = (policy.sample(9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    assert policy.sample(9).shape == (2, 9, 4)


# Capacity


def test_logits_of_the_low_rank_policy_have_its_rank():
    policy = randomised(NEURAL["low_rank"], SequenceSpace(5, 4), n_prompts=3)
    last = policy.log_probs().reshape(-1, 5)
    # Neither the probability of the prefix nor the normaliser nor the biases survive these differences.
    logits = last - last[:, :1]
    singular = torch.linalg.svdvals(logits - logits[:1])
    assert singular[1] > 0.1
    assert singular[2] < 1e-12 * singular[0]


def exclusive_or(space: SequenceSpace, noise: float) -> Tensor:
    """Two fair bits, and a third that is different from 'do they differ' with probability ``noise``."""
    first, second, third = space.tokens().unbind(-1)
    return torch.where((first ^ second) == third, 1 - noise, noise).double().log() - 2 * math.log(2)


def test_earlier_tokens_do_not_interact_in_the_low_rank_policy():
    """By symmetry and convexity its best third bit is a fair one, at any rank; the others learn the rule."""
    space, noise = SequenceSpace(2, 3), 0.1
    log_p = exclusive_or(space, noise)
    information = math.log(2) + noise * math.log(noise) + (1 - noise) * math.log(1 - noise)
    distances = {}
    for kind in ("low_rank", "gru", "transformer"):
        policy = NEURAL[kind](space, generator=torch.Generator().manual_seed(0))
        found = minimize(policy, lambda log_pi: kl(log_p, log_pi).sum(), max_iterations=150, certify=False)
        distances[kind] = found.value
    assert distances["low_rank"] == pytest.approx(information, abs=1e-6)
    assert distances["gru"] < 1e-3
    assert distances["transformer"] < 1e-3


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (lambda *a, **k: GRUPolicy(*a, 16, **k), lambda *a, **k: GRUPolicy(*a, 1, **k)),
        (lambda *a, **k: TransformerPolicy(*a, 16, 2, 1, **k), lambda *a, **k: TransformerPolicy(*a, 2, 1, 1, **k)),
    ],
    ids=["gru", "transformer"],
)
def test_a_wide_policy_fits_any_target_and_a_narrow_one_does_not(wide, narrow, eos):
    space = SequenceSpace(3, 3, eos)
    log_p = sequence_strategies.normal((2, space.size), torch.Generator().manual_seed(0)).log_softmax(-1)

    def distance(build: Callable[..., nn.Module]) -> float:
        policy = build(space, n_prompts=2, generator=torch.Generator().manual_seed(0))
        return minimize(policy, lambda log_pi: kl(log_p, log_pi).mean(), max_iterations=150, certify=False).value

    assert distance(wide) < 1e-3
    assert distance(narrow) > 1e-2


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda space: LowRankPolicy(space, 0), "rank must be an integer of at least 1; got 0"),
        (lambda space: LowRankPolicy(space, 1, n_prompts=0), "n_prompts must be an integer of at least 1; got 0"),
        (lambda space: GRUPolicy(space, 0), "width must be an integer of at least 1; got 0"),
        (lambda space: GRUPolicy(space, 2.0), r"width must be an integer of at least 1; got 2\.0"),
        (lambda space: TransformerPolicy(space, -4, 2, 1), "width must be an integer of at least 1; got -4"),
        (lambda space: TransformerPolicy(space, 4, 0, 1), "n_heads must be an integer of at least 1; got 0"),
        (lambda space: TransformerPolicy(space, 4, 2, 0), "n_layers must be an integer of at least 1; got 0"),
        (lambda space: TransformerPolicy(space, 4, 3, 1), "width must be a multiple of n_heads, 3; got 4"),
    ],
)
def test_construction_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build(SequenceSpace(2, 3))


@pytest.mark.unchecked
@all_policies
def test_methods_refuse(build):
    policy = build(SequenceSpace(2, 3), n_prompts=2, generator=None)
    wanted = r"tokens must have shape \[M, 3\], or \[2, M, 3\] with completions for every prompt; got "
    for shape, got in (((3,), r"\[3\]"), ((3, 4, 3), r"\[3, 4, 3\]"), ((1, 2, 4, 3), r"\[1, 2, 4, 3\]")):
        with pytest.raises(ValueError, match=wanted + got):
            policy.log_prob(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must have shape \[\.\.\., 3\]; got \[1, 2\]"):
        policy.log_prob(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.1; got 2"):
        policy.log_prob(torch.full((1, 3), 2))
    with pytest.raises(ValueError, match="n must be an integer of at least 1; got 0"):
        policy.sample(0)


@neural_policies
def test_parameters_that_define_no_distribution_are_refused(build):
    policy = randomised(build, SequenceSpace(2, 3), n_prompts=3)
    policy.prompts.data[1, 0] = math.nan
    tokens = policy.space.tokens()
    for call in (policy.log_probs, lambda: policy.log_prob(tokens), lambda: policy.sample(1)):
        with pytest.raises(
            ValueError, match=r"the logits at position 0 must be finite .* not so in the row at \[1, 0\]"
        ):
            call()
