"""The process of a run refuses what no try can heal, before Prefect starts the flow."""

import pytest

from flows.flow_run import require_parameters
from flows.generate import generate
from flows.pipeline import pipeline
from pusa.errors import PusaError

GIVEN = {"manifest": {"path": "/m.yaml"}, "run_dir": "/r"}


@pytest.mark.parametrize("more", [{}, {"retry_failed": True}, {"place": None, "retry_failed": False}])
def test_the_parameters_of_a_flow_are_taken_with_or_without_its_options(more):
    require_parameters(generate, GIVEN | more)


@pytest.mark.parametrize(
    ("flow", "given", "words"),
    [
        (generate, GIVEN | {"zzz": 1}, "the flow generate has no parameter 'zzz'; its parameters are manifest"),
        (generate, {"run_dir": "/r"}, "the flow generate needs manifest; "),
        (generate, {}, "needs manifest and needs run_dir; "),
        (pipeline, GIVEN, "the flow pipeline has no parameter 'manifest' and needs ingest and needs precompute"),
    ],
)
def test_a_run_with_other_parameters_is_refused(flow, given, words):
    with pytest.raises(PusaError) as raised:
        require_parameters(flow, given)
    assert words in str(raised.value)
