"A short run of each check of `fuzz_answers.py`; `make soak` runs them for minutes."

import json

import pytest
from fuzz_answers import CHECKS, NOTED, ROWS, is_read
from hypothesis import given, settings


@pytest.mark.parametrize('name', CHECKS)
def test_nothing_but_our_own_errors(name):
    check, strategies = CHECKS[name]
    settings(max_examples=150)(given(*strategies)(check))()


@pytest.mark.parametrize('name', ['cuhk', 'icfg', 'rstp'])
def test_what_is_damaged_was_whole(name):
    "Or the damage would never get past the first look."
    raw = json.dumps(ROWS).encode()
    assert is_read(name, raw, None)
    assert is_read(name, raw, json.dumps(NOTED).encode() + b'\n')
    assert not is_read(name, raw[:-9], None)
