"""Forty minutes of training in one process: memory, open files, threads and processes stay what they were.

`make soak`, or `SOAK_SECONDS=20 make soak` for a first look: pictures in memory for three times as long, then
loader processes, which start and end with each epoch."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_training import cfg

from bdam_repro import runs
from bdam_repro.measuring import resident

SECONDS = float(os.environ.get('SOAK_SECONDS', 600))
WAYS = {'pictures in memory': (3*SECONDS, dict(workers=0)),
        'two loader processes': (SECONDS, dict(workers=2, cache_gb=0.))}
WARM = .2                       # share of the epochs that may still fill caches

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures('one_thread')]


class TimeIsUp(Exception): ...


def held() -> dict[str, float]:
    "What this process holds of the machine."
    tasks = list(Path('/proc/self/task').iterdir())
    children = [pid for task in tasks for pid in (task/'children').read_text().split()]
    return dict(mb=resident('VmRSS'), files=len(os.listdir('/proc/self/fd')), threads=len(tasks),
                children=len(children))


@pytest.mark.timeout(4*SECONDS + 1200)
@pytest.mark.parametrize('way', WAYS)
def test_long_training_holds_no_more_than_its_first_minutes(way, tmp_path, monkeypatch, capsys):
    seconds, options = WAYS[way]
    found, start, one_epoch = [], time.monotonic(), runs.one_epoch

    def watched(*args):
        one_epoch(*args)
        found.append(held())
        if time.monotonic() - start > seconds and len(found) >= 10: raise TimeIsUp

    monkeypatch.setattr(runs, 'one_epoch', watched)
    c = cfg(tmp_path, folder='long', epochs=1_000_000, synth_train_ids=100, ids_per_batch=4, save_steps=10,
            **options)
    with pytest.raises(TimeIsUp): runs.train(c, tmp_path/'runs', progress=False)

    table = pd.DataFrame(found)
    later = table.iloc[int(WARM*len(table)):]
    slope = np.polyfit(later.index, later.mb, 1)[0]              # MB per epoch
    rise = slope*len(later)/later.mb.median()
    quarter = max(1, len(later)//4)
    first, last = later.mb.iloc[:quarter].median(), later.mb.iloc[-quarter:].median()
    with capsys.disabled():
        print(f'\n{way}: {len(table)} epochs in {(time.monotonic() - start)/60:.1f} minutes; memory '
              f'{first:.1f} -> {last:.1f} MB, {1024*slope:+.1f} kB per epoch, {100*rise:+.2f} % in all')
        for name in ('files', 'threads', 'children'):
            print(f'    {name}: {later[name].min()} to {later[name].max()}', flush=True)
    assert rise < .02 and last < 1.02*first
    for name in ('files', 'threads', 'children'): assert later[name].max() <= table[name].iloc[0], name
    assert later.children.max() == 0
