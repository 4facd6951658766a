"""linear_policy_loss beside full logits, TRL, Liger, cut cross-entropy and bare GEMMs.

python benchmarks/bench_linear_policy_loss.py      the full comparison: time, memory, error against float64
pytest benchmarks                                  the same methods under pytest-benchmark, at sizes of milliseconds
"""

import sys
from collections.abc import Callable

import pytest

from repo_ops.benchmarks.compare import main
from repo_ops.benchmarks.inputs import Case, make_inputs
from repo_ops.benchmarks.methods import METHODS
from repo_ops.benchmarks.shapes import MODELS, quick_shape

CASES = {
    **{model: Case(quick_shape(model)) for model in MODELS},
    "SmolLM2-135M, 70 % of zero advantage": Case(
        quick_shape("SmolLM2-135M"), dead=0.7, dead_kind="zero_advantage", length=8
    ),
    "SmolLM2-135M, frozen head": Case(quick_shape("SmolLM2-135M"), frozen=True),
}


# compiling takes a minute and belongs in no quick look; every case here is float32
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.compiles and m.only_dtype is None])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(benchmark: Callable[..., object], case: str, method: str) -> None:
    if why := METHODS[method].why_not(CASES[case]):
        pytest.skip(why)
    inputs = make_inputs(CASES[case])
    forward = METHODS[method].build(inputs)
    benchmark.group = f"{case}: {CASES[case].shape}"  # type: ignore[attr-defined]
    benchmark.name = METHODS[method].label  # type: ignore[attr-defined]
    benchmark.pedantic(  # type: ignore[attr-defined]
        lambda: forward().backward(), setup=inputs.clear, rounds=5, warmup_rounds=1
    )


if __name__ == "__main__":
    sys.exit(main())
