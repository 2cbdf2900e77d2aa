"""Every loss type of TRL 1.16's DPOTrainer against this library: loss and gradient of a tiny random Llama.

Where the two differ a test asserts the difference, and exo_toy/losses/README.md lists it.
"""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

import datasets  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from exo_toy import losses  # noqa: E402

pytestmark = [
    # Other releases have other names and meanings.
    pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason=f"written for TRL 1.16, not {trl.__version__}"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS = "the film was good bad very cat sat on mat and then it ended".split()
# Completions of different lengths, the longer one chosen in some pairs and rejected in others.
PAIRS = [
    {"prompt": "the film", "chosen": " was very very good", "rejected": " was bad"},
    {"prompt": "the cat", "chosen": " sat", "rejected": " sat on the mat and then it ended"},
    {"prompt": "it was very very very", "chosen": " good and good", "rejected": " bad and then good"},
    {"prompt": "then", "chosen": " the cat ended the film", "rejected": " it ended"},
]
BETA = 0.3


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@pytest.fixture(scope="module")
def policy_and_ref(tokenizer):
    """A policy, and a reference near it: some margins are positive and some negative."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5, **sizes, **ids)
    policy = LlamaForCausalLM(config).eval()
    ref = copy.deepcopy(policy)
    for parameter in ref.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return policy, ref


@pytest.fixture
def build(policy_and_ref, tokenizer, tmp_path):
    """A trainer with these settings of its own."""

    def make(**settings):
        config = trl.DPOConfig(
            str(tmp_path),
            beta=settings.pop("beta", BETA),
            per_device_train_batch_size=len(PAIRS),
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        policy, ref = (copy.deepcopy(model) for model in policy_and_ref)
        data = datasets.Dataset.from_list(PAIRS)
        trainer = trl.DPOTrainer(policy, ref, config, train_dataset=data, processing_class=tokenizer)
        trainer.model.eval()
        return trainer

    return make


class Tokens:
    """Of a batch: log-probabilities of the tokens under one model, and the tokens that count, chosen then rejected."""

    def __init__(self, model: torch.nn.Module, batch: dict[str, Tensor]):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        log_p = logits.log_softmax(-1)
        self.logps = log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        self.log_sum_sq_probs = (2 * log_p).logsumexp(-1)
        self.mask = batch["completion_mask"][:, 1:].bool()
        self.lengths = self.mask.sum(-1)

    def sums(self) -> tuple[Tensor, ...]:
        return self.logps.masked_fill(~self.mask, 0.0).sum(-1).chunk(2)

    def means(self) -> tuple[Tensor, ...]:
        return losses.length_normalized(torch.cat(self.sums()), self.lengths).chunk(2)

    def desensitized(self, alpha: float) -> tuple[Tensor, ...]:
        shared = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        return losses.length_desensitized(self.logps, self.mask, shared, alpha=alpha).chunk(2)

    def weights(self) -> Tensor:
        given = (self.logps, self.mask)
        chosen, rejected = losses.wpo_weights(*given, log_sum_sq_probs=self.log_sum_sq_probs).chunk(2)
        return chosen * rejected


def on_sums(loss, **settings):
    """Our loss on sums of log-probabilities, and its mean."""
    settings = {"beta": BETA, **settings}
    return lambda policy, ref: loss(*policy.sums(), *ref.sums(), **settings).losses.mean()


def on_means(loss, **settings):
    settings = {"beta": BETA, **settings}
    return lambda policy, ref: loss(*policy.means(), *ref.means(), **settings).losses.mean()


def likelihood(policy: Tokens, ref: Tokens) -> Tensor:
    """TRL's "sft" is no preference loss: minus the mean over all tokens of the chosen completions."""
    chosen, _ = policy.sums()
    return -chosen.sum() / policy.lengths[: len(chosen)].sum()


def weighted(policy: Tokens, ref: Tokens) -> Tensor:
    dpo = losses.dpo_loss(*policy.sums(), *ref.sums(), beta=BETA).losses
    return (policy.weights() * dpo).mean()


def shortened(policy: Tokens, ref: Tokens) -> Tensor:
    return losses.dpo_loss(*policy.desensitized(0.4), *ref.desensitized(0.4), beta=BETA).losses.mean()


def f_dpo(**settings):
    return on_sums(losses.f_dpo_loss, **settings)


def alpha(value: float):
    return functools.partial(losses.alpha_score, alpha=value)


def scored(loss, **settings):
    return on_sums(losses.scored(loss, score=losses.jensen_shannon_score), **settings)


def normalised_scores(loss):
    """TRL divides the scores of the sums by the lengths; the scores of the means would be something else."""

    def of(policy: Tokens, ref: Tokens) -> Tensor:
        ratios = [losses.jensen_shannon_score(a - b) for a, b in zip(policy.sums(), ref.sums(), strict=True)]
        zero = torch.zeros_like(ratios[0])
        means = [losses.length_normalized(x, n) for x, n in zip(ratios, policy.lengths.chunk(2), strict=True)]
        return loss(*means, zero, zero, beta=BETA).losses.mean()

    return of


FORWARD, JS = {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "js_divergence"}
# TRL's settings, and what is the same here.
CASES = {
    "sigmoid": ({}, on_sums(losses.dpo_loss)),
    "hinge": ({}, on_sums(losses.hinge_loss)),
    "ipo": ({}, on_means(losses.ipo_loss)),
    "exo_pair": ({"label_smoothing": 1e-3}, on_sums(losses.exo_pref_loss, label_smoothing=1e-3)),
    "nca_pair": ({}, on_sums(losses.nca_pair_loss)),
    "robust": ({"label_smoothing": 0.1}, on_sums(losses.robust_dpo_loss, label_smoothing=0.1)),
    "bco_pair": ({}, on_sums(losses.bco_pair_loss, delta=0.0)),
    "sppo_hard": ({}, on_sums(losses.sppo_loss)),
    "aot": ({}, on_sums(losses.aot_loss)),
    "aot_unpaired": ({}, on_sums(losses.aot_unpaired_loss)),
    "apo_zero": ({}, on_sums(losses.apo_zero_loss)),
    "apo_down": ({}, on_sums(losses.apo_down_loss)),
    "discopop": ({"discopop_tau": 0.05}, on_sums(losses.discopop_loss, tau=0.05)),
    "sft": ({}, likelihood),
    "sigmoid_norm": ({}, on_means(losses.dpo_loss)),
}
# The same with TRL's modifiers.
MODIFIED = [
    ("aot", {"label_smoothing": 0.2}, on_sums(losses.smoothed(losses.aot_loss, label_smoothing=0.2))),
    ("sigmoid", FORWARD, f_dpo(score=alpha(0.0))),
    ("sigmoid", JS, f_dpo(score=losses.jensen_shannon_score)),
    (
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        f_dpo(score=alpha(0.3)),
    ),
    ("hinge", FORWARD, on_sums(losses.scored(losses.hinge_loss, score=alpha(0.0)))),
    ("robust", {**JS, "label_smoothing": 0.1}, scored(losses.robust_dpo_loss, label_smoothing=0.1)),
    ("exo_pair", {**JS, "label_smoothing": 0.1}, scored(losses.exo_pref_loss, label_smoothing=0.1)),
    ("discopop", {**JS, "discopop_tau": 0.5}, scored(losses.discopop_loss, tau=0.5)),
    ("ipo", JS, normalised_scores(losses.ipo_loss)),
    ("sigmoid_norm", JS, normalised_scores(losses.dpo_loss)),
    ("sigmoid", {"ld_alpha": 0.4}, shortened),
    ("sigmoid", {"use_weighting": True}, weighted),
]


def theirs(trainer) -> tuple[float, Tensor]:
    """TRL's loss of all pairs, and its gradient."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), False)
    loss.backward()
    return loss.item(), gradient_of(trainer.model)


def ours(trainer, loss) -> tuple[float, Tensor]:
    """Ours, from the same models' logits."""
    trainer.model.zero_grad()
    with torch.no_grad():
        ref = Tokens(trainer.ref_model, batch_of(trainer))
    value = loss(Tokens(trainer.model, batch_of(trainer)), ref)
    value.backward()
    return value.item(), gradient_of(trainer.model)


def batch_of(trainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def gradient_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def assert_same(first: tuple[float, Tensor], second: tuple[float, Tensor]) -> None:
    """float32 throughout: log-probabilities of some 20 nats, their sums and slopes, to some units of 6e-8."""
    assert first[0] == pytest.approx(second[0], rel=1e-5, abs=1e-5)
    assert second[1].norm() > 1e-3
    assert (first[1] - second[1]).norm() < 1e-4 * second[1].norm()


def assert_different(first: tuple[float, Tensor], second: tuple[float, Tensor]) -> None:
    """A hundred times more than what is called the same."""
    assert (first[1] - second[1]).norm() > 1e-2 * second[1].norm()


def test_every_loss_type_is_here():
    field = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    quoted = set(field.replace('"', "'").split("'")[1::2])
    assert quoted == CASES.keys()


def test_margins_differ(build):
    """Otherwise all losses on the margin would look alike."""
    trainer = build()
    with torch.no_grad():
        policy, ref = (Tokens(model, batch_of(trainer)) for model in (trainer.model, trainer.ref_model))
        margins = [a - b for a, b in zip(policy.sums(), ref.sums(), strict=True)]
    margin = BETA * (margins[0] - margins[1])
    assert margin.min() < -0.1 and margin.max() > 0.1
    assert len(set(policy.lengths.tolist())) > 3


@pytest.mark.parametrize("name", CASES)
def test_loss_types(build, name):
    settings, loss = CASES[name]
    trainer = build(loss_type=[name], **settings)
    assert_same(ours(trainer, loss), theirs(trainer))


@pytest.mark.parametrize(
    ("name", "settings", "loss"), MODIFIED, ids=lambda given: "-".join(given) if isinstance(given, dict) else ""
)
def test_modifiers(build, name, settings, loss):
    trainer = build(loss_type=[name], **settings)
    assert_same(ours(trainer, loss), theirs(trainer))


def test_weighted_sums_of_losses(build):
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    trainer = build(loss_type=list(weights), loss_weights=list(weights.values()))

    def mixed(policy, ref):
        return sum(weight * CASES[name][1](policy, ref) for name, weight in weights.items())

    assert_same(ours(trainer, mixed), theirs(trainer))


# Differences


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_label_smoothing_is_ignored_there(build, name):
    plain, smooth = (theirs(build(loss_type=[name], label_smoothing=eps)) for eps in (0.0, 0.2))
    assert_same(smooth, plain)
    loss = {"sigmoid": losses.dpo_loss, "hinge": losses.hinge_loss}[name]
    assert_different(ours(build(), on_sums(losses.smoothed(loss, label_smoothing=0.2))), smooth)


def test_ipo_means_there_and_sums_in_the_paper(build):
    trainer = build(loss_type=["ipo"])
    assert_different(ours(trainer, on_sums(losses.ipo_loss)), theirs(trainer))


def test_bco_has_no_shift_there(build):
    trainer = build(loss_type=["bco_pair"])

    def shifted(policy, ref):
        plain = losses.bco_pair_loss(*policy.sums(), *ref.sums(), beta=BETA, delta=0.0)
        delta = losses.bco_shift(plain.chosen_rewards, plain.rejected_rewards)
        assert delta.abs() > 0.05
        return losses.bco_pair_loss(*policy.sums(), *ref.sums(), beta=BETA, delta=delta).losses.mean()

    assert_different(ours(trainer, shifted), theirs(trainer))


def test_alpha_is_one_minus_the_alpha_of_the_paper(build):
    """And of TRL's own description of the setting; the code has alpha as it is here."""
    trainer = build(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    help_text = trl.DPOConfig.__dataclass_fields__["f_alpha_divergence_coef"].metadata["help"]
    assert "u^-α" in help_text
    assert_same(ours(trainer, f_dpo(score=alpha(0.3))), theirs(trainer))
    published = f_dpo(score=lambda x: (1 - torch.exp(-0.3 * x)) / 0.3)
    assert_different(ours(trainer, published), theirs(trainer))
    assert_same(ours(trainer, published), ours(trainer, f_dpo(score=alpha(0.7))))


def test_label_smoothing_out_of_range(build):
    """There a warning, or none; here an error."""
    refused = [("robust", losses.robust_dpo_loss, 0.5)]
    refused += [("exo_pair", losses.exo_pref_loss, eps) for eps in (-0.1, 1.5)]
    for name, loss, eps in refused:
        assert not math.isfinite(theirs(build(loss_type=[name], label_smoothing=eps))[0])
        with pytest.raises(ValueError, match="label_smoothing"):
            ours(build(), on_sums(loss, label_smoothing=eps))


def given_log_ratios(trainer, chosen: float, rejected: float) -> tuple[float, Tensor]:
    """TRL's loss of one pair of one token each with these log ratios, and its slopes."""
    leaf = torch.tensor([[chosen], [rejected]], requires_grad=True)
    ids = torch.tensor([[1, 4], [1, 5]])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=torch.tensor([[0, 1], [0, 1]]))

    def outputs(log_probs):
        zero = torch.zeros_like(log_probs).detach()
        return lambda **_: SimpleNamespace(
            log_probs=log_probs, entropy=zero, log_sum_sq_probs=zero, mean_logits=zero, is_top1=zero.bool()
        )

    trainer.ref_model = outputs(torch.zeros(2, 1))
    loss = trainer._compute_loss(outputs(leaf), batch, False)
    (slopes,) = torch.autograd.grad(loss, leaf)
    return loss.item(), slopes[:, 0]


def here(loss, chosen: float, rejected: float, **settings) -> tuple[float, Tensor]:
    leaves = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    zero = torch.zeros(1)
    value = loss(*leaves, zero, zero, beta=BETA, **settings).losses
    return value.item(), torch.cat(torch.autograd.grad(value.sum(), leaves))


def test_pairs_of_one_token_go_through_trl_as_they_are(build):
    """The two helpers above agree where TRL's formulas do."""
    for got, wanted in zip(given_log_ratios(build(), 1.0, -2.0), here(losses.dpo_loss, 1.0, -2.0), strict=True):
        assert torch.allclose(torch.as_tensor(got), torch.as_tensor(wanted), rtol=1e-6)


def test_discopop_of_a_misordered_pair(build):
    """There infinity times zero; here what DiscoPOP says, DPO's loss."""
    value, _ = given_log_ratios(build(loss_type=["discopop"]), -400.0, 0.0)
    assert math.isnan(value)
    value, slopes = here(losses.discopop_loss, -400.0, 0.0, tau=0.05)
    assert value == pytest.approx(400 * BETA)
    assert slopes.tolist() == pytest.approx([-BETA, BETA])


def test_alpha_divergence_of_large_ratios(build):
    """There the exponent is clamped at 80 and the gradient is lost beyond; here it is not."""
    settings = dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    _, slopes = given_log_ratios(build(**settings), 0.0, 81.0)
    assert slopes[1] == 0
    _, slopes = here(losses.f_dpo_loss, 0.0, 81.0, score=alpha(2.0))
    assert slopes[1].item() == pytest.approx(BETA * math.exp(81.0), rel=1e-4)
