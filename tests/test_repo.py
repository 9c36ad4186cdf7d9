"The repository itself: notebooks, package and README agree, and nothing of one machine is in them."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from bdam_repro.parameters import DECIDING_MODULES

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
    (copy/'bdam_repro').mkdir()
    names = shutil.copy(REPO/'bdam_repro'/'__init__.py', copy/'bdam_repro')     # the main names
    run(BIN/'nbdev_export', cwd=copy)
    assert Path(names).read_text() == (REPO/'bdam_repro'/'__init__.py').read_text()
    def modules(folder):
        return {p.stem: p.read_text() for p in (folder/'bdam_repro').glob('*.py')
                if p.stem not in ('__init__', '_modidx')}
    here, fresh = modules(REPO), modules(copy)
    assert set(here) == set(fresh) == set(MODULES), 'a module without a notebook, or the reverse'
    assert [name for name in here if here[name] != fresh[name]] == [], 'run nbdev_export'


def test_notebooks_are_clean(copy):
    run(BIN/'nbdev_clean', '--fname', copy/'nbs', cwd=copy)
    assert [p.name for p in NOTEBOOKS
            if p.read_bytes() != (copy/'nbs'/p.name).read_bytes()] == [], 'run nbdev_clean'


def test_a_notebook_saved_in_jupyterlab_is_as_git_has_it(copy, monkeypatch):
    "What opening, running a cell and saving add is taken away again (`jupyter_server_config.py`)."
    large = pytest.importorskip('jupyter_server.services.contents.largefilemanager')
    from traitlets.config import Config as Traits
    monkeypatch.chdir(copy)
    traits = Traits()
    exec((REPO/'jupyter_server_config.py').read_text(), {'c': traits})
    manager = large.LargeFileManager(root_dir=str(copy), config=traits)
    for name in ('nbs/31_bdam.ipynb', 'nbs/train.ipynb'):
        model = manager.get(name)
        model['content']['metadata']['language_info'] = {'name': 'python', 'version': '3.12'}
        model['content']['metadata']['kernelspec']['display_name'] = 'another one'
        for c in model['content']['cells']:
            c['metadata']['collapsed'] = True
            if c['cell_type'] == 'code': c['execution_count'] = 7
        model.pop('created'), model.pop('last_modified')
        manager.save(model, name)
        assert (copy/name).read_bytes() == (REPO/name).read_bytes()


def test_the_index_shows_the_numbers_of_the_tables(tmp_path):
    "Run anew, its cells say what the stored ones say: no table has changed since."
    import nbformat
    from nbclient import NotebookClient
    stored, nb = (nbformat.read(REPO/'nbs/index.ipynb', 4) for _ in range(2))
    NotebookClient(nb, timeout=600, resources={'metadata': {'path': str(REPO/'nbs')}}).execute()
    def said(cell): return [out.get('data', out.get('text')) for out in cell.get('outputs', ())]
    for before, now in zip(stored.cells, nb.cells): assert said(now) == said(before), before.source[:200]


def test_readme_is_the_index(tmp_path):
    fresh = tmp_path/'README.md'
    run('make', '-s', 'readme', f'README={fresh}', f'BIN={BIN}', 'STAMP=', cwd=REPO)
    assert fresh.read_text() == (REPO/'README.md').read_text(), 'run make readme'


def test_readme_begins_with_the_two_commands():
    commands = re.search(r'```sh\n(.*?)```', (REPO/'README.md').read_text(), re.S).group(1)
    assert [line.split('#')[0].strip() for line in commands.splitlines()] == ['make train', 'make test']


