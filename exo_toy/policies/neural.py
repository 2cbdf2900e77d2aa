"""Policies of limited capacity whose prompts share weights: log-bilinear, recurrent, attentive.

Where a prefix has A continuations, what depends on the prefix alone is computed once and broadcast.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from exo_toy import checks
from exo_toy.policies.autoregressive import AutoregressivePolicy, State
from exo_toy.policies.policy import log_softmax
from exo_toy.spaces import SequenceSpace


class LowRankPolicy(AutoregressivePolicy):
    r"""A log-bilinear policy: the logits are linear in the prefix, through a bottleneck of ``rank`` numbers.

    Each prompt and each token has a feature vector of r numbers; a position predicts one from the whole prefix,

    .. math::
        \hat q_t = C_{t,-1} p_x + \sum_{s < t} C_{t,s} q_{y_s}, \qquad
        \pi_\theta(y_t \mid x, y_{<t}) = \mathrm{softmax}(U \hat q_t + b_t)_{y_t}

    so the matrix of the logits of all prefixes has rank r at most beside the biases. Earlier tokens do not interact:
    from r = max(V, X) on, the logits are any sum of terms, one for the prompt and one for each earlier token. Per
    prefix, the backward pass of :meth:`log_probs` keeps about V + r numbers.

    Source: the log-bilinear model of Mnih and Hinton, Three new graphical models for statistical language modelling,
    ICML 2007, with the whole prefix for a context and, as in Mnih and Teh, arXiv:1206.6426, features of their own for
    the predicted tokens.

    Args:
        space: the completions; they need not be few enough to enumerate, except for :meth:`log_probs`.
        rank: r, at least 1.
        n_prompts: X, at least 1.
        generator: of the initial features; None for torch's default generator.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> LowRankPolicy(SequenceSpace(2, 2), 1).log_probs().exp().tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(
        self, space: SequenceSpace, rank: int, *, n_prompts: int = 1, generator: torch.Generator | None = None
    ) -> None:
        checks.require_integer("rank", rank, at_least=1)
        super().__init__(space, n_prompts, width=rank)
        self.rank = rank
        self.prompts = _normal((n_prompts, rank), 1.0, generator)
        self.features = _normal((space.vocab_size, rank), 1.0, generator)
        # From the prompt to every position, then from each position to those after it.
        scale = (rank * space.length) ** -0.5
        self.maps = nn.ParameterList(_normal((n, rank, rank), scale, generator) for n in range(space.length, 0, -1))
        self.outputs = nn.Parameter(torch.zeros(space.vocab_size, rank, dtype=torch.float64))
        self.biases = nn.Parameter(torch.zeros(space.length, space.vocab_size, dtype=torch.float64))

    def _start(self) -> State:
        # What the prefix adds to this position's prediction and to all later ones: [X, n, T - t, r].
        return (torch.einsum("xr,psr->xps", self.prompts, self.maps[0]).unsqueeze(1),)

    def _extend(self, state: State, tokens: Tensor, t: int) -> State:
        added = torch.einsum("vr,psr->vps", self.features, self.maps[t + 1])
        by_token = functional.embedding(tokens, added.flatten(1)).unflatten(-1, added.shape[1:])
        return ((state[0][:, :, 1:].unsqueeze(2) + by_token).flatten(1, 2),)

    def _next(self, state: State, t: int) -> Tensor:
        logits = functional.linear(state[0][:, :, 0], self.outputs, self.biases[t])
        return log_softmax(f"the logits at position {t}", logits)


