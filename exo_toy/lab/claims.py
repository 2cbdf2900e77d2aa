"""What is claimed of each loss of the library as a policy that can be computed, to compare a measured optimum with."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import scipy.special
import torch
from torch import Tensor

from exo_toy.lab.optimum import FEWER, LABELLED, pi_star
from exo_toy.lab.subject import Scene, Subject
from exo_toy.losses import LOSSES
from exo_toy.targets import optimal_policy

# Settings under which pi* is far from the edge.
BETA, EPS = 0.5, 0.1
FAR = 60.0
TWO = Scene(torch.tensor([0.6, 0.4], dtype=torch.float64).log(), LABELLED.reward[:2], LABELLED.lengths[:2])


@dataclass(frozen=True)
class Claim:
    """What is claimed, and where it is to be measured.

    Attributes:
        policy: log-probabilities [N] of the optimum; None where there is no closed form.
        text: in words: of the optimum without a closed form, the laboratory's verdict; else where the form holds.
        settings: of the loss.
        scene: completions.
        k: candidates, of losses on lists; 0 for the limit.
    """

    policy: Callable[[Subject, Scene], Tensor] | None = None
    text: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    scene: Scene = LABELLED
    k: int = 2


def win_rates(scene: Scene) -> Tensor:
    """The probability [N] of each completion to be preferred to one of the reference."""
    return (scene.reward[:, None] - scene.reward).sigmoid() @ scene.log_ref.exp()


def settings_of(name: str) -> dict[str, Any]:
    """As recorded in ``LOSSES``, at milder temperatures, and with what the claim asks for."""
    mild = {"beta": BETA, "beta_pi": BETA, "beta_r": 1.0, "label_smoothing": EPS, "tau": BETA}
    recorded = {key: mild.get(key, value) for key, value in LOSSES[name].settings.items()}
    return {**recorded, **claim_of(name).settings}


def claim_of(name: str) -> Claim:
    """What is claimed of a loss of ``LOSSES``: of one that is not listed here, that it misses pi*."""
    return CLAIMS.get(name, Claim(text="not pi*"))


def _normalised(log_pi_of: Callable[[float], Tensor]) -> Tensor:
    """The member of a family that is normalised, by bisection; probabilities fall in the parameter."""
    low, high = -FAR, FAR
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if log_pi_of(middle).logsumexp(-1) > 0 else (low, middle)
    return log_pi_of((low + high) / 2)


def _lambert(x: Tensor) -> Tensor:
    """W with W e^W = x >= 0."""
    return torch.from_numpy(scipy.special.lambertw(x.numpy()).real)


def _margin_of(probability_to_margin: Callable[[Tensor], Tensor]) -> Callable[[Subject, Scene], Tensor]:
    """Two completions whose margin is a function of the probability that the first is preferred."""

    def policy(subject: Subject, scene: Scene) -> Tensor:
        margin = probability_to_margin((scene.reward[0] - scene.reward[1]).sigmoid())
        return (scene.log_ref + torch.stack([margin, -margin]) / (2 * subject.beta_pi)).log_softmax(-1)

    return policy


def _score_inverse(inverse: Callable[[Tensor], Tensor]) -> Callable[[Subject, Scene], Tensor]:
    """beta f'(pi/pi_ref) = r - c; where the inverse of f' is not defined c is too small."""

    def policy(subject: Subject, scene: Scene) -> Tensor:
        def log_pi_of(c: float) -> Tensor:
            return scene.log_ref + inverse(scene.reward / subject.beta_pi - c).nan_to_num(nan=FAR, posinf=FAR)

        return _normalised(log_pi_of)

    return policy


def _at_beta(beta: float) -> Callable[[Subject, Scene], Tensor]:
    return lambda subject, scene: optimal_policy(scene.log_ref, scene.reward, beta=beta)[0]


def _ipo(subject: Subject, scene: Scene) -> Tensor:
    return (scene.log_ref + win_rates(scene) / subject.beta_pi).log_softmax(-1)


def _sppo(subject: Subject, scene: Scene) -> Tensor:
    """The projection: log ratio + c ratio = (P - 1/2)/beta, with c such that the policy is normalised."""
    target = (win_rates(scene) - 0.5) / subject.beta_pi
    return _normalised(lambda log_c: scene.log_ref - log_c + _lambert((target + log_c).exp()).log())


def _two_win_rates(subject: Subject, scene: Scene) -> Tensor:
    return scene.log_ref + (2 * win_rates(scene)).log()


def _logit_of_win_rates(subject: Subject, scene: Scene) -> Tensor:
    return scene.log_ref + (subject.settings["delta"] + win_rates(scene).logit()) / subject.beta_pi


def _by_length(subject: Subject, scene: Scene) -> Tensor:
    return _normalised(lambda c: scene.lengths * (scene.reward / subject.beta_pi - c))


_SMOOTHED = _margin_of(lambda p: torch.logit((1 - 2 * EPS) * p + EPS))
_ROBUST = _margin_of(lambda p: torch.logit((p - EPS) / (1 - 2 * EPS)))
_EXO_PREF = _margin_of(lambda p: (2 * p - 1) * math.log((1 - EPS) / EPS))
_HINGE = _margin_of(lambda p: torch.sign(p - 0.5))
# Shifts that normalise: of win rates, and of the optimal policy.
_DELTA_PAIR = -BETA * (LABELLED.log_ref + win_rates(LABELLED).logit() / BETA).logsumexp(-1).item()
_DELTA = -BETA * optimal_policy(LABELLED.log_ref, LABELLED.reward, beta=BETA)[1].item()
_TWO_COMPLETIONS = "two completions"
_NOT = Claim(text="not pi*")
_BOUNDARY = Claim(text="on the boundary")

CLAIMS: Mapping[str, Claim] = MappingProxyType(
    {
        "dpo": Claim(pi_star),
        "cdpo": Claim(_SMOOTHED, _TWO_COMPLETIONS, scene=TWO),
        "robust_dpo": Claim(_ROBUST, f"{_TWO_COMPLETIONS}, labels not flipped", scene=TWO),
        "exo_pref": Claim(_EXO_PREF, _TWO_COMPLETIONS, scene=TWO),
        "ipo": Claim(_ipo),
        "hinge": Claim(_HINGE, _TWO_COMPLETIONS, scene=TWO),
        "sppo": Claim(_sppo),
        "nca_pair": Claim(_two_win_rates, "beta = 1", {"beta": 1.0}),
        "bco_pair": Claim(_logit_of_win_rates, "delta that normalises", {"delta": _DELTA_PAIR}),
        "apo_zero": _BOUNDARY,
        "apo_down": _NOT,
        "discopop": _NOT,
        "dpop": Claim(lambda _, scene: scene.log_ref, "penalty = 50"),
        "cal_dpo": _NOT,
        "f_dpo_kl_ref_pi": Claim(_score_inverse(lambda s: -torch.log1p(-s))),
        "f_dpo_alpha": Claim(_score_inverse(lambda s: -2 * torch.log1p(-s / 2))),
        "f_dpo_js": Claim(_score_inverse(lambda s: -torch.log(2 * torch.exp(-s) - 1))),
        "chi_po": Claim(_score_inverse(lambda s: _lambert(s.exp()).log())),
        "rebel": Claim(_at_beta(0.5), "eta = 2", {"eta": 2.0}),
        "rpo_squared": Claim(_at_beta(BETA / 2), "eta = 2", {"reward_scale": 2.0}),
        "rpo_kl": Claim(_at_beta(BETA / 2), "eta = 2", {"reward_scale": 2.0}),
        "aot": _NOT,
        "aot_unpaired": _NOT,
        "simpo": Claim(_by_length, "gamma = 0", {"gamma": 0.0, "beta": 2.0}),
        "orpo": _NOT,
        "cpo": Claim(pi_star, "alpha = 0", {"nll_weight": 0.0}),
        "kto": _BOUNDARY,
        "bco": Claim(pi_star, "delta = -beta log Z", {"delta": _DELTA}),
        "dro": Claim(pi_star, "with V = tau log Z"),
        "exo_rw": Claim(pi_star),
        "dpo_rw": Claim(pi_star),
        "alpha_rw": Claim(pi_star),
        "fpo_js": Claim(pi_star),
        "nca_rw": Claim(pi_star, "beta_pi = 1, K to infinity", {"beta_pi": 1.0}, scene=FEWER, k=0),
        "plackett_luce": Claim(pi_star, "K = 3", k=3),
    }
)
