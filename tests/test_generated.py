"""The public functions on generated problems, hostile ones among them; see `generated.py`.

CI draws some hundred problems, always the same. For thousands of new ones:
`pytest --hypothesis-profile=thousands tests/test_generated.py`.
"""

from generated import Call, Problem, judge, problems
from hypothesis import given


@given(problem=problems())
def test_the_engine_agrees_with_the_definition(problem: Problem) -> None:
    judge(Call(problem))
