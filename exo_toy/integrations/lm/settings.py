"""Settings of the pipeline's stages, from a section of a YAML file and from flags."""

import argparse
import dataclasses
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser

from exo_toy import checks
from exo_toy.integrations.config import check_choice, option
from exo_toy.integrations.lm.records import LmError
from exo_toy.integrations.sampling import require_cuts

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The part of a recipe that is no stage: names that stand for texts in the rest.
VARIABLES = "vars"
EPILOG = (
    "--config FILE takes settings from a recipe, --section NAME from that section of it (not given: the one with the "
    "name of the stage), --var NAME=VALUE replaces a text under vars. Flags win."
)


def _needed(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(kw_only=True)
class Loading:
    """How models are loaded.

    Attributes:
        dtype: of the weights; "auto" for that of the files.
        device: "auto" for the accelerator where there is one.
        offline: never look on the hub; folders on disk never need it.
    """

    dtype: str = option("auto", f"of the weights: {', '.join(DTYPES)}")
    device: str = option("auto", "where models run; auto for the accelerator where there is one")
    offline: bool = option(False, "never look on the hub; folders on disk never need it")

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"device must be auto, or one of torch such as cpu; got {self.device!r}") from error


@dataclass(kw_only=True)
class Sampling(Loading):
    """How completions are drawn.

    Attributes:
        data: file with a column prompt; others are ignored.
        temperature: divides the logits; no default.
        max_new_tokens: of a completion, its end-of-sequence token included.
        max_prompt_length: tokens of a prompt that are kept, its end; None for all.
        batch_size: prompts at a time.
        limit: use so many prompts, from the start; None for all.
        seed: of the draws; the same settings give the same completions, interrupted or not.
    """

    data: str = _needed("JSON list or lines with a column prompt")
    temperature: float = _needed("divides the logits")
    max_new_tokens: int = _needed("tokens of a completion at most")
    max_prompt_length: int | None = option(None, "tokens kept of a prompt, its end")
    batch_size: int = option(8, "prompts at a time")
    limit: int | None = option(None, "use so many prompts, from the start")
    seed: int = option(0, "of the draws")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.require_positive(temperature=self.temperature)
        for name in ("max_new_tokens", "max_prompt_length", "batch_size", "limit"):
            _at_least_one(name, getattr(self, name))


