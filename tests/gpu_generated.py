"""Generated problems for the GPU engine in Triton's interpreter, on CPU tensors: see `generated.py`."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from generated import Call, Problem, judge, problems
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from roialign import ops

# The interpreter is slow: small maps, few bins.
small = problems(
    most_maps=3, most_cells=9, channels=st.sampled_from([1, 2, 5, 17, 33]), most_boxes=2, most_bins=3
)


def main(examples: int) -> None:
    """Judge so many problems, the same every time."""
    ops.ENGINES["cpu"] = "roialign.gpu.engine"
    found: list[tuple[Problem, AssertionError]] = []

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(problem=small)
    def check(problem: Problem) -> None:
        # A NaN in the gradient is checked by gpu_interpreted.py.
        try:
            judge(Call(problem._replace(spoilt_grad=None)))
        except AssertionError as error:
            found.append((problem, error))

    check()
    for problem, error in sorted(found, key=lambda pair: len(repr(pair[0])))[:5]:
        print(problem, error, sep="\n")
    print(f"{len(found)} of {examples} problems disagree" if found else f"all {examples} agree")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
