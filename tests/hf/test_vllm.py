"""The sampler for vLLM, against an engine made up in its place: what it calls, and when."""

import torch

from exo_toy.integrations.vllm import VLLMSampler
from tests.hf.test_online import build


class Engine:
    """The calls of TRL's VLLMGeneration; a completion tells which row of the batch it is of."""

    def __init__(self, policy):
        self.policy, self.synced, self.sizes = policy, [], []

    def sync_weights(self):
        self.synced.append(next(self.policy.parameters()).detach().clone())

    def generate(self, *, prompts, images, num_generations):
        assert images is None
        assert all(prompts[i] == prompts[i - i % num_generations] for i in range(len(prompts)))
        self.sizes.append(len(prompts))
        completions = [[10 + row % num_generations, 20 + row] for row in range(len(prompts))]
        return prompts, completions, None, None


def test_completions_stand_with_their_prompts():
    draw = VLLMSampler(Engine)
    drawn = draw(torch.nn.Linear(1, 1), [[1, 2], [3]], 3, [0, 0])
    assert drawn == [[[10, 20], [11, 21], [12, 22]], [[10, 23], [11, 24], [12, 25]]]


def test_in_the_trainer(llama, tokenizer, tmp_path):
    def first_token(completion_ids, **_):
        return [ids[0] for ids in completion_ids]

    made = []
    sampler = VLLMSampler(lambda policy: made.append(Engine(policy)) or made[-1])
    trainer = build(llama, tokenizer, tmp_path, trainer={"sampler": sampler, "reward_funcs": first_token})
    trainer.train()
    (engine,) = made
    assert engine.policy is trainer.accelerator.unwrap_model(trainer.model)
    assert len(engine.synced) == trainer.state.global_step > 1
    assert all(not torch.equal(*pair) for pair in zip(engine.synced, engine.synced[1:], strict=False))
