"""Sampling from a model and scoring by functions: against loops, by the seed, and what is refused."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, GPT2ForSequenceClassification, LlamaForSequenceClassification

from exo_toy.integrations.sampling import (
    as_texts,
    end_tokens,
    passed_on,
    prompt_tokens,
    reward_model,
    sample_completions,
    score_completions,
)
from tests.hf.conftest import tiny_llama

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
SEEDS = [5, 6, 7]


def sample(model, prompts=PROMPTS, seeds=SEEDS, **given):
    settings = {"num_candidates": 3, "max_new_tokens": 6, "temperature": 0.7, "eos_token_ids": [2], "pad_token_id": 0}
    return sample_completions(model, prompts, seeds=seeds, **{**settings, **given})


def likeliest(logits, top_p, top_k):
    """The tokens to draw from: the first so many in the order of their logits, while those before hold less."""
    order, before, kept = logits.argsort(descending=True).tolist(), 0.0, []
    order = order[: top_k or None]
    total = logits[order].exp().sum()
    for token in order:
        if before >= top_p:
            break
        kept.append(token)
        before += float(logits[token].exp() / total)
    return kept


@torch.no_grad()
def one_by_one(
    model, prompt, seed, *, num_candidates=3, max_new_tokens=6, temperature=0.7, ends=(2,), top_p=1.0, top_k=0
):
    """No cache, no padding: the token with the largest logit plus noise, until the end."""
    generator = torch.Generator().manual_seed(seed)
    completions = [[] for _ in range(num_candidates)]
    for _ in range(max_new_tokens):
        draws = torch.empty(num_candidates, model.config.vocab_size, dtype=torch.float64)
        noise = -draws.exponential_(generator=generator).log()
        for completion, own in zip(completions, noise, strict=True):
            if not completion or completion[-1] not in ends:
                logits = model(torch.tensor([[*prompt, *completion]])).logits[0, -1] / temperature
                kept = likeliest(logits, top_p, top_k)
                completion.append(max(kept, key=lambda token: float(logits[token] + own[token])))
    return completions


def test_completions_are_those_of_a_loop(llama64):
    # 2 and some others end a completion, so that some are short.
    ends = (2, *range(100, 140))
    wanted = [one_by_one(llama64, prompt, seed, ends=ends) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert sample(llama64, eos_token_ids=ends) == wanted
    lengths = {len(ids) for candidates in wanted for ids in candidates}
    assert 6 in lengths and len(lengths) > 2
    assert len({tuple(ids) for candidates in wanted for ids in candidates}) == 9


@pytest.mark.parametrize("cuts", [{"top_p": 0.3}, {"top_k": 2}, {"top_k": 40, "top_p": 0.5}, {"top_k": 1}])
def test_cuts_leave_the_likeliest_tokens_at_the_temperature(llama64, cuts):
    wanted = [one_by_one(llama64, prompt, seed, **cuts) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert sample(llama64, **cuts) == wanted != sample(llama64)
    assert all((some[0] == some[1] == some[2]) == (cuts == {"top_k": 1}) for some in wanted)


def test_a_prompt_s_completions_depend_on_its_seed_alone(llama64):
    together = sample(llama64)
    assert together == [sample(llama64, [p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together == sample(llama64)
    other = sample(llama64, seeds=[5, 8, 7])
    assert other[0] == together[0] and other[1] != together[1] and other[2] == together[2]


def test_it_leaves_everything_as_it_was(gpt2):
    model = copy.deepcopy(gpt2).train()
    model.generation_config = GenerationConfig(eos_token_id=9)
    settings, state = model.generation_config, torch.get_rng_state()
    first = sample(model)
    assert model.generation_config is settings and model.training and torch.equal(torch.get_rng_state(), state)
    # No dropout, though the model is in training mode.
    assert first == sample(gpt2)


def test_no_setting_of_the_model_s_own_is_applied(llama64):
    model = copy.deepcopy(llama64)
    plain = sample(model)
    model.generation_config = GenerationConfig(
        top_k=1, repetition_penalty=5.0, suppress_tokens=list(range(50)), min_new_tokens=6, no_repeat_ngram_size=1
    )
    assert sample(model) == plain


def test_noise_is_gumbel_s():
    """The share of each of three tokens in 20000 draws; Hoeffding: off by 0.025 with probability below 1e-10 each."""
    model = tiny_llama(3, dtype=torch.float64)
    (candidates,) = sample(model, [[1]], [0], num_candidates=20_000, max_new_tokens=1, eos_token_ids=[])
    counts = torch.bincount(torch.tensor(candidates).flatten(), minlength=3)
    with torch.no_grad():
        wanted = (model.eval()(torch.tensor([[1]])).logits[0, -1] / 0.7).softmax(-1)
    assert wanted.max() - wanted.min() > 0.1
    assert (counts / 20_000 - wanted).abs().max() < 0.025


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be an integer of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"seeds": [1]}, "seeds must be one per prompt, 3; got 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]; got 1.5"),
        ({"top_k": -1}, "top_k must be an integer of at least 0"),
        ({"prompts": [[1], [], [2]]}, "prompts must have at least one token each"),
    ],
)
def test_bad_arguments(llama, given, message):
    with pytest.raises(ValueError, match=message):
        sample(llama, **given)


def test_ends_are_those_of_tokenizer_and_model(llama, tokenizer):
    model = copy.deepcopy(llama)
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert end_tokens(model, tokenizer) == sorted([7, tokenizer.eos_token_id])


@pytest.mark.unchecked
def test_functions_that_return_something_else_are_named():
    given = {"prompts": ["a", "a"], "completions": ["b", "c"]}
    cases = [
        (lambda **_: [1.0], "must return a list of one number per completion, 2; got 1"),
        (lambda **_: 1.0, "must return a list.*got float"),
        (lambda **_: [1.0, None], r"must return finite numbers \(in float32\); got None for completion 1"),
        (lambda **_: [1e39, 1.0], r"must return finite numbers \(in float32\); got 1e\+39 for completion 0"),
        (lambda **_: [float("nan"), 1.0], r"must return finite numbers \(in float32\); got nan for completion 0"),
    ]
    for function, message in cases:
        function.__name__ = "judge"
        with pytest.raises(ValueError, match=f"judge {message}"):
            score_completions([function], [1.0], **given)


def test_tensors_and_arrays_are_lists():
    total, by_name = score_completions(
        [lambda completions, **_: torch.tensor([1.0, 2.0])], [3.0], prompts=["a", "a"], completions=["b", "c"]
    )
    assert total == [3.0, 6.0] and by_name == {"<lambda>": [1.0, 2.0]}


def test_columns_go_with_each_completion():
    rows = [{"prompt": "a", "completions": ["b"], "source": 1}, {"prompt": "c", "trainer_state": 0, "more": None}]
    assert passed_on(rows, [1, 2]) == {"more": [None] * 3, "source": [1, None, None]}


def classifier(tokenizer, kind=LlamaForSequenceClassification, seed=3, **given):
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    config = kind.config_class(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **{**size, **given})
    return kind(config).eval()


@pytest.fixture(scope="module")
def judge(tokenizer):
    return classifier(tokenizer, num_labels=1, intermediate_size=48)


@torch.no_grad()
def outputs(model, ids):
    """Of one text, without padding."""
    return model(torch.tensor([ids])).logits[0].double()


TEXTS = {"prompts": ["the film", "the cat", "a"], "completions": [" was good", "", " sat on the mat"]}
CHAT = [{"role": "user", "content": "the film"}], [{"role": "assistant", "content": "good"}]


def test_a_reward_model_as_a_function(judge, tokenizer):
    score = reward_model(judge, tokenizer, batch_size=2)
    texts = map("".join, zip(*TEXTS.values(), strict=True))
    wanted = [outputs(judge, tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]).item() for text in texts]
    assert score(**TEXTS, more=[1, 2, 3]) == pytest.approx(wanted, rel=1e-4)
    assert len({round(number, 4) for number in wanted}) == 3
    assert score.__name__ == "LlamaForSequenceClassification"
    wanted = outputs(judge, tokenizer.apply_chat_template([*CHAT[0], *CHAT[1]], return_dict=False)).item()
    assert score(prompts=CHAT[:1], completions=CHAT[1:]) == pytest.approx([wanted], rel=1e-4)


def test_a_classifier_of_two_gives_the_log_odds_of_the_second(tokenizer):
    """Whatever the padding side of the tokenizer, and where padding and end are the same token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model = classifier(tokenizer, GPT2ForSequenceClassification, num_labels=2)
    wanted = []
    for text in map("".join, zip(*TEXTS.values(), strict=True)):
        no, yes = outputs(model, tokenizer(text)["input_ids"]).log_softmax(-1).tolist()
        wanted.append(yes - no)
    assert reward_model(model, tokenizer, batch_size=3)(**TEXTS) == pytest.approx(wanted, rel=1e-4)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "right")


