"A GPU machine without a network: what is packed for it, and that nothing begins after a failure."
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bdam_repro.config import make_config
from bdam_repro.many import run_line

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO/'workflow'/'offline.py'


@pytest.fixture(scope='module')
def offline():
    spec = importlib.util.spec_from_file_location('offline_script', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.soak
def test_two_small_runs_then_the_list(tmp_path):
    c = make_config('synth', 'smoke', 'baseline', seed=1, data_root=str(tmp_path/'data'))
    (tmp_path/'plan.jsonl').write_text(run_line(c) + '\n')
    command = [sys.executable, SCRIPT, 'run', tmp_path, '--out', tmp_path/'out', '--minutes', '30', '--smoke']
    subprocess.run([str(x) for x in command], check=True, timeout=1800)
    assert '1 of 1 runs' in (tmp_path/'out'/'grid.log').read_text()
    assert (tmp_path/'out'/'gpu.csv').read_text().count('from start to test') == 2
    with zipfile.ZipFile(tmp_path/'out'/'runs-00.zip') as z: names = {Path(n).name for n in z.namelist()}
    assert {'metrics.json', 'config.json', 'features.safetensors'} <= names
