"""Settings of :class:`~exo_toy.integrations.trainer.CandidateTrainer`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from exo_toy import checks, losses


def _callable(record: losses.LossRecord) -> Callable[..., Any]:
    """The loss; functions among its settings, which no command line could give, are filled in."""
    filled = {name: value for name, value in record.settings.items() if callable(value)}
    return functools.partial(record.function, **filled) if filled else record.function


def takes(loss: Callable[..., Any], name: str) -> bool:
    """Whether a loss has a parameter of this name.

    Args:
        loss: the function.
        name: of the parameter.
    """
    return name in inspect.signature(loss).parameters


LOSSES = {name: _callable(record) for name, record in losses.LOSSES.items()}
# By the columns of their data: chosen and rejected; completions and rewards; either, with rewards of 1 and 0.
LOSSES_ON_PAIRS = tuple(
    name for name, record in losses.LOSSES.items() if record.kind in ("pair", "batch", "reference-free")
)
LOSSES_ON_LABELS = tuple(name for name, loss in LOSSES.items() if takes(loss, "desirable"))
LOSSES_ON_REWARDS = tuple(name for name in LOSSES if name not in LOSSES_ON_PAIRS + LOSSES_ON_LABELS)
# Whose candidates may come from another proposal than the reference.
LOSSES_ON_PROPOSALS = tuple(name for name, loss in LOSSES.items() if takes(loss, "log_weights"))
LOSSES_WITHOUT_REFERENCE = tuple(name for name, record in losses.LOSSES.items() if record.kind == "reference-free")
# The argument that a step's prompts give where the settings do not.
ANCHORS = {"kto": "reference_point", "bco": "delta", "bco_pair": "delta"}
FROM_THE_BATCH = ("mask", "log_weights", "chosen_lengths")


def option(default: Any, text: str) -> Any:
    """A field with the help text that a command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class CandidateConfig(TrainingArguments):
    r"""Arguments of ``transformers.TrainingArguments``, and those of losses on candidates.

    The temperatures have no default: those of the loss must be given, ``beta_r`` and ``beta_pi`` for EXO-rw and its
    like, ``beta`` for most others. With rewards the policy tends to :math:`\pi^*_\beta` with
    :math:`\beta = \beta_r \beta_\pi`.

    Attributes:
        loss: the name of any loss in :data:`exo_toy.losses.LOSSES`; a callable given to the trainer takes its place.
            How each reads the data: :mod:`exo_toy.integrations.objective`.
        beta_r: reward temperature, above 0; divides the reward.
        beta_pi: policy temperature, above 0; multiplies the log ratio of policy and reference.
        beta: of the losses that have one temperature, above 0; multiplies the log ratio.
        label_smoothing: of losses on pairs that have it: the probability that a label is wrong, in (0, 1/2) for
            "exo_pref" (1e-3 where not given), in [0, 1/2) for "dpo" (0 where not given).
        loss_kwargs: further keyword arguments of the loss by name, such as "alpha" of "alpha_rw" or "gamma" of
            "simpo"; on a command line, JSON.
        temperature: at which the candidates were sampled; divides the logits of policy and reference.
        max_prompt_length: tokens of a prompt that are kept, its end; None for all.
        max_completion_length: tokens of a completion that are kept, its start; None for all.
        padding_side: "right" or "left"; makes no difference beyond rounding.
        pad_to_multiple_of: the width of a batch is a multiple of this.
        kernel: of the log-probabilities: "linear" (from hidden states, the logits never exist), "selective" (from the
            model's logits), "auto" for linear where the model's head allows it.
        disable_dropout: no dropout in the policy, so that it agrees with the reference where training starts.
        ref_cache: folder of the reference's log-probabilities, read instead of running the reference.
        precompute_ref: fill ``ref_cache`` before training, where something is missing.
        ess_warning: warn, once, when the effective number of candidates beyond the first, as a share of those there
            are, (ESS - 1) / (K - 1), falls below this; in [0, 1), 0 for no warning. For data with rewards only.
        learning_rate: TrainingArguments' own; here 1e-6, the paper's.
        logging_steps: TrainingArguments' own; here 10.
        remove_unused_columns: False; the model's arguments are no guide to the columns of the dataset.

    Raises:
        ValueError: a setting out of range, or one of TrainingArguments' that could have no effect here.

    Example:
        >>> config = CandidateConfig("out", loss="exo_rw", beta_r=0.1, beta_pi=0.1, use_cpu=True, report_to="none")
        >>> config.temperature
        1.0
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_kwargs"]  # noqa: RUF012 (as there)

    loss: str = option("exo_rw", f"one of {', '.join(LOSSES)}")
    beta_r: float | None = option(None, "reward temperature, divides the reward (exo_rw and its like)")
    beta_pi: float | None = option(None, "policy temperature, multiplies the log ratio (exo_rw and its like)")
    beta: float | None = option(None, "multiplies the log ratio (losses with one temperature)")
    label_smoothing: float | None = option(None, "probability that a label is wrong (losses on pairs)")
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "further arguments of the loss, as JSON"}
    )
    temperature: float = option(1.0, "at which the candidates were sampled; divides the logits of both policies")
    max_prompt_length: int | None = option(None, "tokens kept of a prompt, its end")
    max_completion_length: int | None = option(None, "tokens kept of a completion, its start")
    padding_side: str = option("right", "right or left")
    pad_to_multiple_of: int | None = option(None, "the width of a batch is a multiple of this")
    kernel: str = option("auto", "of the log-probabilities: auto, linear or selective")
    disable_dropout: bool = option(True, "no dropout in the policy")
    ref_cache: str | None = option(None, "folder of the reference's log-probabilities")
    precompute_ref: bool = option(False, "fill ref_cache before training")
    ess_warning: float = option(0.1, "warn below this share of effective candidates")

    learning_rate: float = option(1e-6, "the initial learning rate")
    logging_steps: float = option(10, "log every so many steps")
    remove_unused_columns: bool = option(False, "must be False")

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, tuple(LOSSES))
        check_choice("padding_side", self.padding_side, ("right", "left"))
        check_choice("kernel", self.kernel, ("auto", "linear", "selective"))
        checks.require_positive(temperature=self.temperature)
        for name in ("beta_r", "beta_pi", "beta"):
            if getattr(self, name) is not None:
                checks.require_positive(**{name: getattr(self, name)})
        for name in ("max_prompt_length", "max_completion_length", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                checks.require_integer(name, getattr(self, name), at_least=1)
        checks.require_real("ess_warning", self.ess_warning, allowed="in [0, 1)", low=0.0, high=1.0, low_allowed=True)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: it would drop the candidates; got True")
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0: it belongs to next-token losses, losses on pairs have "
                f"label_smoothing; got {self.label_smoothing_factor!r}"
            )
        super().__post_init__()
        if not isinstance(self.loss_kwargs or {}, dict):
            raise ValueError(
                f'loss_kwargs must be arguments by name, as JSON such as {{"alpha": 0.5}}; got {self.loss_kwargs!r}'
            )


def loss_settings(config: CandidateConfig) -> dict[str, Any]:
    """Keyword arguments of the named loss: what is given of temperatures and label smoothing, and ``loss_kwargs``.

    Args:
        config: the settings.
    """
    fields = {name: getattr(config, name) for name in ("beta_r", "beta_pi", "beta", "label_smoothing")}
    given = {name: value for name, value in fields.items() if value is not None}
    return given | dict(config.loss_kwargs or {})  # type: ignore[arg-type]


def columns_are_pairs(loss: str) -> bool | None:
    """Whether a loss by name is for chosen and rejected (True), completions and rewards (False), or either (None).

    Args:
        loss: the name.
    """
    return None if loss in LOSSES_ON_LABELS else loss in LOSSES_ON_PAIRS


def is_anchored(config: CandidateConfig) -> bool:
    """Whether the loss compares implicit rewards with a number that has to be estimated.

    Args:
        config: the settings.
    """
    return config.loss in ANCHORS and ANCHORS[config.loss] not in loss_settings(config)


def needs_other_completions(config: CandidateConfig) -> bool:
    """Whether prompts are to be scored with the completions of others, for KTO's reference point.

    Args:
        config: the settings.
    """
    return config.loss == "kto" and is_anchored(config)


def check_loss(config: CandidateConfig) -> None:
    """The settings that the named loss needs are there, and none that it does not use.

    Args:
        config: the settings.

    Raises:
        ValueError: a setting is missing, or has no effect.
    """
    given, loss = loss_settings(config), f"loss={config.loss!r}"
    taken = {
        name: parameter.default is parameter.empty and ANCHORS.get(config.loss) != name
        for name, parameter in inspect.signature(LOSSES[config.loss]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in FROM_THE_BATCH
    }
    for name, needed in taken.items():
        if needed and name not in given:
            where = "" if hasattr(config, name) else " in loss_kwargs"
            raise ValueError(f"{name} must be given{where} for {loss}: it has no default; got None")
    for name, value in given.items():
        if name not in taken:
            raise ValueError(f"{name} must be None for {loss}, which takes {', '.join(taken)}; got {value!r}")
    if config.loss in LOSSES_WITHOUT_REFERENCE and (config.ref_cache is not None or config.precompute_ref):
        raise ValueError(f"ref_cache must be None for {loss}, which knows no reference; got {config.ref_cache!r}")
    if needs_other_completions(config) and config.ref_cache is not None:
        raise ValueError(
            "ref_cache must be None for loss='kto' unless loss_kwargs gives its reference_point, which is estimated "
            f"from completions of other prompts, and the cache knows none of them; got {config.ref_cache!r}"
        )


def metric_temperatures(config: CandidateConfig) -> tuple[float, float]:
    """Beta_pi of the candidate weights and beta of implicit rewards and of the optimal policy.

    Args:
        config: the settings, which are those of the loss.
    """
    given = loss_settings(config)
    if "beta_pi" in given:
        return given["beta_pi"], given["beta_pi"] * given["beta_r"]
    # What multiplies the log ratio has one of these names.
    multiplier = (
        1 / given["eta"] if "eta" in given else next(given[n] for n in ("tau", "odds_weight", "beta") if n in given)
    )
    return multiplier, multiplier / given.get("reward_scale", 1.0)


def check_metric_temperatures(config: CandidateConfig, *, pairs: bool) -> None:
    """With a loss of one's own: the temperatures of the metrics are there, and no settings of the named losses.

    Args:
        config: the settings.
        pairs: whether the data are pairs of chosen and rejected.

    Raises:
        ValueError: a temperature is missing, or a setting is given that has no effect.
    """
    needed = ("beta",) if pairs else ("beta_r", "beta_pi")
    for name in needed:
        if getattr(config, name) is None:
            raise ValueError(f"{name} must be given with a loss of one's own, for the metrics; got None")
    for name, value in loss_settings(config).items():
        if name not in needed:
            raise ValueError(f"{name} must be None with a loss of one's own on these columns; got {value!r}")


def check_support(args: Any) -> None:
    """Settings that the trainer cannot honour are refused.

    Args:
        args: what the trainer was given.

    Raises:
        ValueError: no CandidateConfig, or one that asks for what is not supported.
    """
    if not isinstance(args, CandidateConfig):
        raise ValueError(f"args must be a CandidateConfig; got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process would be driven by nn.DataParallel; start one process per GPU "
            "with accelerate launch, or show one GPU (CUDA_VISIBLE_DEVICES)"
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f'train_sampling_strategy must be "random" or "sequential"; got {args.train_sampling_strategy}'
        )
    if args.dataloader_persistent_workers:
        raise ValueError("dataloader_persistent_workers must be False: workers take on each epoch's order; got True")
    if getattr(args.accelerator_config, "dispatch_batches", False):
        raise ValueError("accelerator_config's dispatch_batches must be None or False; got True")
    if args.parallelism_config is not None:
        raise ValueError("parallelism_config must be None: data parallelism alone is supported; got one")
    if args.precompute_ref and args.ref_cache is None:
        raise ValueError("ref_cache must name a folder where precompute_ref is True; got None")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """A setting is one of several words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