def test_of_a_long_text_a_reward_model_sees_the_end(judge, tokenizer):
    given = {"prompts": ["the film was good"], "completions": [" and the acting was better" * 3]}
    ids = [*tokenizer(given["prompts"][0] + given["completions"][0])["input_ids"], tokenizer.eos_token_id]
    for most in (1, 4, len(ids) - 1, len(ids)):
        wanted = outputs(judge, ids[-most:]).item()
        assert reward_model(judge, tokenizer, max_length=most)(**given) == pytest.approx([wanted], rel=1e-4)
    chat_ids = tokenizer.apply_chat_template([*CHAT[0], *CHAT[1]], return_dict=False)
    wanted = outputs(judge, chat_ids[-3:]).item()
    found = reward_model(judge, tokenizer, max_length=3)(prompts=CHAT[:1], completions=CHAT[1:])
    assert found == pytest.approx([wanted], rel=1e-4)
    # As many as the model has positions for, or as the tokenizer says; what it puts first stays.
    short = classifier(tokenizer, GPT2ForSequenceClassification, num_labels=1, max_position_embeddings=6)
    assert reward_model(short, tokenizer)(**given) == pytest.approx([outputs(short, ids[-6:]).item()], rel=1e-4)
    first = copy.deepcopy(tokenizer)
    first.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    first.model_max_length = 5
    assert reward_model(judge, first)(**given) == pytest.approx([outputs(judge, [1, *ids[-4:]]).item()], rel=1e-4)


