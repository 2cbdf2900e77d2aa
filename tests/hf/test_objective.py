"""Every loss of the library by name: what it makes of a batch, of a step however it is split, and what it refuses."""

import copy
import itertools
import math

import pytest
import torch

from exo_toy import losses
from exo_toy.integrations.candidates import tokenize_row
from exo_toy.integrations.config import LOSSES, LOSSES_ON_LABELS, LOSSES_ON_PAIRS, CandidateConfig
from exo_toy.integrations.objective import anchor_of, candidate_losses, candidate_metrics, label_sums
from exo_toy.integrations.trainer import CandidateTrainer
from exo_toy.losses import LOSSES as RECORDS
from tests.hf.conftest import tiny_llama
from tests.hf.training import LABELS, PAIRS, ROWS, settings, trained, weights
from tests.tolerances import assert_close

FIELDS = ("beta", "beta_r", "beta_pi", "label_smoothing")
MASK = torch.tensor([[True, True, True], [True, True, False], [False, True, True]])
# No two rewards of a prompt are equal: they rank the candidates, too.
RANKED = [{**row, "rewards": [reward + j / 100 for j, reward in enumerate(row["rewards"])]} for row in ROWS]


def given(loss):
    """The settings of a loss as a user writes them; what can be estimated is left out."""
    record = RECORDS[loss]
    plain = {name: value for name, value in record.settings.items() if not callable(value)}
    for name in ("reference_point", "delta"):
        plain.pop(name, None)
    named = {name: plain.pop(name) for name in FIELDS if name in plain}
    return {"loss": loss, **named, **({"loss_kwargs": plain} if plain else {})}


def rows_of(loss):
    return PAIRS if loss in LOSSES_ON_PAIRS else LABELS if loss in LOSSES_ON_LABELS else RANKED


def config(loss, **more):
    return CandidateConfig("out", use_cpu=True, report_to="none", **{**given(loss), **more})


def tables(k, seed=0):
    draw = torch.Generator().manual_seed(seed)
    policy, ref = (-5 * torch.rand(3, k, dtype=torch.float64, generator=draw) for _ in range(2))
    rewards = torch.randn(3, k, dtype=torch.float64, generator=draw)
    return policy.requires_grad_(), ref, rewards


def by_hand(loss, policy, ref, rewards, mask, lengths, anchor):
    """The loss of each prompt, from single numbers and the library's function."""
    record = RECORDS[loss]
    settings = {**record.settings}
    if loss in ("kto", "bco", "bco_pair"):
        settings["reference_point" if loss == "kto" else "delta"] = anchor
    found = []
    for b in range(len(policy)):
        kept = mask[b].nonzero().squeeze(1)
        p, r, rho = policy[b, kept], ref[b, kept], rewards[b, kept]
        if record.kind == "pair":
            found.append(record.function(*p.view(2, 1), *r.view(2, 1), **settings).losses[0])
        elif record.kind == "reference-free":
            tokens = [] if loss == "cpo" else lengths[b].view(2, 1)
            found.append(record.function(*p.view(2, 1), *tokens, **settings).losses[0])
        elif record.kind == "rewarded pair":
            pairs = list(itertools.combinations(range(len(kept)), 2))
            of_pairs = [
                record.function(*(x[[k]] for x in (p, r, rho) for k in pair), **settings).losses[0] for pair in pairs
            ]
            found.append(torch.stack(of_pairs).mean())
        elif record.kind == "ranked":
            best_first = sorted(range(len(kept)), key=lambda k: -rho[k].item())
            found.append(record.function((p - r)[best_first][None], **settings)[0])
        elif loss == "dro":
            # The prompt's own value, searched for: half the squares are smallest at their mean.
            residual = rho - settings["tau"] * (p - r)
            found.append((0.5 * (residual - residual.mean()) ** 2).mean())
        elif record.kind == "unpaired":
            found.append(record.function(p, r, rho > 0.5, **settings).losses.mean())
        else:
            found.append(record.function((p - r)[None], rho[None], **settings)[0])
    return torch.stack(found)


