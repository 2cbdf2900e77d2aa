"""Short trainings on one of several processes: ``torchrun ... -m tests.hf.trainer_worker FOLDER KIND ...``.

FOLDER holds ``tokenizer``; each KIND of run leaves ``KIND.pt`` there: the parameters, what was logged, an evaluation.
"full", "adapter", "pairs" and "labels" are wrapped by DistributedDataParallel where there are several processes,
"fsdp2" is sharded, "resumed" goes on from a checkpoint in the middle of the second epoch.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import AutoTokenizer

from exo_toy.integrations.trainer import CandidateTrainer
from tests.hf.conftest import tiny_llama
from tests.hf.training import LABELS, ON_PAIRS, PAIRS, ROWS, settings, weights

# Eleven prompts, eight a step: the last step of an epoch has three, on two processes four of the weightless copies.
RUN = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "num_train_epochs": 2.0}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def run(kind, tokenizer, folder, n_processes):
    """Parameters, log and evaluation of a run."""
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // n_processes}
    given |= {"per_device_eval_batch_size": 3, "max_grad_norm": 0.5, **RUN}
    if n_processes > 1:
        given["ddp_backend"] = "gloo"
    if kind == "fsdp2":
        given |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if kind == "resumed":
        given |= {"save_strategy": "steps", "save_steps": 1.0}
    if kind == "pairs":
        given |= ON_PAIRS
    if kind == "labels":
        # An evaluation has its reference point from each batch of all processes.
        given |= {"loss": "kto", "beta": 0.2, "per_device_eval_batch_size": 6 // n_processes}

    def trainer():
        torch.manual_seed(0)  # of the adapter
        model = tiny_llama(len(tokenizer), dtype=torch.float64)
        rows = {"pairs": PAIRS, "labels": LABELS}.get(kind, ROWS)
        extra = {"peft_config": LoraConfig(**LORA)} if kind == "adapter" else {}
        if kind == "labels":
            # Of this policy and another reference the reference point is above 0.
            extra["ref_model"] = tiny_llama(len(tokenizer), dtype=torch.float64, seed=1)
        config = settings(folder, **given)
        if kind == "fsdp2":
            # Accelerate wraps by FSDP on accelerators alone; FSDP2 itself runs on CPUs. The next config undoes it.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return CandidateTrainer(model, config, rows, rows, processing_class=tokenizer, **extra)

    result = trainer()
    result.train()
    if kind == "resumed":
        result = trainer()
        result.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return {
        "metrics": result.evaluate(),
        "weights": weights(result.model),
        "log": result.state.log_history,
        "wrapper": type(result.model_wrapped).__name__,
        "sharded": [
            any(hasattr(p, "full_tensor") for p in model.parameters())
            for model in (result.model, result.ref_model)
            if model
        ],
    }


def main(folder, kinds):
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    state = PartialState(cpu=True, **({"backend": "gloo"} if "RANK" in os.environ else {}))
    for kind in kinds:
        result = run(kind, tokenizer, folder / kind, state.num_processes)
        if state.process_index == 0:
            torch.save(result, folder / f"{kind}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
