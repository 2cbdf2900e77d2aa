"""Annotations checked at run time, Hypothesis profiles, the device fixture, the marker ``unchecked``."""

import os
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch

# Before the first import of the library: from here on every annotated call is checked, shapes included.
jaxtyping.install_import_hook("exo_toy", "beartype.beartype")

torch.set_num_threads(1)  # the tensors are tiny, and test processes run side by side

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "nightly", deadline=None, max_examples=300, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _annotation_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Off for tests marked ``unchecked``; the hook reads this setting at every call.

    Its checks would raise before the library's own error, and torch.compile cannot trace them.
    """
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("unchecked") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
