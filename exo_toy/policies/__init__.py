"""Policies over the completions of a space, one distribution per prompt.

A policy is a module with three methods: ``log_probs() -> [X, N]``, ``log_prob(tokens) -> [X, M]`` and
``sample(n, generator) -> [X, n, T]``. Everything else takes the table that ``log_probs`` returns, so any module with
these three can stand in for the ones here.

* :class:`TabularPolicy`, :class:`KGramPolicy`: free logits, -inf allowed (probability zero, exactly); a table of its
  own for every prompt.
* :class:`LowRankPolicy`, :class:`GRUPolicy`, :class:`TransformerPolicy`: weights shared by all prompts. They compute
  what follows a prefix once for all completions that begin with it.

Parameters are float64. All policies start with every next token (or completion, of a table) equally likely.

Many policies of one shape run side by side through ``torch.func``, which calls a policy as a function::

    parameters, buffers = torch.func.stack_module_state(policies)
    one = copy.deepcopy(policies[0]).to("meta")
    tables = torch.func.vmap(lambda *state: torch.func.functional_call(one, state, ()))(parameters, buffers)
"""

from exo_toy.policies.neural import GRUPolicy, LowRankPolicy, TransformerPolicy
from exo_toy.policies.policy import Policy, SequencePolicy
from exo_toy.policies.tables import KGramPolicy, TabularPolicy, closest_kgram

__all__ = [
    "GRUPolicy",
    "KGramPolicy",
    "LowRankPolicy",
    "Policy",
    "SequencePolicy",
    "TabularPolicy",
    "TransformerPolicy",
    "closest_kgram",
]
