"""Which output heads the linear kernel stands in for, and that the selective kernel takes the others."""

import copy

import pytest
import torch
from torch import nn

from exo_toy.integrations import scoring
from exo_toy.integrations.scoring import check_kernel, resolve_kernel, unwrap
from tests.hf.conftest import tiny_llama
from tests.hf.test_scoring import CLOSE, batch_of, looped, score


class Tailed(nn.Module):
    """A causal model whose logits are a function of the head's, as in the families named in the tests."""

    def __init__(self, model, tail):
        super().__init__()
        self.inside, self.tail = model, tail

    @property
    def config(self):
        return self.inside.config

    def get_output_embeddings(self):
        return self.inside.get_output_embeddings()

    def forward(self, input_ids, attention_mask, position_ids):
        output = self.inside(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        output.logits = self.tail(output.logits)
        return output


@pytest.mark.parametrize(
    "tail",
    [
        lambda z: z / 4,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z[..., :-1],
        lambda z: z.bfloat16(),
        lambda z: z + 1,
    ],
    ids=["scaled", "capped, unsaid", "cut", "rounded", "shifted"],
)
def test_a_head_followed_by_something_else_is_left_to_the_selective_kernel(tokenizer, rows, tail):
    """Granite and Cohere scale, some cut padded vocabulary, FSDP rounds outputs: no list of names has to know them."""
    # One token more than the tokenizer has: the one that is cut.
    model = Tailed(tiny_llama(len(tokenizer) + 1, dtype=torch.float64).eval(), tail)
    batch = batch_of(rows, tokenizer)
    assert resolve_kernel(model, input_ids=batch["input_ids"]) == "selective"
    with pytest.raises(ValueError, match=r'kernel must be "auto" or "selective".*Tailed'):
        score(model, batch, kernel="linear")
    by_hand = batch["completion_mask"][:, 1:].bool()
    inputs = {"attention_mask": batch["attention_mask"], "position_ids": batch["attention_mask"].cumsum(1) - 1}
    logits = model(input_ids=batch["input_ids"], **inputs).logits[:, :-1]
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    taken = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    wanted = torch.where(by_hand, taken, 0.0).sum(-1)
    torch.testing.assert_close(score(model, batch), wanted, rtol=1e-6, atol=1e-9)


def test_a_harmless_tail_is_seen_to_be_one(llama64, tokenizer, rows):
    batch = batch_of(rows, tokenizer)
    assert resolve_kernel(Tailed(llama64, lambda z: z.contiguous()), input_ids=batch["input_ids"]) == "linear"


def gemma3(tokenizer, **settings):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        **settings,
    )
    return Gemma3ForCausalLM(config).double().eval()


def test_the_soft_cap_of_the_config_is_the_kernels(tokenizer, rows):
    """Gemma 3: capped logits, embeddings tied."""
    model, batch = gemma3(tokenizer, final_logit_softcapping=2.0), batch_of(rows, tokenizer)
    assert resolve_kernel(model, input_ids=batch["input_ids"]) == "linear"
    linear, selective = score(model, batch, kernel="linear"), score(model, batch, kernel="selective")
    torch.testing.assert_close(linear, selective, **CLOSE[torch.float64])
    torch.testing.assert_close(linear, looped(model, rows, tokenizer), **CLOSE[torch.float64])
    assert model.config.final_logit_softcapping == 2.0
    model.config.final_logit_softcapping = None
    uncapped = score(model, batch)
    torch.testing.assert_close(uncapped, looped(model, rows, tokenizer), **CLOSE[torch.float64])
    assert (uncapped - linear).abs().min() > 1e-3


def test_a_soft_cap_of_the_config_that_is_not_the_models(tokenizer, rows):
    """One that the model does not apply, and one that it applies whatever the config says by then."""
    batch = batch_of(rows, tokenizer)
    model = tiny_llama(len(tokenizer), dtype=torch.float64).eval()
    model.config.final_logit_softcapping = 2.0
    assert resolve_kernel(model, input_ids=batch["input_ids"]) == "selective"
    torch.testing.assert_close(score(model, batch), looped(model, rows, tokenizer), **CLOSE[torch.float64])
    fixed = Tailed(model, lambda z: 2 * torch.tanh(z / 2))
    assert resolve_kernel(fixed, input_ids=batch["input_ids"]) == "selective"


