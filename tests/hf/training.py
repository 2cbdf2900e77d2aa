"""Short runs of the trainer, shared by its tests and by the processes that they start."""

import torch

from exo_toy.integrations.config import CandidateConfig
from exo_toy.integrations.trainer import CandidateTrainer

# Eleven prompts with two to five candidates: no batch size below divides them.
ROWS = [
    {
        "prompt": f"review {i}: the film",
        "completions": [f" was {'very ' * (j % 3)}good{'.' * (i % 4)} {j}" for j in range(2 + i % 4)],
        "rewards": [((7 * i + 5 * j) % 11) / 5.0 for j in range(2 + i % 4)],
    }
    for i in range(11)
]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1] + " the cat" * (i % 3)}
    for i, row in enumerate(ROWS)
]
# One to four completions of each, labelled; some prompts have one label only.
LABELS = [
    {
        "prompt": row["prompt"],
        "completions": row["completions"][1:],
        "rewards": [float(reward > 1) for reward in row["rewards"][1:]],
    }
    for row in ROWS
]
ON_REWARDS = {"loss": "exo_rw", "beta_r": 0.5, "beta_pi": 0.2}
ON_PAIRS = {"loss": "exo_pref", "beta": 0.2}


def settings(folder, **given):
    """A run of few steps, without what takes time or prints."""
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
        logging_steps=1.0,  # the checks of annotations tell 1 from 1.0
        num_train_epochs=1.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
    )
    if "loss" not in given and "beta" not in given:
        defaults |= ON_REWARDS
    return CandidateConfig(**{**defaults, **given})


def trained(model, tokenizer, folder, *, rows=ROWS, trainer=None, resume=None, **given):
    """A trainer after its training; ``trainer`` holds arguments of its own."""
    result = CandidateTrainer(
        model, settings(folder, **given), train_dataset=rows, processing_class=tokenizer, **(trainer or {})
    )
    result.train(resume_from_checkpoint=resume)
    return result


def weights(model):
    """The trainable parameters, whole, as one vector."""
    parts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in parts]
    return torch.cat([part.detach().flatten() for part in whole])
