"""Settings: what they need, what they refuse, and that a command line can give them."""

import dataclasses

import pytest
from transformers import HfArgumentParser

from exo_toy.integrations.config import (
    LOSSES,
    CandidateConfig,
    check_loss,
    check_metric_temperatures,
    loss_settings,
    metric_temperatures,
)
from exo_toy.integrations.objective import check_values
from exo_toy.losses import LOSSES as RECORDS

CPU = {"use_cpu": True, "report_to": "none"}


def config(**given):
    return CandidateConfig("out", **CPU, **given)


def test_defaults():
    plain = config()
    assert plain.loss == "exo_rw" and plain.temperature == 1.0 and plain.disable_dropout
    assert plain.beta_r is plain.beta_pi is plain.beta is plain.label_smoothing is None
    assert plain.learning_rate == 1e-6 and plain.remove_unused_columns is False


@pytest.mark.unchecked
def test_a_command_line_and_a_dictionary_give_every_setting():
    parser = HfArgumentParser(CandidateConfig)
    words = "--output_dir out --use_cpu --report_to none --loss dpo_rw --beta_r 0.5 --beta_pi 0.1 --padding_side left"
    (parsed,) = parser.parse_args_into_dataclasses([*words.split(), "--precompute_ref", "--ref_cache", "cache"])
    assert (parsed.loss, parsed.beta_r, parsed.beta_pi, parsed.padding_side) == ("dpo_rw", 0.5, 0.1, "left")
    assert parsed.precompute_ref and parsed.ref_cache == "cache" and parsed.beta is None
    assert parsed.to_dict()["beta_pi"] == 0.1
    ours = {field.name for field in dataclasses.fields(CandidateConfig)}
    assert all(f"--{name}" in parser.format_help() for name in ours & set(CandidateConfig.__annotations__))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "exo"}, "loss must be one of dpo, .*, exo_rw, dpo_rw, .*; got 'exo'"),
        ({"padding_side": "middle"}, "padding_side must be one of right, left; got 'middle'"),
        ({"kernel": "fast"}, "kernel must be one of auto, linear, selective; got 'fast'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"beta_r": -1.0}, "beta_r must be a finite number above 0"),
        ({"beta_pi": float("nan")}, "beta_pi must be a finite number above 0"),
        ({"beta": float("inf")}, "beta must be a finite number above 0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be an integer of at least 1"),
        ({"max_completion_length": 1.5}, "max_completion_length must be an integer of at least 1"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of must be an integer of at least 1"),
        ({"ess_warning": 1.0}, r"ess_warning must be in \[0, 1\)"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ],
)
def test_a_bad_setting_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


FIELDS = ("beta", "beta_r", "beta_pi", "label_smoothing")


def whole(loss):
    """A valid setting of a loss: those of the table, which no default fills, and no functions."""
    record = RECORDS[loss]
    plain = {name: value for name, value in record.settings.items() if not callable(value)}
    named = {name: plain.pop(name) for name in FIELDS if name in plain}
    return {**named, **({"loss_kwargs": plain} if plain else {})}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_needs_its_settings_and_no_others(loss):
    given = whole(loss)
    check_loss(config(loss=loss, **given))
    check_values(config(loss=loss, **given))
    temperatures = {"beta", "beta_r", "beta_pi"} & given.keys()
    assert all(value > 0 for value in metric_temperatures(config(loss=loss, **given)))
    for name in temperatures:
        with pytest.raises(ValueError, match=f"{name} must be given for loss='{loss}'"):
            check_loss(config(loss=loss, **{**given, name: None}))
    for name in {"beta", "beta_r", "beta_pi"} - temperatures:
        with pytest.raises(ValueError, match=f"{name} must be None for loss='{loss}', which takes "):
            check_loss(config(loss=loss, **given, **{name: 0.1}))
    with pytest.raises(ValueError, match=f"nonsense must be None for loss='{loss}'"):
        check_loss(config(loss=loss, **{**given, "loss_kwargs": {**given.get("loss_kwargs", {}), "nonsense": 1}}))


def test_arguments_without_a_field_are_named():
    with pytest.raises(ValueError, match="alpha must be given in loss_kwargs for loss='alpha_rw'"):
        check_loss(config(loss="alpha_rw", beta_r=0.1, beta_pi=0.1))
    with pytest.raises(ValueError, match="label_smoothing must be None for loss='ipo'"):
        check_loss(config(loss="ipo", beta=0.1, label_smoothing=0.1))


@pytest.mark.unchecked
def test_what_a_loss_refuses_is_said_before_training():
    for loss, epsilon in (("exo_pref", 0.0), ("dpo", 0.5), ("dpo", -0.1)):
        with pytest.raises(ValueError, match="label_smoothing must be in"):
            check_values(config(loss=loss, beta=0.1, label_smoothing=epsilon))
    with pytest.raises(ValueError, match="alpha must be"):
        check_values(config(loss="alpha_rw", beta_r=0.1, beta_pi=0.1, loss_kwargs={"alpha": float("nan")}))
    check_values(config(loss="dpo", beta=0.1, label_smoothing=0.0))
    check_values(config(loss="exo_pref", beta=0.1, label_smoothing=0.49))


@pytest.mark.unchecked
def test_loss_kwargs_from_a_command_line():
    parser = HfArgumentParser(CandidateConfig)
    words = ["--output_dir", "out", "--use_cpu", "--report_to", "none", "--loss", "alpha_rw", "--beta_r", "1"]
    (parsed,) = parser.parse_args_into_dataclasses([*words, "--beta_pi", "1", "--loss_kwargs", '{"alpha": 0.5}'])
    assert loss_settings(parsed) == {"beta_r": 1.0, "beta_pi": 1.0, "alpha": 0.5}
    with pytest.raises(ValueError, match=r"loss_kwargs must be arguments by name, as JSON .*; got 'alpha=1'"):
        parser.parse_args_into_dataclasses([*words, "--beta_pi", "1", "--loss_kwargs", "alpha=1"])


def test_a_loss_of_ones_own_needs_the_temperatures_of_the_metrics_alone():
    check_metric_temperatures(config(beta_r=0.1, beta_pi=0.1), pairs=False)
    check_metric_temperatures(config(beta=0.1), pairs=True)
    for pairs, given, message in (
        (False, {"beta_r": 0.1}, "beta_pi must be given with a loss of one's own"),
        (True, {}, "beta must be given with a loss of one's own"),
        (True, {"beta": 0.1, "beta_r": 0.1}, "beta_r must be None with a loss of one's own"),
        (False, {"beta_r": 0.1, "beta_pi": 0.1, "loss_kwargs": {"alpha": 1}}, "alpha must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            check_metric_temperatures(config(**given), pairs=pairs)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"loss": "exo_rw", "beta_r": 0.5, "beta_pi": 0.2}, (0.2, 0.1)),
        ({"loss": "dpo", "beta": 0.2}, (0.2, 0.2)),
        ({"loss": "rebel", "loss_kwargs": {"eta": 4.0}}, (0.25, 0.25)),
        ({"loss": "rpo_kl", "beta": 0.2, "loss_kwargs": {"reward_scale": 4.0}}, (0.2, 0.05)),
        ({"loss": "dro", "loss_kwargs": {"tau": 0.3}}, (0.3, 0.3)),
        ({"loss": "orpo", "loss_kwargs": {"odds_weight": 0.3}}, (0.3, 0.3)),
        # A callable takes the place of the name, and brings beta alone.
        ({"loss": "rebel", "beta": 0.2}, (0.2, 0.2)),
    ],
)
def test_temperatures_of_the_metrics(given, wanted):
    assert metric_temperatures(config(**given)) == pytest.approx(wanted, rel=1e-15)