def test_map_names_every_notebook():
    table = (REPO/'README.md').read_text().split('## The map')[1].split('\n## ')[0]
    rows = re.findall(r'^\| \[(\w+)\]\(nbs/(\w+)\.ipynb\) \| (?:`(\w+)`)? \|', table, re.M)
    assert [name for name, target, _ in rows if name != target] == []
    assert [name for name, *_ in rows] == sorted(p.stem for p in NUMBERED) + [
        name for name, *_ in rows if not name[:2].isdigit()]
    assert {name for name, *_ in rows} == {p.stem for p in NOTEBOOKS} - {'index'}
    assert {name: module for name, _, module in rows if module} == {p.stem: p.stem[3:] for p in NUMBERED}


def test_imports_go_one_way():
    for name, number in MODULES.items():
        tree = ast.parse((REPO/'bdam_repro'/f'{name}.py').read_text())
        used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1
                and n.module}
        assert [u for u in used if MODULES[u] >= number] == [], name


def test_each_module_behind_a_run_decides_it_or_does_not():
    "A new module that the trainer imports has to be put on one side or the other."
    left, behind = ['runs'], set()
    while left:
        behind.add(name := left.pop())
        for n in ast.walk(ast.parse((REPO/'bdam_repro'/f'{name}.py').read_text())):
            if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module and n.module not in behind:
                left.append(n.module)
    draws = {'people', 'drawing', 'rendering', 'captions', 'synth'}         # a dataset that is drawn once
    handles = {'config', 'parameters', 'files', 'hub', 'compiled', 'launch', 'pretrained',
               'threads', 'checkpoints', 'screen', 'words'}     # options, files, processes, words of `split`
    assert behind == {*DECIDING_MODULES} | draws | handles
    assert not {*DECIDING_MODULES} & (draws | handles)


def top_level_names(module):
    "What a module defines, by itself and at its top level."
    for n in ast.parse((REPO/'bdam_repro'/f'{module}.py').read_text()).body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield n.name
        if isinstance(n, (ast.Assign, ast.AnnAssign)):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            for t in targets:
                yield from (x.id for x in ast.walk(t) if isinstance(x, ast.Name)
                            and isinstance(x.ctx, ast.Store))


def test_a_name_means_one_thing():
    homes = {}
    for module in MODULES:
        for name in {*top_level_names(module)} - {'__all__'}: homes.setdefault(name, []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_no_private_name_is_imported():
    for module in MODULES:
        for n in ast.walk(ast.parse((REPO/'bdam_repro'/f'{module}.py').read_text())):
            if isinstance(n, ast.ImportFrom) and n.level:
                assert [a.name for a in n.names if a.name[0] == '_' and a.name[1] != '_'] == [], module


@pytest.mark.parametrize('module', MODULES)
def test_a_module_can_be_read_in_one_sitting(module):
    assert len((REPO/'bdam_repro'/f'{module}.py').read_text().splitlines()) <= 450


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_lines_of_code_fit_the_page(notebook):
    width = tomllib.loads((REPO/'pyproject.toml').read_text())['tool']['ruff']['line-length']
    wide = [line for c in cells(notebook) for line in ''.join(c['source']).splitlines() if len(line) > width]
    assert wide == [], f'{len(wide)} lines are wider than {width} columns'


def slug(heading):
    "The anchor of a heading, as code hosts and site builders make it."
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    return re.sub(r'[^\w\- ]', '', text.strip().lower()).replace(' ', '-')


def anchors(text):
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    return {slug(h) for h in re.findall(r'^#+ +(.*)$', text, re.M)} | {*re.findall(
        r'<a id="([^"]+)"></a>', text)}


def prose(path):
    if path.suffix != '.ipynb': return path.read_text()
    return '\n\n'.join(''.join(c['source']) for c in cells(path, 'markdown'))


@pytest.mark.parametrize('page', [*NOTEBOOKS, REPO/'README.md'], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r'`[^`\n]*`', '', re.sub(r'```.*?```', '', prose(page), flags=re.S))
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'https?:|attachment:', target): continue
        file, _, anchor = target.partition('#')
        there = (page.parent/file).resolve() if file else page
        assert there.exists() and REPO in (there, *there.parents), f'{target}: no such file'
        if anchor: assert anchor in anchors(prose(there)), f'{target}: no such place'


