"A GPU machine without a network: what is packed for it, and that nothing begins after a failure."
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from bdam_repro.config import UserError, make_config
from bdam_repro.many import run_line
from bdam_repro.runs import code_version, train

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO/'workflow'/'offline.py'


def script(path):
    spec = importlib.util.spec_from_file_location(f'{path.stem}_script', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def offline(): return script(SCRIPT)


@pytest.fixture(scope='module')
def fusion_grid(): return script(SCRIPT.with_name('fusion_grid.py'))


def test_wheels_are_what_the_package_needs_and_the_machine_lacks(offline):
    everything = offline.needed(['bdam-repro'], set())
    assert {'transformers', 'papermill', 'tenacity', 'jupyter-client', 'pydantic-core'} <= set(everything)
    assert not [name for name in everything if name in ('torch', 'triton', 'bdam-repro') or 'nvidia' in name]
    less = offline.needed(['bdam-repro'], {'papermill', 'numpy'})
    assert {'papermill', 'numpy'} & set(less) == set()
    assert 'nbclient' not in less                      # papermill alone needs it
    assert all(everything[name] == version for name, version in less.items())


def test_nothing_is_trained_after_a_small_run_has_failed(offline, tmp_path, monkeypatch):
    begun = []
    def call(command, **how):
        begun.append(command)
        return subprocess.CompletedProcess(command, 1)
    monkeypatch.setattr(offline.subprocess, 'run', call)
    monkeypatch.setattr(offline.subprocess, 'Popen', call)
    monkeypatch.setattr(offline.shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match='nothing else was begun'):
        offline.run(tmp_path, tmp_path/'out', 9., 1, '', 0., True)
    assert len(begun) == 1 and 'whole' in begun[0]


def test_a_server_that_does_not_serve_is_left_out(offline, tmp_path, monkeypatch):
    "Where CUDA MPS is installed and fails, processes are not sent to it."
    begun = []
    def call(command, **how):
        begun.append(command[0])
        if 'timeout' in how: raise subprocess.TimeoutExpired(command, how['timeout'])
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(offline.shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setattr(offline.subprocess, 'run', call)
    env = {}
    offline.start_mps(tmp_path, env)
    assert env == {} and begun == ['nvidia-cuda-mps-control', sys.executable, 'nvidia-cuda-mps-control']


def test_a_full_card_is_waited_for(fusion_grid, monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(fusion_grid.time, 'sleep', waits.append)
    def measure(n):
        calls.append(n)
        if len(calls) < n: raise torch.OutOfMemoryError('CUDA out of memory')
        return 'done'
    assert fusion_grid.patient(measure, 3) == 'done' and waits == [10, 20]
    with pytest.raises(torch.OutOfMemoryError): fusion_grid.patient(measure, 1000)
    assert len(calls) == 3 + 7


def test_the_gpu_script_on_a_cpu(tmp_path):
    "Its sections that compare and wait, at toy sizes: a killed run, the paper's preset, a real loader."
    path, out = REPO/'benchmarks'/'gpu.py', tmp_path/'gpu.csv'
    command = [sys.executable, path, '--smoke', '--sections', 'resume,agree,loading', '--out', out]
    one = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
    subprocess.run([str(x) for x in command], check=True, timeout=500, cwd=REPO, env=os.environ | one)
    rows = pd.read_csv(out, keep_default_na=False)
    assert list(rows.section.drop_duplicates()) == ['resume', 'agree', 'loading']
    value = rows.set_index(['what', 'precision']).value
    assert value['weights of a killed run, step by step', 'float32'] == 0
    if not torch.cuda.is_available(): assert value['losses, GPU against CPU', 'float32'] == 0
    assert 0 < value['losses, GPU against CPU', 'bfloat16'] < .05
    waited = rows[rows.what.str.startswith('loader, share')]
    assert len(waited) == 2 and waited.value.between(0, 100).all() and set(waited.batch) == {8}
    assert set(rows.code) == {code_version()}


def test_the_gpu_script_asks_the_configuration_for_its_batch():
    "A preset may change: rows were labeled 64 after `tiny` had grown to 128."
    assert not re.findall(r"'(?:images/s|s)', \d+", (REPO/'benchmarks'/'gpu.py').read_text())
    assert script(REPO/'benchmarks'/'gpu.py').batch_of(make_config('synth', 'tiny')) == 128


def test_folders_of_towers(fusion_grid, tmp_path, monkeypatch):
    for seed in (3, 1):
        folder = tmp_path/'synth'/'tiny'/'baseline'/f'seed{seed}'
        folder.mkdir(parents=True)
        for name in ('best.safetensors', 'metrics.json'): (folder/name).touch()
    (tmp_path/'synth'/'tiny'/'baseline'/'seed2').mkdir()                         # still in training
    (tmp_path/'synth'/'tiny'/'baseline'/'seed2'/'best.safetensors').touch()
    assert [f.name for f in fusion_grid.find_folders([str(tmp_path)])] == ['seed1', 'seed3']
    monkeypatch.chdir(tmp_path)
    assert [f.name for f in fusion_grid.find_folders(['synth/tiny/*/seed3'])] == ['seed3']
    with pytest.raises(UserError, match='no finished run with its weights in nowhere'):
        fusion_grid.find_folders(['nowhere'])


@pytest.mark.soak
@pytest.mark.timeout(1900)
def test_two_small_runs_then_the_list(tmp_path):
    c = make_config('synth', 'smoke', 'baseline', seed=1, data_root=str(tmp_path/'data'))
    (tmp_path/'plan.jsonl').write_text(run_line(c) + '\n')
    folder = train(c.model_copy(update=dict(seed=7)), tmp_path/'runs', progress=False)
    shutil.copytree(folder, tmp_path/'towers'/'synth'/'smoke'/'baseline'/'seed7')
    command = [sys.executable, SCRIPT, 'run', tmp_path, '--out', tmp_path/'out', '--minutes', '10', '--smoke']
    subprocess.run([str(x) for x in command], check=True, timeout=1800)
    assert '1 of 1 runs' in (tmp_path/'out'/'grid.log').read_text()
    assert (tmp_path/'out'/'gpu.csv').read_text().count('from start to test') == 2
    with zipfile.ZipFile(tmp_path/'out'/'runs-00.zip') as z: names = {Path(n).name for n in z.namelist()}
    rows = pd.read_csv(tmp_path/'out'/'fusion.csv')
    assert len(rows) and set(rows.towers) == {'synth/smoke/baseline'} and rows.seconds.min() > 0
    known, more = tmp_path/'out'/'fusion.csv', tmp_path/'more.csv'
    few = [sys.executable, SCRIPT.with_name('fusion_grid.py'), tmp_path/'towers', '--known', known]
    few += ['--out', more, '--only', 'Product (pooled; gallery)', '--seeds', '1']
    for wanted in (0 if 'Product' in set(rows.fusion) else 1), 0:
        said = subprocess.run(few, check=True, timeout=900, capture_output=True, text=True).stdout
        assert said.startswith(f'{wanted} rows to measure')
    assert {'metrics.json', 'config.json', 'features.safetensors'} <= names