class GRUPolicy(AutoregressivePolicy):
    r"""A gated recurrent network: all that is known of a prefix is a state of ``width`` numbers.

    .. math::
        z &= \sigma(W^z_{y} + h R^z), \quad r = \sigma(W^r_{y} + h R^r), \quad
        n = \tanh(W^n_{y} + r \odot (h R^n + c)) \\
        h' &= (1 - z) \odot n + z \odot h, \qquad \pi_\theta(\cdot \mid x, y_{<t}) = \mathrm{softmax}(U h_t + b)

    from a first state of each prompt's own. The product with R is computed once for all continuations of a prefix. Per
    prefix, the backward pass of :meth:`log_probs` keeps about V + 4 d numbers.

    Source: Cho et al., arXiv:1406.1078, with the reset gate behind the product, as in :class:`torch.nn.GRUCell`.

    Args:
        space: the completions; they need not be few enough to enumerate, except for :meth:`log_probs`.
        width: d, at least 1.
        n_prompts: X, at least 1.
        generator: of the initial weights; None for torch's default generator.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> GRUPolicy(SequenceSpace(2, 2), 3).log_probs().exp().tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(
        self, space: SequenceSpace, width: int, *, n_prompts: int = 1, generator: torch.Generator | None = None
    ) -> None:
        checks.require_integer("width", width, at_least=1)
        super().__init__(space, n_prompts, width=width)
        self.width = width
        self.prompts = _normal((n_prompts, width), 1.0, generator)
        # Gates in the order of torch.nn.GRUCell: reset, update, candidate.
        self.inputs = _normal((space.vocab_size, 3 * width), 1.0, generator)
        self.recurrent = _normal((width, 3 * width), width**-0.5, generator)
        self.candidate_bias = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.readout = _readout(width, space.vocab_size)

    def _start(self) -> State:
        return (self.prompts.unsqueeze(1),)

    def _extend(self, state: State, tokens: Tensor, t: int) -> State:
        (hidden,) = state
        split = [2 * self.width, self.width]
        gates_in, candidate_in = functional.embedding(tokens, self.inputs).split(split, -1)
        gates_back, candidate_back = (hidden @ self.recurrent).unsqueeze(2).split(split, -1)
        reset, keep = (gates_in + gates_back).sigmoid().chunk(2, -1)
        candidate = (candidate_in + reset * (candidate_back + self.candidate_bias)).tanh()
        return (torch.lerp(candidate, hidden.unsqueeze(2), keep).flatten(1, 2),)

    def _next(self, state: State, t: int) -> Tensor:
        return log_softmax(f"the logits at position {t}", self.readout(state[0]))


class TransformerPolicy(AutoregressivePolicy):
    """A causal Transformer: layer norms before attention and before a GELU network of four times the width.

    The prompt's embedding stands at the first position, token t at position t + 1; positions are learned. A prefix
    computes the keys and values of its last token only, and reads those of its ancestors where they are. Per prefix,
    the backward pass of :meth:`log_probs` keeps about V + 18 d numbers for each layer.

    Source: Vaswani et al., arXiv:1706.03762; Xiong et al., arXiv:2002.04745, for the place of the layer norms.

    Args:
        space: the completions; they need not be few enough to enumerate, except for :meth:`log_probs`.
        width: d, at least 1, a multiple of ``n_heads``.
        n_heads: at least 1.
        n_layers: at least 1.
        n_prompts: X, at least 1.
        generator: of the initial weights; None for torch's default generator.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> TransformerPolicy(SequenceSpace(2, 2), 4, 2, 1).log_probs().exp().tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(
        self,
        space: SequenceSpace,
        width: int,
        n_heads: int,
        n_layers: int,
        *,
        n_prompts: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        checks.require_integer("width", width, at_least=1)
        super().__init__(space, n_prompts, width=width)
        checks.require_integer("n_heads", n_heads, at_least=1)
        checks.require_integer("n_layers", n_layers, at_least=1)
        if width % n_heads:
            raise ValueError(f"width must be a multiple of n_heads, {n_heads}; got {width}")
        self.width = width
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.prompts = _normal((n_prompts, width), 1.0, generator)
        self.embeddings = _normal((space.vocab_size, width), 1.0, generator)
        self.positions = _normal((space.length, width), 1.0, generator)
        self.layers = nn.ModuleList(_Layer(width, n_heads, n_layers, generator) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.readout = _readout(width, space.vocab_size)

    def _start(self) -> State:
        return self._through_layers((self.prompts + self.positions[0]).unsqueeze(1), ())

    def _extend(self, state: State, tokens: Tensor, t: int) -> State:
        last, *cache = state
        inputs = functional.embedding(tokens, self.embeddings) + self.positions[t + 1]
        # Given tokens of every prompt meet the state of the empty prefix as [X, M, 1] and n = 1.
        shape = torch.broadcast_shapes((*last.shape[:2], 1, 1), inputs.shape)
        return self._through_layers(inputs.expand(shape).flatten(1, 2), tuple(cache))

    def _next(self, state: State, t: int) -> Tensor:
        return log_softmax(f"the logits at position {t}", self.readout(self.norm(state[0])))

    def _through_layers(self, x: Tensor, cache: State) -> State:
        """The last layer's output [X, n, d], then keys and values [X, m, 2d] by position, and by layer in each."""
        added = []
        for i, layer in enumerate(self.layers):
            x, keys_and_values = layer(x, cache[i :: self.n_layers])
            added.append(keys_and_values)
        return (x, *cache, *added)


class _Layer(nn.Module):
    """Attention of n prefixes to themselves and their ancestors, and a network for each."""

    def __init__(self, width: int, n_heads: int, n_layers: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(width, dtype=torch.float64)
        self.queries_keys_values = _linear(width, 3 * width, 1.0, generator)
        # The residual stream gets 2 n_layers terms; their sum is of the order of one.
        scale = (2 * n_layers) ** -0.5
        self.attention_out = _linear(width, width, scale, generator)
        self.network_norm = nn.LayerNorm(width, dtype=torch.float64)
        self.network_in = _linear(width, 4 * width, 1.0, generator)
        self.network_out = _linear(4 * width, width, scale, generator)

    def forward(self, x: Tensor, ancestors: State) -> tuple[Tensor, Tensor]:
        """x [X, n, d] and ancestors' keys and values [X, m, 2d], n a multiple of each m -> output, keys and values."""
        width = x.shape[-1]
        queries, keys_and_values = self.queries_keys_values(self.attention_norm(x)).split([width, 2 * width], -1)
        attended = self._attend(queries, (*ancestors, keys_and_values))
        x = x + self.attention_out(attended)
        return x + self.network_out(functional.gelu(self.network_in(self.network_norm(x)))), keys_and_values

    def _attend(self, queries: Tensor, past: State) -> Tensor:
        """Values [X, n, d] averaged over the past; products by broadcasting, so that no ancestor is ever copied."""
        queries = queries.unflatten(-1, (self.n_heads, -1))
        keys, values = zip(*(part.unflatten(-1, (2, self.n_heads, -1)).unbind(2) for part in past), strict=True)
        scores = torch.stack([_by_ancestor(queries, key).mul(key.unsqueeze(2)).sum(-1).flatten(1, 2) for key in keys])
        weights = (scores * queries.shape[-1] ** -0.5).softmax(0)
        attended = torch.zeros_like(queries)
        for weight, value in zip(weights, values, strict=True):
            attended = attended + (_by_ancestor(weight.unsqueeze(-1), value) * value.unsqueeze(2)).flatten(1, 2)
        return attended.flatten(2)


def _by_ancestor(x: Tensor, ancestors: Tensor) -> Tensor:
    """[X, n, ...] grouped by the ancestor [X, m, ...]: [X, m, n / m, ...]."""
    m = ancestors.shape[1]
    return x.unflatten(1, (m, x.shape[1] // max(m, 1)))


def _normal(shape: tuple[int, ...], scale: float, generator: torch.Generator | None) -> nn.Parameter:
    """A parameter of normal numbers."""
    return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))


def _linear(n_in: int, n_out: int, scale: float, generator: torch.Generator | None) -> nn.Linear:
    """Keeps the order of its input's size, times ``scale``; draws from the generator alone."""
    linear = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=torch.float64)
    linear.weight = _normal((n_out, n_in), scale * n_in**-0.5, generator)
    nn.init.zeros_(linear.bias)
    return linear


def _readout(n_in: int, n_out: int) -> nn.Linear:
    """Zero at first: every token equally likely, while what comes before is random."""
    linear = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
