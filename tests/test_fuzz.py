"A short run of each check of `fuzz_answers.py`; `make soak` runs them for minutes."

import pytest
from fuzz_answers import CHECKS
from hypothesis import given, settings


@pytest.mark.parametrize('name', CHECKS)
def test_nothing_but_our_own_errors(name):
    check, strategies = CHECKS[name]
    settings(max_examples=150)(given(*strategies)(check))()
