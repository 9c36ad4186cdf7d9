"The repository itself: notebooks, package and README agree, and nothing of one machine is in them."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((REPO/'nbs').glob('*.ipynb'))
NUMBERED = [p for p in NOTEBOOKS if p.stem[:2].isdigit()]
NAMED = [p for p in NOTEBOOKS if p not in NUMBERED and p.stem != 'index']
MODULES = {p.stem.split('_', 1)[1]: int(p.stem[:2]) for p in NUMBERED}     # name -> number


def run(*command, cwd, **env):
    r = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert r.returncode == 0, f'{command}\n{r.stdout}\n{r.stderr}'
    return r.stdout


def tracked() -> list[Path]:
    return [REPO/f for f in run('git', 'ls-files', '-z', cwd=REPO).split('\0') if f and (REPO/f).is_file()]


def cells(notebook, kind='code'):
    return [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == kind]


@pytest.fixture
def copy(tmp_path):
    "What nbdev needs, elsewhere: nothing it writes comes back here."
    shutil.copytree(REPO/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*', '_proc'))
    for f in ('settings.ini', 'pyproject.toml'): shutil.copy(REPO/f, tmp_path)
    return tmp_path


def test_export_into_an_empty_folder_gives_the_package(copy):
    run(BIN/'nbdev_export', cwd=copy)
    def modules(folder):
        return {p.stem: p.read_text() for p in (folder/'bdam_repro').glob('*.py') if p.stem not in ('__init__', '_modidx')}
    here, fresh = modules(REPO), modules(copy)
    assert set(here) == set(fresh) == set(MODULES), 'a module without a notebook, or a notebook that was never exported'
    assert [name for name in here if here[name] != fresh[name]] == [], 'run nbdev_export'


def test_notebooks_are_clean(copy):
    run(BIN/'nbdev_clean', '--fname', copy/'nbs', cwd=copy)
    assert [p.name for p in NOTEBOOKS if p.read_bytes() != (copy/'nbs'/p.name).read_bytes()] == [], 'run nbdev_clean'


def test_readme_is_the_index(tmp_path):
    fresh = tmp_path/'README.md'
    run('make', '-s', 'readme', f'README={fresh}', f'BIN={BIN}', 'STAMP=', cwd=REPO)
    assert fresh.read_text() == (REPO/'README.md').read_text(), 'run make readme'


def test_readme_begins_with_the_two_commands():
    commands = re.search(r'```sh\n(.*?)```', (REPO/'README.md').read_text(), re.S).group(1)
    assert [line.split('#')[0].strip() for line in commands.splitlines()] == ['make train', 'make test']


def test_map_names_every_notebook():
    table = (REPO/'README.md').read_text().split('## The map')[1].split('\n## ')[0]
    listed = {n for row in re.findall(r'^\| (`.*?) \|', table, re.M) for n in re.findall(r'`(\w+)`', row)}
    assert listed == {p.stem for p in NOTEBOOKS} - {'index'}


def test_imports_go_one_way():
    for name, number in MODULES.items():
        tree = ast.parse((REPO/'bdam_repro'/f'{name}.py').read_text())
        used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
        assert [u for u in used if MODULES[u] >= number] == [], name


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_well(notebook):
    for c in cells(notebook):
        assert len(''.join(c['source']).splitlines()) <= 60, f'split this cell: {"".join(c["source"])[:80]!r}'
        for o in c['outputs']: assert o['output_type'] != 'error', o.get('evalue')
    assert cells(notebook, 'markdown')[0]['source'][0].startswith('# ')


@pytest.mark.parametrize('notebook', NAMED, ids=lambda p: p.stem)
def test_named_notebook_has_one_parameters_cell(notebook):
    tagged = [c for c in cells(notebook) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    for statement in ast.parse(''.join(tagged[0]['source'])).body:
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None, 'a parameter has a type and a default'


def test_files_are_small_and_of_no_machine():
    machine = re.compile(rb'(?<![\w.*)])/(?:work|root|tmp|home)/[\w.]')
    for p in tracked():
        data = p.read_bytes()
        assert len(data) < 1.5*2**20, f'{p} has {len(data):,} bytes'
        found = machine.search(data)
        assert found is None, f'{p}: {data[max(0, found.start() - 40):found.end() + 40]!r}'


def test_wheel_installs_without_nbdev(tmp_path):
    source = tmp_path/'source'
    for p in [p for p in tracked() if p.suffix in ('.py', '.toml', '.md') or p.name == 'LICENSE']:
        (source/p.relative_to(REPO)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, source/p.relative_to(REPO))
    offline = '--no-deps', '--no-build-isolation', '--no-index'
    run(sys.executable, '-m', 'pip', 'wheel', '-q', *offline, '-w', tmp_path, '.', cwd=source)
    wheel = zipfile.ZipFile(next(tmp_path.glob('*.whl')))
    wheel.extractall(tmp_path/'site')
    modules = [p.stem for p in tracked() if p.parent.name == 'bdam_repro' and p.stem in MODULES]
    code = f'''import sys, importlib; sys.path.insert(0, "site")
for n in {modules}: importlib.import_module("bdam_repro." + n)
print(sys.modules["bdam_repro"].__file__, {{"nbdev", "fastcore", "IPython"}} & set(sys.modules))'''
    file, extra = run(sys.executable, '-c', code, cwd=tmp_path).split()
    assert file.startswith(str(tmp_path)) and extra == 'set()'
    entry, = [f for f in wheel.namelist() if f.endswith('entry_points.txt')]
    assert 'bdam = bdam_repro.engine:BdamEngine' in wheel.read(entry).decode()
