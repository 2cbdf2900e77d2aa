"""The experiment on KL estimators: distances that are kept, measures by plain loops, summaries, figures."""

import math

import numpy as np
import pytest
import torch

from analysis import kl_estimators, storage
from analysis.kl_estimators import CLASSES, COLUMNS, DERIVED, MEASURES, PRESETS, ROWS, Config
from exo_toy.kl_estimators import TOLERANCE
from exo_toy.spaces import SequenceSpace
from figures import kl_estimators as figure
from figures import style

TINY = Config(vocab_size=3, length=2, width=2, distances=(0.01, 0.5), seeds=1)
LABELS = [row.label for row in ROWS]


@pytest.fixture(scope="module")
def result():
    return kl_estimators.run(TINY)


def entry(result, measure: str, label: str, column: str) -> np.ndarray:
    return result.arrays[measure][..., LABELS.index(label), COLUMNS.index(column)]


@pytest.mark.parametrize("kind", CLASSES)
def test_policies_stand_at_the_asked_distances(kind):
    space, generator = SequenceSpace(3, 2, eos=2), torch.Generator().manual_seed(1)

    def draw():
        return kl_estimators.random_policy(kind, space, 2, 1.0, generator)

    reference = draw()
    log_ref = reference.log_probs()[0].detach()
    direction = kl_estimators.far_direction(reference, log_ref, 1.0, draw)
    for distance in (0.001, 0.3, 1.0):
        step = kl_estimators.step_to(reference, direction, log_ref, distance)
        log_pi = kl_estimators.moved(reference, direction, step).log_probs()[0]
        kl = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_pi.tolist(), log_ref.tolist(), strict=True))
        assert kl == pytest.approx(distance, rel=1e-6)
    with pytest.raises(ValueError, match="distances must be within reach"):
        kl_estimators.far_direction(reference, log_ref, 1e6, draw)


def test_table_policy_by_loops():
    """Scores of a table are 1[y = z] - pi(z): error, component and noise of four cells."""
    space, generator = SequenceSpace(3, 2, eos=2), torch.Generator().manual_seed(3)
    policy, reference = (kl_estimators.random_policy("table", space, 1, 0.8, generator) for _ in range(2))
    log_ref = reference.log_probs()[0].detach()
    found = kl_estimators.at_policy(policy, log_ref, log_ref, space)
    log_pi, log_ref = policy.log_probs()[0].tolist(), log_ref.tolist()
    pi, ref = ([math.exp(value) for value in table] for table in (log_pi, log_ref))
    size = range(len(pi))
    ell = [p - q for p, q in zip(log_pi, log_ref, strict=True)]

    def moments(weight, coefficient):
        gradients = [[coefficient[y] * ((y == z) - pi[z]) for z in size] for y in size]
        mean = [math.fsum(weight[y] * gradients[y][z] for y in size) for z in size]
        return mean, math.fsum(weight[y] * (gradients[y][z] - mean[z]) ** 2 for y in size for z in size)

    kl = math.fsum(p * x for p, x in zip(pi, ell, strict=True))
    right = [pi[z] * (ell[z] - kl) for z in size]
    length = math.fsum(g * g for g in right)
    cases = {
        ("sequence k3 loss", "policy"): moments(pi, [1 - math.exp(-x) for x in ell]),
        ("sequence k1 loss", "reference"): moments(ref, [1.0] * len(pi)),
        ("sequence k1 reward", "policy"): moments(pi, ell),
        ("sequence k1 reward (baseline)", "policy"): moments(pi, [x - kl for x in ell]),
    }
    for (label, column), (mean, variance) in cases.items():
        at = LABELS.index(label), COLUMNS.index(column)
        off = math.fsum((a - b) ** 2 for a, b in zip(mean, right, strict=True))
        along = math.fsum(a * b for a, b in zip(mean, right, strict=True))
        assert found["error"][at] == pytest.approx(math.sqrt(off / length), rel=1e-11, abs=1e-13)
        assert found["component"][at] == pytest.approx(along / length, rel=1e-11)
        assert found["noise_to_signal"][at] == pytest.approx(variance / length, rel=1e-11)