@pytest.mark.parametrize('notebook', NUMBERED, ids=lambda p: p.stem)
def test_a_notebook_that_is_named_is_a_link(notebook):
    text = re.sub(r'```.*?```', '', prose(notebook), flags=re.S)
    stems = '|'.join(p.stem for p in NOTEBOOKS if p.stem[:2].isdigit() and p != notebook)
    bare = re.findall(rf'(?<!\[)`?\b({stems})\b`?(?!\]|\.ipynb)', text)
    assert bare == [], 'name it as [32_mamba](32_mamba.ipynb)'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_open_points_and_equations_are_links(notebook):
    text = re.sub(r'```.*?```', '', prose(notebook), flags=re.S)
    text = re.sub(r'(?m)^[#>].*$', '', text)         # headings and the line below a title stay plain
    text = re.sub(r'`[^`\n]*`|\[[^\]]*\]\([^)]*\)', '', text)
    here = anchors(prose(notebook))
    bare = [m[0] for m in re.finditer(r'[Oo]pen points? (\d+)', text) if f'open-point-{m[1]}' not in here]
    bare += [m[0] for m in re.finditer(r'Eq\. (\d)', text) if f'eq-{m[1]}' not in here]
    assert bare == [], 'link them, as [open point 12](01_paper.ipynb#open-point-12)'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_well(notebook):
    for c in cells(notebook):
        assert len(''.join(c['source']).splitlines()) <= 60, f'split this cell: {"".join(c["source"])[:80]!r}'
        for o in c['outputs']: assert o['output_type'] != 'error', o.get('evalue')
    assert cells(notebook, 'markdown')[0]['source'][0].startswith('# ')


def test_only_hidden_cells_are_collapsed():
    "In JupyterLab a reader sees each line that the site shows, and no plumbing."
    collapsed, tags = 0, {'remove_input', 'remove_cell'}
    for notebook in NOTEBOOKS:
        for c in cells(notebook, 'code'):
            if not c['metadata'].get('jupyter', {}).get('source_hidden'): continue
            hidden = ''.join(c['source']).startswith('#| hide') or tags & {*c['metadata'].get('tags', [])}
            assert hidden, f'{notebook.name}: {"".join(c["source"])[:80]!r} is collapsed'
            collapsed += 1
    assert collapsed > len(NOTEBOOKS)


@pytest.mark.parametrize('notebook', NAMED, ids=lambda p: p.stem)
def test_named_notebook_has_one_parameters_cell(notebook):
    tagged = [c for c in cells(notebook) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    for statement in ast.parse(''.join(tagged[0]['source'])).body:
        assert isinstance(statement, ast.AnnAssign), 'a parameter has a type'
        assert statement.value is not None, 'a parameter has a default'


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


def test_the_page_of_the_benchmarks_tells_its_table():
    "What the page says of the bars that are met, or not, on the quiet Intel."
    cells = json.loads((REPO/'nbs'/'benchmarks.ipynb').read_text())['cells']
    said = ' '.join(''.join(c['source']) for c in cells)
    t = pd.read_csv(REPO/'tables'/'benchmarks.csv').query("machine.str.startswith('Intel')", engine='python')

    def row(size, peer): return t[(t['size'] == size) & (t['peer'] == peer)].iloc[-1]
    loop = row('1,000, server of 100 ms', 'sequential loop')
    assert f'it is {loop.ratio:.0f} times ({loop.seconds:.1f} s for 1,000 pictures)' in said
    irra, floor = row('19,848 × 19,848', 'IRRA').ratio, row('19,848 × 19,848', 'product alone').ratio
    assert f'takes {floor:.2f} of our time and IRRA {irra:.1f} times as long' in said
    assert f'the ratio without any count would be {irra/floor:.1f}' in said