def test_logits_scaling_of_the_config(tokenizer, rows):
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = GraniteConfig(vocab_size=len(tokenizer), logits_scaling=8.0, initializer_range=0.5, **sizes)
    model, batch = GraniteForCausalLM(config).double().eval(), batch_of(rows, tokenizer)
    assert resolve_kernel(model, input_ids=batch["input_ids"]) == "selective"
    torch.testing.assert_close(score(model, batch), looped(model, rows, tokenizer), **CLOSE[torch.float64])


@pytest.mark.parametrize("variant", ["tied", "untied", "bias", "capped"])
def test_gradients_of_the_kernels_are_equal(tokenizer, rows, variant):
    if variant == "capped":
        model = gemma3(tokenizer, final_logit_softcapping=2.0)
    else:
        model = tiny_llama(len(tokenizer), dtype=torch.float64, tied=variant == "tied").eval()
    if variant == "bias":
        model.lm_head.bias = nn.Parameter(torch.randn(len(tokenizer), dtype=torch.float64))
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (variant in ("tied", "capped"))
    batch = batch_of(rows, tokenizer, "left")
    weights = torch.randn(len(batch["input_ids"]), dtype=torch.float64)
    values, gradients = {}, {}
    for kernel in ("linear", "selective"):
        model.zero_grad()
        values[kernel] = score(model, batch, kernel=kernel, temperature=0.9)
        (values[kernel] * weights).sum().backward()
        gradients[kernel] = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(values["linear"], values["selective"], **CLOSE[torch.float64])
    torch.testing.assert_close(gradients["linear"], gradients["selective"], rtol=1e-9, atol=1e-10)
    assert all(gradient.any() for gradient in gradients["linear"].values())


def test_heads_that_are_no_plain_linear_maps(llama64, tokenizer, rows):
    """Adapted, patched, compiled: the selective kernel reads their logits."""
    from peft import LoraConfig, get_peft_model

    batch = batch_of(rows, tokenizer)
    adapter = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(llama64), adapter).double().eval()
    assert resolve_kernel(adapted, input_ids=batch["input_ids"]) == "selective"
    assert resolve_kernel(llama64, adapted, input_ids=batch["input_ids"]) == "selective"
    assert resolve_kernel(llama64, llama64, input_ids=batch["input_ids"]) == "linear"
    torch.testing.assert_close(score(adapted, batch), looped(adapted, rows, tokenizer), **CLOSE[torch.float64])

    patched = copy.deepcopy(llama64)
    forward = patched.lm_head.forward
    patched.lm_head.forward = lambda hidden: 2 * forward(hidden)
    wanted = looped(patched, rows, tokenizer)
    torch.testing.assert_close(score(patched, batch), wanted, **CLOSE[torch.float64])

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    subclassed = copy.deepcopy(llama64)
    subclassed.lm_head.__class__ = Doubled
    torch.testing.assert_close(score(subclassed, batch), wanted, **CLOSE[torch.float64])

    for model in (adapted, patched, subclassed):
        check_kernel("auto", llama64, model)
        with pytest.raises(ValueError, match=r'kernel must be "auto" or "selective" for a model .* got "linear" for'):
            check_kernel("linear", llama64, model)
    check_kernel("linear", llama64)

    compiled = torch.compile(copy.deepcopy(llama64), backend="eager")
    assert unwrap(compiled) is compiled._orig_mod
    assert resolve_kernel(compiled, input_ids=batch["input_ids"]) == "selective"


def test_adapters_elsewhere_leave_the_linear_kernel(llama64, tokenizer, rows):
    from peft import LoraConfig, get_peft_model

    batch = batch_of(rows, tokenizer)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(llama64), adapter).double().eval()
    assert resolve_kernel(adapted, input_ids=batch["input_ids"]) == "linear"
    found = score(adapted, batch)
    torch.testing.assert_close(found, looped(adapted, rows, tokenizer), **CLOSE[torch.float64])
    assert (found - score(llama64, batch)).abs().min() > 1e-6


def test_prompt_learning_is_refused(llama, tokenizer, rows):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(llama), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        score(model, batch_of(rows, tokenizer))


def test_the_answer_is_found_once_per_model(tokenizer, rows):
    model, batch, calls = tiny_llama(len(tokenizer)).eval(), batch_of(rows, tokenizer), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    score(model, batch)
    first = len(calls)
    score(model, batch)
    assert len(calls) == first + 1 > 2
    assert model in scoring._HEADS