@pytest.mark.parametrize("loss", [name for name in LOSSES if RECORDS[name].kind != "batch"])
def test_each_loss_and_its_gradient_are_the_librarys(loss):
    on_pairs = loss in LOSSES_ON_PAIRS
    policy, ref, rewards = tables(2 if on_pairs else 3)
    mask = torch.ones(3, 2, dtype=torch.bool) if on_pairs else MASK
    if loss in LOSSES_ON_LABELS:
        rewards = (rewards > 0).double()
    lengths = torch.tensor([[3, 2], [1, 4], [2, 2]])
    anchor = torch.tensor(0.3, dtype=torch.float64)
    completion_mask = torch.arange(4) < lengths.flatten().unsqueeze(-1)
    batch = {
        # What is masked holds what must not matter.
        "rewards": rewards if on_pairs else rewards.masked_fill(~mask, 0.0),
        "candidate_mask": mask,
        "candidate_rows": torch.arange(6).view(3, 2),
        "completion_mask": completion_mask.long(),
        "anchor": anchor,
    }
    zeroed = torch.where(mask, policy, 0.0)
    found = candidate_losses(zeroed, torch.where(mask, ref, 0.0), batch, config(loss))
    wanted = by_hand(loss, policy, ref, rewards, mask, lengths, anchor)
    assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found.sum(), policy, retain_graph=True)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
    assert_close(gradient, torch.autograd.grad(wanted.sum(), policy)[0], scale=1.0)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_losses_on_a_batch_leave_out_what_does_not_count(loss):
    policy, ref, rewards = tables(2)
    batch = {"rewards": rewards, "candidate_mask": torch.ones(3, 2, dtype=torch.bool)}
    for counted in ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]):
        batch["prompt_weights"] = torch.tensor(counted)
        found = candidate_losses(policy, ref, batch, config(loss))
        kept = batch["prompt_weights"] > 0
        wanted = RECORDS[loss].function(*policy[kept].T, *ref[kept].T, **RECORDS[loss].settings).losses
        assert torch.equal(found[kept], wanted) and (found[~kept] == 0).all()
        # Of a batch in which nothing counts, too, every process needs one.
        (gradient,) = torch.autograd.grad(found.sum(), policy, retain_graph=True)
        assert (gradient[~kept] == 0).all()


def test_dro_with_its_value_at_the_minimum_is_rebel():
    policy, ref, rewards = tables(3)
    batch = {"rewards": rewards, "candidate_mask": torch.ones(3, 3, dtype=torch.bool)}
    tau = 0.7
    dro = candidate_losses(policy, ref, batch, config("dro", loss_kwargs={"tau": tau}))
    rebel = candidate_losses(policy, ref, batch, config("rebel", loss_kwargs={"eta": 1 / tau}))
    assert_close(dro, rebel * (3 - 1) / (4 * 3))
    (gradient,) = torch.autograd.grad(dro.sum(), policy, retain_graph=True)
    assert_close(gradient, torch.autograd.grad(rebel.sum() / 6, policy)[0], scale=1.0)


def test_anchors_are_the_librarys():
    policy, ref, rewards = tables(3)
    policy, labels = policy.detach(), (rewards > 0).double()
    ratio = policy - ref
    kto, bco = config("kto", beta=0.3), config("bco", beta=0.3)
    sums = label_sums(ratio[:1], labels[:1], MASK[:1]) + label_sums(ratio[1:], labels[1:], MASK[1:])
    assert_close(anchor_of(sums, kto), losses.kto_reference_point(policy[MASK], ref[MASK]))
    desirable, other = MASK & (labels > 0), MASK & (labels == 0)
    assert desirable.any() and other.any()
    assert_close(anchor_of(sums, bco), losses.bco_shift(0.3 * ratio[desirable], 0.3 * ratio[other]))
    # One label alone; a mean below 0; nothing that counts.
    alone = label_sums(ratio, torch.ones_like(ratio), MASK)
    assert_close(anchor_of(alone, bco), 0.3 * ratio[MASK].mean())
    assert anchor_of(label_sums(-ratio.abs(), labels, MASK), kto) == 0
    nothing = label_sums(ratio, labels, torch.zeros_like(MASK))
    assert anchor_of(nothing, kto) == anchor_of(nothing, bco) == 0