def test_every_cell_has_one_verdict_and_its_closed_form(result):
    found = result.numbers
    assert found["cases"] == len(CLASSES) * 2
    assert found["not_as_derived"] == []
    assert found["largest_error_of_right"] < TOLERANCE / 100
    assert found["smallest_error_of_biased"] > TOLERANCE * 100
    assert found["largest_closed_form_error"] < TOLERANCE / 10
    for by_column in found["cells"].values():
        for cell in by_column.values():
            assert sum(cell["verdicts"].values()) == found["cases"]
            assert len(cell["verdicts"]) == 1
    # Without weights nothing that another policy drew is right.
    for column in ("reference", "old policy"):
        assert {
            verdict for row in found["cells"].values() for verdict in row.get(column, {"verdicts": ()})["verdicts"]
        } == {"biased"}


def test_what_needs_weights_is_missing_where_there_are_none(result):
    for i, row in enumerate(ROWS):
        for j, column in enumerate(COLUMNS):
            missing = row.use == "importance" and column in ("reference", "old policy")
            assert (column not in result.numbers["cells"][row.label]) == missing
            for name in ("error", "other_error", "component", "noise_to_signal"):
                assert np.isnan(result.arrays[name][..., i, j]).all() == missing


def test_k1_as_a_loss_leads_away_under_the_reference(result):
    """It climbs KL(pi_ref||pi)."""
    np.testing.assert_allclose(entry(result, "other_cosine", "sequence k1 loss", "reference"), -1.0, rtol=1e-11)
    assert (entry(result, "component", "sequence k1 loss", "reference") < 0).all()


def test_numbers_are_medians_and_geometric_means_of_the_arrays(result):
    error = entry(result, "error", "token k3 loss", "policy")
    cell = result.numbers["cells"]["token k3 loss"]["policy"]
    assert cell["error"]["0.5"] == pytest.approx(np.median(error[:, :, 1]), rel=1e-14)
    near, far = (np.median(error[:, :, d]) for d in (0, 1))
    assert cell["order"] == pytest.approx(math.log(far / near) / math.log(50), rel=1e-12)
    noise = entry(result, "noise_to_signal", "sequence k2 loss", "policy")[:, :, 0]
    quietest = result.numbers["noise"]["policy"]["0.01"]
    assert quietest["sequence k2 loss"] == pytest.approx(float(np.prod(noise)) ** (1 / noise.size), rel=1e-12)
    assert list(quietest.values()) == sorted(quietest.values())
    assert result.numbers["noise"]["reference"]["0.01"] == {}
    right = {label for label, row in result.numbers["cells"].items() if set(row["policy"]["verdicts"]) == {"right"}}
    assert set(quietest) == right


def test_summaries_tell_what_is_wrong(result):
    """A verdict that is not as derived, and one that is not the same in all cases, are both seen."""
    arrays = {name: values.copy() for name, values in result.arrays.items()}
    arrays["verdict"][0, 0, 0, LABELS.index("sequence k3 loss"), 0] = "biased"
    found = kl_estimators.numbers(arrays)
    assert found["not_as_derived"] == ["sequence k3 loss"]
    assert found["cells"]["sequence k3 loss"]["policy"]["verdicts"] == {"biased": 1, "the other KL's": 5}
    arrays["verdict"][..., LABELS.index("sequence k2 loss"), 0][1, 0, 1] = "biased"
    assert "sequence k2 loss" not in kl_estimators.numbers(arrays)["noise"]["policy"]["0.01"]


def test_closed_forms_are_written():
    written = kl_estimators.written
    assert written({}) == "0"
    assert written({"a": 1, "b": -1}) == "∇a − ∇b"
    assert written({"b": -1}) == "−∇b"


def test_a_run_is_reproducible():
    settings = {"vocab_size": 3, "length": 2, "width": 2, "spread": 0.7, "distances": [0.1], "kind": "gru", "seed": 1}
    first, again = (kl_estimators.along_a_line(**settings) for _ in range(2))
    for name in MEASURES:
        assert np.array_equal(first[name], again[name], equal_nan=True)


def test_figures_are_drawn(result, tmp_path):
    storage.store("kl_estimators", "full", TINY, result.numbers, result.arrays, folder=tmp_path)
    with style.theme():
        paths = figure.draw(storage.load("kl_estimators", "full", tmp_path), tmp_path)
    assert {path.stem for path in paths} == set(figure.CAPTIONS)
    assert all(path.stat().st_size > 1000 for path in paths)


def test_presets_and_labels():
    assert PRESETS["full"] == Config()
    assert set(PRESETS) == {"quick", "default", "full"}
    assert len(set(LABELS)) == len(LABELS)
    assert set(DERIVED) | set(figure.BIASED) | set(figure.RIGHT) <= set(LABELS)