@dataclass(kw_only=True)
class SampleSettings(Sampling):
    """Of ``sample``.

    Attributes:
        model_name_or_path: the policy.
        output: file of prompt and completions.
        num_candidates: completions of each prompt.
        top_p: draw from the smallest set of tokens with this probability; 1 for all, as the theorems assume.
        top_k: draw from so many tokens; 0 for all, as the theorems assume.
    """

    model_name_or_path: str = _needed("the policy: a folder, or a name on the hub")
    output: str = _needed("file of prompt and completions: .json for one list, else lines")
    num_candidates: int = option(2, "completions of each prompt")
    top_p: float = option(1.0, "draw from the smallest set of tokens with this probability")
    top_k: int = option(0, "draw from so many tokens; 0 for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("num_candidates", self.num_candidates)
        require_cuts(top_p=self.top_p, top_k=self.top_k)


@dataclass(kw_only=True)
class Rewarding(Loading):
    """Where rewards come from: exactly one of the two.

    Attributes:
        reward_model: sequence classifier: with one output the reward, with two the log odds of the second.
        reward_function: ``MODULE:FUNCTION``, called with ``prompts``, ``completions`` and the other columns as lists.
        reward_batch_size: completions at a time.
        reward_max_length: tokens that the reward model sees, the last ones; None for as many as it can.
    """

    reward_model: str | None = option(None, "sequence classifier: a folder, or a name on the hub")
    reward_function: str | None = option(None, "MODULE:FUNCTION in place of a model")
    reward_batch_size: int = option(16, "completions at a time")
    reward_max_length: int | None = option(None, "tokens that the reward model sees, the last ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("reward_batch_size", self.reward_batch_size)
        _at_least_one("reward_max_length", self.reward_max_length)
        if (self.reward_model is None) == (self.reward_function is None):
            given = (self.reward_model, self.reward_function)
            raise ValueError(f"exactly one of reward_model and reward_function must be given; got {given}")


@dataclass(kw_only=True)
class ScoreSettings(Rewarding):
    """Of ``score``.

    Attributes:
        data: file of prompt and completions.
        output: file of prompt, completions and rewards; or of prompt, chosen and rejected.
        pairs: write the completion with the highest reward as chosen, that with the lowest as rejected, and leave out
            rows where all rewards are equal.
    """

    data: str = _needed("file of prompt and completions")
    output: str = _needed("file of prompt, completions and rewards: .json for one list, else lines")
    pairs: bool = option(False, "write prompt, chosen and rejected instead")


@dataclass(kw_only=True)
class EvaluateSettings(Sampling, Rewarding):
    """Of ``evaluate``.

    Attributes:
        ref_model: the reference.
        models: checkpoints: folders, patterns of folders (``*``), or names on the hub.
        output: folder of the results.
        num_samples: completions that each policy and the reference draw for each prompt.
        beta: strength of the KL penalty of the optimal policy in the density ratios; None leaves them undrawn.
        figures: whether to draw.
    """

    ref_model: str = _needed("the reference: a folder, or a name on the hub")
    models: list[str] = field(metadata={"help": "checkpoints: folders, patterns of folders, or names on the hub"})
    output: str = _needed("folder of the results")
    num_samples: int = option(4, "completions of each policy for each prompt")
    beta: float | None = option(None, "beta_r times beta_pi, for the density ratios")
    figures: bool = option(True, "draw the frontier and the density ratios")

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        checks.require_integer("num_samples", self.num_samples, at_least=2)
        if self.beta is not None:
            checks.require_positive(beta=self.beta)
        if not self.models:
            raise ValueError("models must name a checkpoint; got none")


@dataclass(kw_only=True)
class TrainSettings:
    """Of ``sft``, ``reward`` and ``align``, beside those of their trainer.

    Attributes:
        data: file of the training rows.
        eval_data: file of the evaluation rows; None for none.
        offline: never look on the hub; folders on disk never need it.
    """

    data: str = _needed("file of the training rows")
    eval_data: str | None = option(None, "file of the evaluation rows")
    offline: bool = option(False, "never look on the hub; folders on disk never need it")


@dataclass(kw_only=True)
class AlignSettings(TrainSettings):
    """Of ``align``.

    Attributes:
        ref_model: the reference; None for the model where training starts.
        num_candidates: use the first so many completions of each row; None for all.
    """

    ref_model: str | None = option(None, "the reference; not given: the model where training starts")
    num_candidates: int | None = option(None, "use the first so many completions of each row")

    def __post_init__(self) -> None:
        if self.num_candidates is not None:
            checks.require_integer("num_candidates", self.num_candidates, at_least=2)


@dataclass(frozen=True)
class Recipe:
    """A YAML file of settings by section.

    Attributes:
        path: of the file.
        sections: settings by section, in order.
    """

    path: str
    sections: dict[str, dict[str, Any]]

    def stage(self, section: str) -> str:
        """The stage of a section: its name up to the first hyphen, so that several sections may be of one stage."""
        return section.split("-")[0]


def read_recipe(path: str, variables: Sequence[str] = ()) -> Recipe:
    """A recipe, with ``${name}`` replaced by what ``vars`` in it, or the command line, says.

    Args:
        path: of the YAML file.
        variables: ``name=value``, in place of those of the file.

    Returns:
        The recipe.

    Raises:
        LmError: no such file, no YAML, no mapping of sections, a variable that nothing names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = _mapping(path, "the file", yaml.safe_load(text))
        named = _mapping(path, VARIABLES, content.get(VARIABLES) or {})
        for given in variables:
            name, equals, value = given.partition("=")
            if not equals or name not in named:
                raise LmError(f"--var must be name=value with a name of {sorted(named)}; got {given!r}")
            named[name] = value
        content = yaml.safe_load(string.Template(text).substitute(named))
    except OSError as error:
        raise LmError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise LmError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    except KeyError as error:
        raise LmError(f"{path}: ${{{error.args[0]}}} must be named under {VARIABLES}") from error
    except ValueError as error:
        raise LmError(f"{path}: a dollar sign must be ${{name}} or $$: {error}") from error
    content.pop(VARIABLES, None)
    # A name with a dot first holds settings that several sections take over by YAML's anchors.
    sections = {name: _mapping(path, name, value) for name, value in content.items() if not name.startswith(".")}
    return Recipe(path, sections)


def parse(types: Sequence[Any], section: dict[str, Any], flags: Sequence[str], *, prog: str) -> tuple[Any, ...]:
    """Dataclasses from the settings of a section and from flags, which win.

    Args:
        types: the dataclasses.
        section: settings by name.
        flags: of the command line.
        prog: the command, for its help.

    Returns:
        An instance of each type.

    Raises:
        LmError: an unknown or missing setting, or a value that is not allowed.
    """
    parser = _Parser(types, prog=f"exo-toy {prog}", allow_abbrev=False, epilog=EPILOG)
    # Of a switch and its negation, --no_NAME, the first; the other's default is not the setting's.
    known = {action.dest: action for action in reversed(parser._actions)}
    arguments: list[str] = []
    for name, value in section.items():
        if name not in known:
            raise LmError(f"{prog}: no such setting: {name}")
        if value is None:
            parser.set_defaults(**{name: None})
        elif isinstance(value, list):
            if known[name].nargs not in ("+", "*"):
                raise LmError(f"{prog}: {name} must be one value; got {value}")
            arguments += [f"--{name}", *map(str, value)]
        elif value is False and "no" in (known[name].choices or ()):
            # As YAML reads no, a setting of save_strategy and others.
            arguments.append(f"--{name}=no")
        else:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    namespace, unknown = parser.parse_known_args([*arguments, *flags])
    if unknown:
        raise LmError(f"{prog}: no such setting: {' '.join(unknown)}")
    # What is at its default is left to the dataclass.
    given = {name: value for name, value in vars(namespace).items() if value != known[name].default or name in section}
    made = []
    for kind in types:
        names = {entry.name for entry in dataclasses.fields(kind) if entry.init}
        try:
            made.append(kind(**{name: value for name, value in given.items() if name in names}))
        except ValueError as error:
            raise LmError(f"{prog}: {error}") from error
    return tuple(made)


class _Parser(HfArgumentParser):
    """Raises where argparse would print its usage, which for a trainer is pages long, and exit."""

    def error(self, message: str) -> NoReturn:
        raise LmError(f"{self.prog.removeprefix('exo-toy ')}: {message}")


def options(prog: str, *, of_a_stage: bool) -> argparse.ArgumentParser:
    """What every command takes beside settings.

    Args:
        prog: the command.
        of_a_stage: which has settings, and with them a help of its own.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=not of_a_stage, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a recipe: YAML with a section per stage")
    parser.add_argument("--var", action="append", default=[], metavar="NAME=VALUE", help="in place of the recipe's")
    if of_a_stage:
        parser.add_argument("--section", metavar="NAME")
    return parser


def _mapping(path: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise LmError(f"{path}: {name} must be a mapping of names; got {type(value).__name__}")
    return value


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None:
        checks.require_integer(name, value, at_least=1)