SGD = {"optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant", "num_train_epochs": 1.0}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_trains_alike_however_a_step_is_split(llama64, tokenizer, tmp_path, loss):
    """Steps of eight and of three prompts; what a step estimates, it estimates over all of its prompts."""
    runs = [
        trained(copy.deepcopy(llama64), tokenizer, tmp_path, rows=rows_of(loss), **split, **SGD, **given(loss))
        for split in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "padding_side": "left"}
            if RECORDS[loss].kind == "batch"
            else {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "padding_side": "left"},
        )
    ]
    moved = (weights(runs[0].model) - weights(llama64)).abs().max()
    assert moved > 1e-6
    history = [run.state.log_history[:2] for run in runs]
    assert all(math.isfinite(value) for log in history for step in log for value in step.values())
    if RECORDS[loss].kind == "batch":  # sorted within each batch
        return
    torch.testing.assert_close(weights(runs[0].model), weights(runs[1].model), rtol=0, atol=1e-9 * moved.item() + 1e-12)
    for one, other in zip(*history, strict=True):
        for name in one.keys() - {"loss", "epoch"}:
            assert one[name] == pytest.approx(other[name], rel=1e-8, abs=1e-9), name
    if loss in ("simpo", "orpo", "cpo"):
        assert runs[0].ref_model is None and "kl/ref" not in history[0][0]
        assert {"rewards/margins", "logps/chosen"} <= history[0][0].keys()


