"""``exo-toy lm``: align language models, the stages of the paper's pipeline.

Exit codes: 0, the stage is complete; 2, it was refused.
"""

import argparse
import importlib
from typing import Any

from exo_toy.cli.base import Missing, absent

PACKAGES = ("accelerate", "datasets", "peft", "tqdm", "transformers", "trl", "yaml")
STAGES = {
    "sft": "fine-tune on chosen texts, by TRL's SFTTrainer",
    "sample": "draw candidate completions from a policy",
    "reward": "train a reward model on preferences, by TRL's RewardTrainer",
    "score": "give candidates their rewards, by a model or a Python function",
    "align": "train on candidates with EXO or DPO",
    "evaluate": "reward, KL to the reference and win rates of checkpoints",
    "run": "all sections of a recipe in order",
}


def add(commands: Any) -> None:
    """The command and its stages."""
    text = "align a language model: the stages of the paper's pipeline"
    command = commands.add_parser("lm", help=text, description=text)
    stages = command.add_subparsers(dest="stage", required=True, metavar="stage")
    for name, stage_text in STAGES.items():
        # The settings are many, and those of the trainers: the stage reads them itself, --help too.
        stages.add_parser(name, help=stage_text, add_help=False, allow_abbrev=False)
    command.set_defaults(run=run, resumes=True, takes_rest=True)


def run(options: argparse.Namespace) -> int:
    """Run a stage and return its exit code."""
    missing = absent(PACKAGES)
    if missing:
        raise Missing(f"`lm` needs {', '.join(missing)}: pip install 'exo-toy[hf]'")
    # Typed by hand: its dependencies are an extra's.
    lm: Any = importlib.import_module("exo_toy.integrations.lm.main")
    return lm.main([options.stage, *options.rest])
