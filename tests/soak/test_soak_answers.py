"""Ten minutes of damaged annotation files, answers, JSONL files, batches and refusals: `make soak`, or
`SOAK_SECONDS=30 make soak`."""

import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzz_answers import CHECKS

SECONDS = float(os.environ.get('SOAK_SECONDS', 600))
ROUND = 500


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_nothing_but_our_own_errors_for_minutes(capsys):
    "Each check has its share of the time, in rounds of new examples."
    for name, (check, strategies) in CHECKS.items():
        end, examples = time.monotonic() + SECONDS / len(CHECKS), 0
        while time.monotonic() < end:
            settings(max_examples=ROUND, database=None)(given(*strategies)(check))()
            examples += ROUND
        with capsys.disabled():
            print(f'{name}: {examples:,} examples', flush=True)