def test_kto_step_by_hand(llama64, tokenizer, tmp_path):
    """Two steps without the trainer: reference point from the completions of the row before, labels, plain softmax."""
    # Another reference than the start, so that the reference point is not 0.
    ref = tiny_llama(len(tokenizer), dtype=torch.float64, seed=1).eval()
    run = {**SGD, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    trainer = trained(
        copy.deepcopy(llama64),
        tokenizer,
        tmp_path,
        rows=LABELS,
        trainer={"ref_model": copy.deepcopy(ref)},
        loss="kto",
        beta=0.5,
        gradient_accumulation_steps=3,
        **run,
    )
    model = copy.deepcopy(llama64)
    rows = [tokenize_row(row, tokenizer, single=True) for row in LABELS]

    def ratio(prompt, completion):
        ids = torch.tensor([prompt + completion])
        of = [policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for policy in (model, ref)]
        new, old = (table[range(len(completion)), completion].sum() for table in of)
        return new - old.detach()

    points = []
    for start in range(0, len(rows), 6):
        step = range(start, min(start + 6, len(rows)))
        model.zero_grad()
        others = [ratio(rows[i].prompt_ids, ids) for i in step for ids in rows[i - 1].completion_ids]
        points.append(torch.stack(others).mean().clamp(min=0).item())
        for i in step:
            signs = [2 * label - 1 for label in rows[i].rewards]
            of_completions = [
                torch.sigmoid(-sign * 0.5 * (ratio(rows[i].prompt_ids, ids) - points[-1]))
                for sign, ids in zip(signs, rows[i].completion_ids, strict=True)
            ]
            (torch.stack(of_completions).mean() / len(step)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad
    assert points[0] != points[1] and min(points) > 0
    assert [log["reference_point"] for log in trainer.state.log_history[:2]] == pytest.approx(
        points, rel=1e-6, abs=1e-12
    )
    torch.testing.assert_close(weights(trainer.model), weights(model), rtol=0, atol=1e-9)


def test_metrics_of_labels_are_averages_over_completions(llama64, tokenizer, tmp_path):
    """Of each label by itself, whatever prompts they come from; of pairs as ever."""
    trainer = CandidateTrainer(
        copy.deepcopy(llama64), settings(tmp_path, loss="bco", beta=0.5), None, LABELS, tokenizer
    )
    metrics = trainer.evaluate()
    rows = [tokenize_row(row, tokenizer, single=True) for row in LABELS]
    logps = {0.0: [], 1.0: []}
    for row in rows:
        for ids, label in zip(row.completion_ids, row.rewards, strict=True):
            table = (
                llama64(torch.tensor([row.prompt_ids + ids])).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            )
            logps[label].append(table[range(len(ids)), ids].sum().item())
    assert metrics["eval_logps/chosen"] == pytest.approx(sum(logps[1.0]) / len(logps[1.0]), rel=1e-9)
    assert metrics["eval_logps/rejected"] == pytest.approx(sum(logps[0.0]) / len(logps[0.0]), rel=1e-9)
    assert metrics["eval_rewards/chosen"] == metrics["eval_delta"] == 0
    assert metrics["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    pairs = CandidateTrainer(copy.deepcopy(llama64), settings(tmp_path, loss="bco", beta=0.5), PAIRS, PAIRS, tokenizer)
    assert {"eval_rewards/margins", "eval_kl/ref", "eval_delta"} <= pairs.evaluate().keys()


def test_metrics_without_a_reference_are_of_mean_logps():
    policy, ref, rewards = tables(2)
    lengths = torch.tensor([[3, 2], [1, 4], [2, 2]])
    batch = {
        "rewards": rewards,
        "candidate_mask": torch.ones(3, 2, dtype=torch.bool),
        "candidate_rows": torch.arange(6).view(3, 2),
        "completion_mask": (torch.arange(4) < lengths.flatten().unsqueeze(-1)).long(),
    }
    for loss in ("simpo", "orpo", "cpo"):
        record = RECORDS[loss]
        extra = [] if loss == "cpo" else lengths.T
        wanted = record.function(*policy.T, *extra, **record.settings)
        found = candidate_metrics(policy, ref, batch, config(loss), pairs=True)
        assert_close(found["rewards/chosen"], wanted.chosen_rewards)
        assert_close(found["rewards/rejected"], wanted.rejected_rewards)
        assert_close(found["logps/chosen"], policy.detach()[:, 0])
        assert "kl/ref" not in found and "ess" not in found


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("loss", "rows", "more", "message"),
    [
        ("kto", ROWS, {}, r'train_dataset: row 1, column "rewards": must be 1 \(desirable\) or 0'),
        ("kto", LABELS[:1], {}, "train_dataset: must have two rows or more"),
        ("kto", PAIRS, {"ref_cache": "there"}, "ref_cache must be None for loss='kto' unless loss_kwargs gives"),
        ("simpo", PAIRS, {"ref_cache": "there"}, "ref_cache must be None for loss='simpo'"),
        ("plackett_luce", [ROWS[0], {**ROWS[1], "rewards": [1.0] * 3}], {}, 'row 1, column "rewards": must differ'),
        ("rebel", PAIRS, {}, "must have the columns prompt, completions and rewards; got those of prompt, chosen"),
        ("simpo", ROWS, {}, "must have the columns prompt, chosen and rejected; got those of prompt, completions"),
        (
            "exo_rw",
            [{**ROWS[0], "rewards": [1e38, 0.0]}],
            {},
            r'row 0, column "rewards": must be at most .* in size with beta_r=.*; got 1e\+38',
        ),
        ("bco", [{**LABELS[0], "completions": [], "rewards": []}], {}, "hold at least 1 completion; got 0"),
        ("rebel", [{**ROWS[0], "completions": ["a"], "rewards": [1.0]}], {}, "hold at least 2 completions; got 1"),
    ],
)
def test_data_that_a_loss_cannot_use_are_named(llama, tokenizer, tmp_path, loss, rows, more, message):
    with pytest.raises(ValueError, match=message):
        CandidateTrainer(
            copy.deepcopy(llama), settings(tmp_path, **{**given(loss), **more}), rows, processing_class=tokenizer
        )


def test_a_reference_that_a_loss_does_not_know_is_refused(llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="ref_model must be None for loss='cpo'"):
        CandidateTrainer(
            copy.deepcopy(llama), settings(tmp_path, **given("cpo")), PAIRS, processing_class=tokenizer, ref_model=llama
        )


def test_given_anchors_are_taken_and_nothing_is_estimated(llama64, tokenizer, tmp_path):
    fixed = {"loss": "kto", "beta": 0.5, "loss_kwargs": {"reference_point": 2.0}}
    trainer = CandidateTrainer(copy.deepcopy(llama64), settings(tmp_path, **fixed), None, LABELS, tokenizer)
    metrics = trainer.evaluate()
    assert "eval_reference_point" not in metrics and "other_input_ids" not in next(iter(trainer.get_eval_dataloader()))
    shares = [sum(row["rewards"]) / len(row["rewards"]) for row in LABELS]
    wanted = [s / (1 + math.exp(-1)) + (1 - s) / (1 + math.exp(1)) for s in shares]
    assert metrics["eval_loss"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)
