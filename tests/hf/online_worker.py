"""Short online trainings on one of several processes: ``torchrun ... -m tests.hf.online_worker FOLDER``.

FOLDER holds ``tokenizer``; ``online.pt`` is left there: for candidates from the policy alone and half from the
reference, the parameters and what was logged; and the parameters where the latter goes on from inside a window.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoTokenizer

from tests.hf.conftest import tiny_llama
from tests.hf.test_online import run
from tests.hf.training import weights

# Eleven prompts, eight a step: the last step of an epoch has three, on two processes four of the weightless copies.
RUN = {"optim": "sgd", "learning_rate": 0.05, "refresh_every": 2, "num_train_epochs": 2.0, "save_strategy": "steps"}
RUN |= {"save_steps": 1.0, "per_device_train_batch_size": 2, "ess_warning": 0.0}


def main(folder):
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    state = PartialState(cpu=True, **({"backend": "gloo"} if "RANK" in os.environ else {}))
    given = RUN | {"gradient_accumulation_steps": 4 // state.num_processes}
    if state.num_processes > 1:
        given["ddp_backend"] = "gloo"
    results = {}
    for half in (False, True):
        model, place = tiny_llama(len(tokenizer), dtype=torch.float64), folder / f"half_{half}"
        whole = run(model, tokenizer, place, half_reference=half, **given)
        results[half] = {
            "weights": weights(whole.model),
            "log": whole.state.log_history,
            "wrapper": type(whole.model_wrapped).__name__,
        }
    checkpoint = str(place / "checkpoint-1")
    resumed = run(model, tokenizer, place / "again", resume=checkpoint, half_reference=True, **given)
    results["resumed"] = {"weights": weights(resumed.model)}
    if state.process_index == 0:
        torch.save(results, folder / "online.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
