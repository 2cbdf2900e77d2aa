"""Log-probabilities of completions, against a loop over the model's own logits, on every path there is."""

import pytest
import torch
from torch import nn

from exo_toy.integrations.candidates import CandidateCollator, tokenize_row
from exo_toy.integrations.scoring import completion_logps, evaluating, resolve_kernel, scatter
from tests.hf.conftest import tiny_gpt2, tiny_llama

# float64 sums of some tens of terms; float32 to a few roundings of numbers of some tens.
CLOSE = {torch.float64: {"rtol": 0.0, "atol": 1e-10}, torch.float32: {"rtol": 2e-6, "atol": 0.0}}


def batch_of(rows, tokenizer, side="right", **settings):
    return CandidateCollator(tokenizer.pad_token_id, side, **settings)([tokenize_row(row, tokenizer) for row in rows])


def score(model, batch, **settings):
    return completion_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"], **settings)


def looped(model, rows, tokenizer, temperature=1.0, dtype=torch.float64):
    """One unpadded sequence at a time, one token at a time, with log_softmax."""
    totals = []
    for row in rows:
        candidates = tokenize_row(row, tokenizer)
        for completion in candidates.completion_ids:
            sequence = candidates.prompt_ids + completion
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence])).logits[0].to(dtype)
            log_p = (logits / temperature).log_softmax(-1)
            first = len(candidates.prompt_ids)
            totals.append(sum(log_p[t - 1, sequence[t]] for t in range(first, len(sequence))))
    return torch.stack(totals)


@pytest.mark.parametrize("name", ["llama64", "gpt2_64", "llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kernel", ["linear", "selective"])
def test_equals_a_loop_over_logits(request, tokenizer, rows, name, side, kernel):
    """On either side of padding, hence right padding equals left padding."""
    model = request.getfixturevalue(name)
    batch = batch_of(rows, tokenizer, side, pad_to_multiple_of=8)
    assert (batch["attention_mask"] == 0).any(), "nothing is padded"
    for temperature in (1.0, 0.7):
        found = score(model, batch, kernel=kernel, temperature=temperature)
        assert found.dtype == model.dtype
        wanted = looped(model, rows, tokenizer, temperature).to(found.dtype)
        torch.testing.assert_close(found, wanted, **CLOSE[found.dtype])


def test_temperature_is_that_of_the_sampling(llama64, tokenizer, rows):
    batch = batch_of(rows, tokenizer)
    cold, warm = score(llama64, batch, temperature=0.5), score(llama64, batch, temperature=1.0)
    assert (cold - warm).abs().min() > 0.1


def test_what_padding_holds_changes_nothing(llama64, tokenizer, rows):
    batch = batch_of(rows, tokenizer, pad_to_multiple_of=8)
    other = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 9)}
    assert torch.equal(score(llama64, batch), score(llama64, other))


def test_gradient_is_that_of_the_loop(tokenizer, rows):
    model = tiny_gpt2(len(tokenizer), dtype=torch.float64).eval()
    batch = batch_of(rows[:1], tokenizer)
    score(model, batch).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    labels = torch.where(batch["completion_mask"] == 1, batch["input_ids"], -100)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").neg().backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-9, atol=1e-10)


def test_half_models_are_summed_in_float32(tokenizer):
    """Over 200 tokens of 6 nats a bfloat16 sum is off by several nats; the kernels' are off by what logits are."""
    row = {"prompt": "the", "completions": [" the cat sat" * 60, " a film"], "rewards": [0.0, 1.0]}
    model = tiny_llama(len(tokenizer), dtype=torch.bfloat16).eval()
    batch = batch_of([row], tokenizer)
    assert batch["completion_mask"][0].sum() > 150
    linear, selective = score(model, batch, kernel="linear"), score(model, batch, kernel="selective")
    wanted = looped(model, [row], tokenizer)
    assert linear.dtype == selective.dtype == torch.float32
    # Of the long row: the body's own rounding changes with the padding of the short one.
    torch.testing.assert_close(selective[0].double(), wanted[0], rtol=0.0, atol=2e-3)
    torch.testing.assert_close(linear[0].double(), wanted[0], rtol=1e-4, atol=0.0)
    in_half = sum(-6 * torch.ones(200, dtype=torch.bfloat16), torch.zeros((), dtype=torch.bfloat16))
    assert abs(in_half.item() + 1200) > 1


def test_autocast_is_that_of_the_model(llama, tokenizer, rows):
    """Half precision in the products, float32 in the sums; what a float32 model under ``bf16=True`` is trained with."""
    batch = batch_of(rows, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear, selective = score(llama, batch, kernel="linear"), score(llama, batch, kernel="selective")
        assert resolve_kernel(llama, input_ids=batch["input_ids"]) == "linear"
    assert linear.dtype == selective.dtype == torch.float32
    torch.testing.assert_close(linear, selective, rtol=2e-3, atol=0.0)
    full = score(llama, batch)
    assert 1e-4 < ((linear - full) / full).abs().max() < 2e-2


def test_gradient_checkpointing_changes_nothing(tokenizer, rows):
    batch, gradients = batch_of(rows, tokenizer), []
    for checkpointing in (False, True):
        model = tiny_llama(len(tokenizer), dtype=torch.float64).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
        score(model, batch).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0.0, atol=1e-10)


