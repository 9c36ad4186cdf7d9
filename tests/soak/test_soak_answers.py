"""Ten minutes of damaged annotation files, ten of damaged answers, and ten of JSONL files, batches and
refusals together: `make soak`, or `SOAK_SECONDS=30 make soak`."""

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
ALONE = 'annotations', 'answer'  # the readers of annotation files, and `judge`: each has all of the time


@pytest.mark.soak
@pytest.mark.timeout(3 * SECONDS + 600)
def test_nothing_but_our_own_errors_for_minutes(capsys):
    "Rounds of new examples."
    assert set(ALONE) < set(CHECKS)
    for name, (check, strategies) in CHECKS.items():
        seconds = SECONDS if name in ALONE else SECONDS / (len(CHECKS) - len(ALONE))
        end, examples = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            settings(max_examples=ROUND, database=None)(given(*strategies)(check))()
            examples += ROUND
        with capsys.disabled():
            print(f'{name}: {examples:,} examples', flush=True)