@pytest.mark.unchecked
def test_models_that_give_no_reward_are_refused(judge, tokenizer):
    other = copy.deepcopy(judge)
    other.config.num_labels = 3
    with pytest.raises(ValueError, match="one label, or two; got 3"):
        reward_model(other, tokenizer)
    other = copy.deepcopy(judge)
    other.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id must be the tokenizer's"):
        reward_model(other, tokenizer)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1"):
        reward_model(judge, tokenizer, max_length=0)


def test_prompts_and_completions_in_their_form(tokenizer):
    how = {"max_prompt_length": None, "where": "row 0"}
    assert prompt_tokens("the film", tokenizer, **how) == tokenizer("the film")["input_ids"]
    chat_ids = tokenizer.apply_chat_template(CHAT[0], add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(CHAT[0], tokenizer, **how) == chat_ids
    assert prompt_tokens(CHAT[0], tokenizer, **{**how, "max_prompt_length": 2}) == chat_ids[-2:]
    drawn = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in (" was good", "")]
    assert as_texts("the film", drawn, tokenizer) == [" was good", ""]
    assert as_texts(CHAT[0], drawn, tokenizer)[0] == [{"role": "assistant", "content": " was good"}]
    with pytest.raises(ValueError, match='row 0, column "prompt": must be a string or a list of messages'):
        prompt_tokens(3, tokenizer, **how)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-sequence token"):
        prompt_tokens("the film", endless, **how)
