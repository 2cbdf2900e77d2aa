"""A step of a language model by two ways."""

from analysis.claims.base import Claim, Measured, Outcome, Results, holds_if, largest


def _model_step(results: Results) -> Outcome:
    """A step of a language model by two ways; lm_step provides ``worst.<head>.<method>.<quantity>``, the largest

    relative difference of loss and gradients from the naive way's and from float64, ``rounding`` (of its dtype), and
    ``cells`` (a list, by ``vocab_size`` and ``k``, with ``steps.<head>.<method>``).
    """
    stored = results["lm_step"]
    worst, rounding = stored.number("worst"), stored.number("rounding")
    kernel = [worst[head]["kernel"] for head in worst]
    naive = [worst[head]["naive"] for head in worst]
    loss, gradient = (largest([found[f"{name}_difference"] for found in kernel]) for name in ("loss", "gradient"))
    ours, theirs = (largest([found["gradient_difference_from_float64"] for found in way]) for way in (kernel, naive))
    biggest = max(stored.number("cells"), key=lambda cell: (cell["vocab_size"], cell["k"]))
    sizes = "; ".join(
        f"head {head}: {_step(steps['kernel'])}, naive {_step(steps['naive'])}"
        for head, steps in biggest["steps"].items()
    )
    text = (
        f"{stored.number('dtype')}, {stored.number('device')}: largest relative difference of the loss {loss:.1e}, of "
        f"any parameter's gradient {gradient:.1e} (from float64: kernel {ours:.1e}, naive {theirs:.1e}). Peak memory "
        f"and time of a step at V={biggest['vocab_size']:,}, K={biggest['k']}: {sizes}"
    )
    differences = [difference for found in kernel for difference in found.values()]
    # What is left is rounding, amplified by the model: half the digits are a wide margin for it.
    return Outcome(text, holds_if(all(difference <= rounding**0.5 for difference in differences)))


def _step(step: Measured) -> str:
    return f"{step['peak_bytes'] / 2**20:,.0f} MiB and {step['median_seconds']:.2f} s"


CLAIMS = (
    Claim(
        "E2",
        "The same losses serve language models: a step has the same loss and gradients through naive logits and "
        "through the kernel that makes none",
        "not in the paper",
        function="exo_toy.kernels.linear_logps",
        test="tests/test_analysis_lm_step.py",
        script="analysis/lm_step.py",
        figure="lm_step",
        paper_value="none",
        evaluate=_model_step,
    ),
)
