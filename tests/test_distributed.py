"""Several processes on one batch: losses, gradients, task weights and metrics of one process (gloo, CPU)."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_training import cfg

from bdam_repro import runs
from bdam_repro import trainer as trainers
from bdam_repro.config import UserError, make_config, run_dir
from bdam_repro.files import read_tensors
from bdam_repro.launch import start_processes
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.runs import finished, train

SIZES = [2, 4] if os.environ.get('BDAM_SOAK') else [2]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Data and tokenizer, made once, so that the processes only read them."
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp('home')
    c = cfg(home)
    run_tokenizer(c, load_data(c, False), home/'tokenizer')
    return home


def result(job: str, n: int, home: Path):
    shown = []
    status = start_processes([sys.executable, str(Path(__file__).with_name('worlds.py')), job, str(home)], n,
                             shown.append)
    assert status == 0, ''.join(shown)
    line, = [line for line in ''.join(shown).splitlines() if line.startswith('result ')]
    return json.loads(line.removeprefix('result '))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize('n', SIZES)
def test_losses_gradients_and_task_weights_are_those_of_one_process(home, n):
    rows = result('losses', n, home)
    assert len(rows) > 20
    for name, worst in rows.items(): assert max(worst.values()) < 1e-10, (name, worst)
    assert any(worst['gradient'] > 0 for worst in rows.values())           # not compared with itself


@pytest.mark.timeout(1200)
def test_metrics_are_byte_identical_on_any_number_of_processes(home):
    one = result('scores', 1, home)
    for n in (2, 3): assert result('scores', n, home) == one


@pytest.mark.timeout(1200)
def test_a_run_on_two_processes(home, tmp_path):
    one = train(cfg(home, epochs=1, device='cpu', tag='one'), tmp_path, progress=False)
    two = train(cfg(home, epochs=1, device='cpu', tag='two', processes=2), tmp_path, progress=False)
    a, b = (pd.read_csv(folder/'history.csv').filter(regex='^loss_|^w_|^lr') for folder in (one, two))
    assert (a - b).abs().max().max() < 1e-4
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert finished(two)['queries'] == finished(one)['queries']
    train(cfg(home, epochs=1, device='cpu', tag='two'), tmp_path, progress=False)   # complete: the same run


@pytest.mark.timeout(1200)
def test_a_run_that_one_process_began_goes_on_in_two(home, tmp_path, monkeypatch):
    c, losses, seen = cfg(home, epochs=2, device='cpu'), trainers.batch_losses, []
    def stop_at_third(*args):
        seen.append(1)
        if len(seen) == 1 + 3: os.kill(os.getpid(), signal.SIGINT)
        return losses(*args)
    with monkeypatch.context() as m:
        m.setattr(trainers, 'batch_losses', stop_at_third)
        with pytest.raises(KeyboardInterrupt, match='after step 3 of 4'): train(c, tmp_path, progress=False)
    assert read_tensors(run_dir(c, tmp_path)/'last.ckpt')[1]['step'] == 3
    folder = train(c.model_copy(update={'processes': 2}), tmp_path, progress=False)
    whole = train(c, tmp_path/'whole', progress=False)
    a, b = (pd.read_csv(x/'history.csv').filter(regex='^loss_|^w_|^lr') for x in (folder, whole))
    assert (a - b).abs().max().max() < 1e-4


def test_a_mistake_in_a_process_is_one_line(home, tmp_path, monkeypatch):
    c = cfg(home, device='cpu', processes=2)
    monkeypatch.setattr(runs, 'launch', lambda c, *rest, launch=runs.launch:
                        launch(c.model_copy(update={'data_root': str(tmp_path), 'dataset': 'rstp'}), *rest))
    with pytest.raises(UserError, match='RSTPReid') as e: train(c, tmp_path, progress=False)
    assert '\n' not in str(e.value)


def accelerate_launch(home: Path, *told: str) -> subprocess.CompletedProcess:
    options = dict(preset='smoke', device='cpu', amp='off', epochs=1, data_root=home/'data')
    options |= dict(runs=home/'launched')
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
               '--main_process_port', '0', *told, '-m', 'bdam_repro.shell']
    for name, value in options.items(): command += ['-p', name, str(value)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1000)


@pytest.mark.timeout(1200)
def test_accelerate_launch_trains_in_two_processes_and_refuses_what_would_be_ignored(home):
    refused = accelerate_launch(home, '--mixed_precision', 'bf16')
    said = [line for line in refused.stderr.splitlines() if line.startswith('error: ')]
    assert refused.returncode and said and not (home/'launched').exists()
    assert all('mixed_precision=bf16, but the run has amp=off' in line for line in said)
    done = accelerate_launch(home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert finished(run_dir(make_config(preset='smoke'), home/'launched'))['epoch'] == 1


def test_a_batch_that_does_not_split_is_refused(home):
    with pytest.raises(UserError, match=r'16 images does not split into processes\*accumulate = 3'):
        cfg(home, processes=3)
