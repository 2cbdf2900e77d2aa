"""Tiny models and a tokenizer, made on the spot; nothing is looked up on a hub."""

import importlib.util
import os

# Before the first import of the packages that read them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

EXTRA = ("transformers", "trl", "datasets", "peft", "accelerate")
HAS_EXTRA = all(importlib.util.find_spec(name) is not None for name in EXTRA)
# Without the extra `hf` there is nothing to test here.
collect_ignore_glob = [] if HAS_EXTRA else ["*.py"]

# Of other packages, at import or inside their own code; each one named, so that ours still fail a test.
THIRD_PARTY_WARNINGS = (
    # peft 0.21 asks transformers 5.23 by the attribute's old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = [
    "the film was good and the acting was better",
    "a bad film with a good ending",
    "what did you think of it? I liked it.",
    "the cat sat on the mat; the mat was red",
    "review: this is the worst thing that I have seen",
]


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with merges over the words above; pad, bos, eos; a chat template that ends each turn with eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(n_vocab, *, dtype=torch.float32, tied=False, seed=0, **settings):
    """A random Llama with dropout in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=0.1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_gpt2(n_vocab, *, dtype=torch.float32, seed=0, **settings):
    """A random GPT-2, embeddings tied, with dropout in every place that has one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=n_vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return GPT2LMHeadModel(config).to(dtype)


@pytest.fixture(scope="session")
def llama(tokenizer):
    """float32, in evaluation mode; shared by all tests, which must leave it as it is (copy.deepcopy to train)."""
    return tiny_llama(len(tokenizer)).eval()


@pytest.fixture(scope="session")
def llama64(tokenizer):
    """The same in float64."""
    return tiny_llama(len(tokenizer), dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def gpt2(tokenizer):
    """float32, in evaluation mode; shared as ``llama`` is."""
    return tiny_gpt2(len(tokenizer)).eval()


@pytest.fixture(scope="session")
def gpt2_64(tokenizer):
    """The same in float64."""
    return tiny_gpt2(len(tokenizer), dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def rows():
    """A dataset of three prompts with three, two and four candidates."""
    return [
        {"prompt": "the film", "completions": [" was good", " was bad", " ended"], "rewards": [1.0, -0.5, 0.25]},
        {"prompt": "what did you think?", "completions": ["I liked it.", "nothing"], "rewards": [2.0, 0.0]},
        {"prompt": "the cat", "completions": [" sat", " sat on the mat", " was red", "s"], "rewards": [0, 1, 2, 3]},
    ]


@pytest.fixture(scope="session")
def weights(tmp_path_factory, tokenizer):
    """A folder of a GPT-2 with its tokenizer."""
    path = tmp_path_factory.mktemp("weights")
    tiny_gpt2(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def unloadable(monkeypatch):
    """Loading a model in a stage of the pipeline fails the test."""
    from exo_toy.integrations.lm import evaluation, rewarding, stages

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for module in (stages, evaluation):
        monkeypatch.setattr(module, "load_policy", refuse)
    monkeypatch.setattr(rewarding, "load_classifier", refuse)
    monkeypatch.setattr(stages, "_trainable", refuse)
