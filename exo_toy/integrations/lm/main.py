"""The command line of the pipeline."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trl import ModelConfig, RewardConfig, SFTConfig

from exo_toy.integrations.config import CandidateConfig
from exo_toy.integrations.lm import evaluation, settings, stages
from exo_toy.integrations.lm.records import LmError

# Which several processes can share (accelerate launch); the others write rows one after another.
TOGETHER = ("sft", "reward", "align")
# Seconds that an interrupted section has to come to its end.
GRACE = 10.0
INTERRUPTED = 130
# Of each stage: its function and the dataclasses of its settings, in the order of the function's arguments.
STAGES: dict[str, tuple[Callable[..., None], tuple[type, ...]]] = {
    "sft": (stages.sft, (settings.TrainSettings, SFTConfig, ModelConfig)),
    "sample": (stages.sample, (settings.SampleSettings,)),
    "reward": (stages.reward, (settings.TrainSettings, RewardConfig, ModelConfig)),
    "score": (stages.score, (settings.ScoreSettings,)),
    "align": (stages.align, (settings.AlignSettings, CandidateConfig, ModelConfig)),
    "evaluate": (evaluation.evaluate, (settings.EvaluateSettings,)),
}


def main(arguments: Sequence[str]) -> int:
    """Run a stage, or all sections of a recipe, and return the exit code.

    Args:
        arguments: of the command line, the stage first.

    Returns:
        0: done, or done before; 2: refused, with a message.
    """
    stage, *flags = arguments
    try:
        if stage not in TOGETHER and os.environ.get("WORLD_SIZE", "1") != "1":
            raise LmError(f"{stage} runs in one process, without accelerate launch; got {os.environ['WORLD_SIZE']}")
        if stage == "run":
            return run(flags)
        function, types = STAGES[stage]
        prog = f"lm {stage}"
        own, rest = settings.options(prog, of_a_stage=True).parse_known_args(flags)
        section = _section(own, stage)
        function(*settings.parse(types, section, rest, prog=prog))
    except LmError as error:
        print(f"exo-toy: {error}", file=sys.stderr)
        return 2
    return 0


def run(flags: Sequence[str]) -> int:
    """All sections of a recipe in order, each in a process of its own; those that are complete say so.

    Args:
        flags: of the command line.

    Returns:
        0, or the exit code of the first section that fails.

    Raises:
        LmError: no recipe, or a section that is of no stage.
    """
    own, rest = settings.options("exo-toy lm run", of_a_stage=False).parse_known_args(flags)
    if own.config is None or rest:
        raise LmError(f"run takes --config FILE and --var NAME=VALUE; got {' '.join(flags) or 'nothing'}")
    recipe = settings.read_recipe(own.config, own.var)
    for section in recipe.sections:
        if recipe.stage(section) not in STAGES:
            raise LmError(f"{own.config}: section {section} must begin with one of {', '.join(STAGES)}")
    named = [f"--var={given}" for given in own.var]
    for section in recipe.sections:
        print(f"exo-toy: {section}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "exo_toy.cli", "lm", recipe.stage(section), "--config", own.config]
        code = _exit_code(subprocess.Popen([*command, "--section", section, *named]))
        if code:
            return code
    return 0


def _exit_code(process: "subprocess.Popen[bytes]") -> int:
    """Of a section. An interrupt from the keyboard reaches it as well; one that it does not get is passed on."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        # Whatever became of the section, the sections after it are not wanted.
        return INTERRUPTED


def _section(own: Any, stage: str) -> dict[str, Any]:
    """Settings of the recipe, where there is one."""
    if own.config is None:
        if own.section is not None or own.var:
            raise LmError("--section and --var need --config")
        return {}
    recipe = settings.read_recipe(own.config, own.var)
    name = own.section or stage
    if name not in recipe.sections:
        raise LmError(f"{own.config}: there is no section {name}, only {', '.join(recipe.sections)}")
    if recipe.stage(name) != stage:
        raise LmError(f"{own.config}: section {name} is of the stage {recipe.stage(name)}, not {stage}")
    return recipe.sections[name]