def test_only_completions_go_through_the_head(llama, tokenizer, rows):
    """The last positions of left-padded rows; of the linear kernel, only labelled rows enter a product."""
    batch = batch_of(rows, tokenizer, "left")
    seen = []
    with evaluating(llama):
        handle = llama.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(output.shape))
        try:
            score(llama, batch, kernel="selective")
        finally:
            handle.remove()
    assert seen[0][1] == batch["completion_mask"].any(0).sum()


def test_linear_kernel_holds_no_logits(llama, tokenizer, rows):
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(output.shape))
    try:
        batch = batch_of(rows, tokenizer)
        score(llama, batch, kernel="linear")
    finally:
        handle.remove()
    assert seen[-1] == (*batch["input_ids"].shape, 1)


def test_the_model_is_left_as_it_was(tokenizer, rows):
    model, batch = tiny_gpt2(len(tokenizer)).train(), batch_of(rows, tokenizer)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = model(input_ids=batch["input_ids"][:1], use_cache=False).logits.shape
    score(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=batch["input_ids"][:1], use_cache=False).logits.shape == before

    class Broken(RuntimeError):
        pass

    def fail(*_):
        raise Broken

    handle = model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        score(model, batch)
    handle.remove()
    assert "forward" not in vars(model.lm_head)


def test_finding_the_kernel_draws_no_random_numbers(tokenizer, rows):
    """Dropout of a first call is that of later ones, so that a resumed run can be the same as an uninterrupted one."""
    batch, values = batch_of(rows, tokenizer), []
    model = tiny_gpt2(len(tokenizer)).train()
    for _ in range(2):
        torch.manual_seed(5)
        values.append(score(model, batch).detach())
    assert torch.equal(*values)
    assert not torch.equal(values[0], score(model, batch).detach()), "no dropout: the test shows nothing"


def test_with_and_without_gradient_agree_to_the_bit(tokenizer, rows):
    """A policy that learns and its reference, at step 0."""
    batch = batch_of(rows, tokenizer)
    for make in (tiny_llama, tiny_gpt2):
        policy, ref = make(len(tokenizer)).eval(), make(len(tokenizer)).eval().requires_grad_(False)
        for kernel in ("linear", "selective"):
            learning = score(policy, batch, kernel=kernel)
            assert learning.requires_grad
            with torch.no_grad():
                assert torch.equal(score(ref, batch, kernel=kernel), learning)
            policy.lm_head.requires_grad_(False)
            assert torch.equal(score(policy, batch, kernel=kernel), learning), "a frozen head"
            policy.lm_head.requires_grad_(True)


def test_scatter_puts_rows_in_their_places():
    rows, mask = torch.tensor([[1, 0], [2, 0]]), torch.tensor([[True, True], [True, False]])
    logps = torch.tensor([-torch.inf, -2.0, -3.0], requires_grad=True)
    table = scatter(logps, rows, mask)
    assert table.tolist() == [[-2.0, -torch.inf], [-3.0, 0.0]]
    table[mask & (table > -torch.inf)].sum().backward()
    assert logps.grad.tolist() == [0.0, 1.0, 1.0]


def test_scatter_gives_masked_entries_no_gradient():
    logps = torch.tensor([1.0, 2.0], requires_grad=True)
    scatter(logps, torch.tensor([[1, 0]]), torch.tensor([[True, False]])).sum().backward()
    assert logps.grad.tolist() == [0.0, 1.0]


@pytest.mark.unchecked
def test_bad_arguments_are_refused(llama, tokenizer, rows):
    batch = batch_of(rows, tokenizer)
    with pytest.raises(ValueError, match="completion_mask must have the same shape"):
        score(llama, batch | {"completion_mask": batch["completion_mask"][:, 1:]})
    first = torch.zeros_like(batch["completion_mask"])
    first[2, 0] = 1
    with pytest.raises(ValueError, match=r"follow an attended token; got 1 at index \[2, 0\]"):
        score(llama, batch | {"completion_mask": first})
    # The first padding after the tokens.
    unseen = (1 - batch["attention_mask"]) * batch["attention_mask"].roll(1, dims=1)
    unseen[:, 0] = 0
    assert unseen.any()
    with pytest.raises(ValueError, match="only on attended tokens"):
        score(llama, batch | {"completion_mask": unseen})
    with pytest.raises(ValueError, match='kernel must be "auto", "linear" or "selective"; got \'fast\''):
        score(llama, batch, kernel="fast")
    with pytest.raises(ValueError, match="temperature must be a finite number above 0; got 0"):
        score(llama, batch, temperature=0)
    with pytest.raises(ValueError, match="DataParallel"):
        score(nn.DataParallel(llama), batch)
    with pytest.raises(ValueError, match=r"candidate_mask must be a torch.bool tensor"):
        scatter(torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
