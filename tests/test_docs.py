"The site: a small repository is built for real; of this one, what its pages are made of is checked."
import ast
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip('myst_nb')
REPO = Path(__file__).resolve().parent.parent


def from_docs(name, folder=REPO/'docs'):
    spec = importlib.util.spec_from_file_location(name, folder/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


api, check = from_docs('api'), from_docs('check')

# ---- what the reference of this repository is made of

DEFINITIONS = [(m, d) for m in api.modules() for d in m.definitions]


def test_all_public_names_are_in_the_reference():
    for m in api.modules():
        source = (REPO/'bdam_repro'/f'{m.name}.py').read_text()
        exported = re.search(r'^__all__ = (\[.*?\])', source, re.M | re.S)
        assert {d.name for d in m.definitions} == set(ast.literal_eval(exported[1]) if exported else [])


def test_nearly_every_name_has_an_example_that_a_notebook_or_test_runs():
    lack = [f'{m.name}.{d.name}' for m, d in DEFINITIONS if api.example(d) is None]
    assert len(lack) <= .02*len(DEFINITIONS), lack


def test_a_comment_beside_a_parameter_is_its_documentation():
    d = next(d for m, d in DEFINITIONS if d.name == 'info_nce')
    page = '\n'.join(api.entry(api.read_module('losses'), d, ''))
    assert re.search(r'^- `v`: \\\[B, D\\\]', page, re.M), 'the shape, as the source says it'
    assert '40_losses.ipynb#' in page and 'Eq. 3' in page
    assert 'info_nce(' in page.split('```python')[1]


def test_a_class_shows_its_parameters_and_its_forward():
    d = next(d for m, d in DEFINITIONS if d.name == 'BDAM')
    page = '\n'.join(api.entry(api.read_module('bdam'), d, ''))
    assert '**Parameters**' in page and '{py:method} forward(' in page


# ---- troubleshooting

def templates(source):
    "The texts of a program, with … where a value is put in."
    tree = ast.parse(source)
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr)]
    parts = {id(v) for t in texts for v in ast.walk(t) if v is not t}
    for t in texts: yield ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in t.values)
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in parts: yield n.value


def test_every_error_of_the_troubleshooting_page_is_printed_somewhere():
    sources = [*(REPO/'bdam_repro').glob('*.py'), REPO/'docs'/'build.py']
    said = [t for p in sources for t in templates(p.read_text())] + (REPO/'Makefile').read_text().splitlines()
    messages = re.findall(r'(?m)^\| `([^`]+)` \|', (REPO/'docs'/'troubleshooting.md').read_text())
    assert len(messages) > 50
    assert [m for m in messages if not any(m in t for t in said)] == []


# ---- a small repository

def cell(kind, source, outputs=(), **metadata):
    code = {'outputs': list(outputs), 'execution_count': None} if kind == 'code' else {}
    name = hashlib.sha256(source.encode()).hexdigest()[:8]
    return {'cell_type': kind, 'source': source, 'id': name, 'metadata': metadata} | code


def notebook(path, *cells):
    kernel = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'},
              'widgets': {'application/vnd.jupyter.widget-state+json': {
                  'state': {}, 'version_major': 2, 'version_minor': 0}}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({'cells': cells, 'metadata': kernel, 'nbformat': 4, 'nbformat_minor': 5}))


MODULE = '''"""Two numbers together"""

__all__ = ['add_up']

# %% ../nbs/00_tools.ipynb #c1
def add_up(a: int,      # [B] the one
           b: int = 2,  # the other
          ) -> int:     # their sum
    "Adds, as Eq. 1 says."
    return a + b
'''
README = '''# small
![Figure](figures/fig1.png)

```sh
make train
```

## What was found
[Figure](figures/fig1.png), [a table](tables/table1.md), [below](#limits).

## How to read the house
[00_tools](nbs/00_tools.ipynb#eq-1)

## What this is
Small.

## Limits
Many.
'''


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    repo = tmp_path_factory.mktemp('small')
    shutil.copytree(REPO/'docs', repo/'docs', ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('pyproject.toml', 'LICENSE'): shutil.copy(REPO/f, repo)
    for folder in ('figures', 'tables', 'workflow', 'bdam_repro', 'tests'): (repo/folder).mkdir()
    (repo/'README.md').write_text(README)
    (repo/'docs'/'troubleshooting.md').write_text('# Troubleshooting\nNone.\n')
    Image.new('RGB', (8, 8)).save(repo/'figures'/'fig1.png')
    (repo/'figures'/'fig1.pdf').write_bytes(b'%PDF-1.4\n')
    (repo/'tables'/'table1.md').write_text('A caption.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n')
    (repo/'tables'/'audit.md').write_text('# Audit\n')
    (repo/'tables'/'runs.csv').write_text('a,b\n1,2\n')
    (repo/'bdam_repro'/'tools.py').write_text(MODULE)
    printed = {'output_type': 'stream', 'name': 'stdout', 'text': 'kept output\n'}
    bar = {'output_type': 'stream', 'name': 'stderr', 'text': '\rmany 10%'}
    notebook(repo/'nbs'/'00_tools.ipynb',
             cell('markdown', '# Tools\n> One function'), cell('code', '#| hide\nfrom secret import test'),
             cell('markdown', '## Sums\n<a id="eq-1"></a>\n$$s = a + b$$\n\nIt costs $5 or $6. '
                  'See `add_up`, [fig1](fig1.ipynb).'),
             cell('code', '#| export\n' + MODULE.split('#c1\n')[1]) | {'id': 'c1'},
             cell('code', 'print(add_up(1))', [printed, bar]))
    notebook(repo/'nbs'/'fig1.ipynb', cell('markdown', '# The figure\n> Drawn'),
             cell('code', 'x: int = 1', tags=['parameters']))
    notebook(repo/'nbs'/'guide_first.ipynb', cell('markdown', '# A first guide\n> From nothing'),
             cell('code', '1 + 1'))
    notebook(repo/'nbs'/'index.ipynb', cell('markdown', '# Index'))
    (repo/'_docs'/'mathjax-3.2.2').mkdir(parents=True)             # npm is not asked in a test
    (repo/'_docs'/'mathjax-3.2.2'/'tex-svg.js').write_text('window.MathJaxIsHere = true')
    return repo


def build(repo):
    return subprocess.run([sys.executable, 'docs/build.py'], cwd=repo, env=os.environ | {'PYTHONPATH': ''},
                          capture_output=True, text=True)


@pytest.fixture(scope='module')
def site(small):
    done = build(small)
    assert done.returncode == 0, done.stdout + done.stderr
    return small/'_docs'/'html'


def words(page): return re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', '', page.read_text()))


def test_a_notebook_is_shown_with_its_outputs_and_without_its_plumbing(site):
    page = words(site/'nbs'/'00_tools.html')
    assert 'kept output' in page and 'def add_up' in page and 's = a + b' in page and 'costs $5 or $6' in page
    for hidden in ('secret', '#|', 'many 10%'): assert hidden not in page
    assert 'cdn' not in (site/'nbs'/'00_tools.html').read_text(), 'a widget would load its player'


def test_the_reference_has_signature_parameters_place_and_example(site):
    page = words(site/'api'/'tools.html')
    for part in ('add_up(', 'a: [B] the one', 'Returns their sum', '00_tools › Sums', 'Eq. 1',
                 'print(add_up(1))'):
        assert part in page.replace(' :', ':'), part
    assert 'href="../api/tools.html#bdam_repro.tools.add_up"' in (site/'nbs'/'00_tools.html').read_text()


def test_guides_are_found_by_their_name(site):
    assert 'A first guide' in words(site/'read'/'guides.html')
    assert 'read/guides.html' in (site/'index.html').read_text()


def test_results_are_there(site):
    assert 'A caption.' in words(site/'tables'/'table1.html')
    assert 'runs.csv' in words(site/'results'/'data.html') and list(site.glob('_downloads/*/runs.csv'))
    assert 'handbook.html#limits' in (site/'index.html').read_text()


def test_a_broken_link_fails_the_build(small, site):
    path = small/'nbs'/'guide_first.ipynb'
    before = path.read_text()
    data = json.loads(before)
    faults = '[gone](32_gone.ipynb), [place](#nowhere), <img src="https://example.org/a.png">'
    data['cells'].append(cell('markdown', faults))
    path.write_text(json.dumps(data))
    try: done = build(small)
    finally: path.write_text(before)
    assert done.returncode != 0
    for said in ('32_gone', '#nowhere', 'fetches https://example.org/a.png'): assert said in done.stdout, said
    assert build(small).returncode == 0


# ---- in a browser

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def url(site):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.mark.skipif(not CHROMIUM, reason='no chromium here: apt-get install chromium')
@pytest.mark.parametrize('width', [1400, 390])
def test_no_reader_asks_another_host_and_no_page_is_wider_than_a_phone(url, width):
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        tab = browser.new_context(viewport={'width': width, 'height': 800}).new_page()
        tab.set_default_timeout(60_000)
        outside, errors = [], []
        ours = url, 'data:', 'blob:'
        tab.on('request', lambda r: None if r.url.startswith(ours) else outside.append(r.url))
        tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        for page in ('index.html', 'nbs/00_tools.html', 'api/tools.html', 'results/figures.html'):
            tab.goto(url + page)
            assert tab.evaluate('document.documentElement.scrollWidth') <= width, page
        assert tab.goto(url + 'nbs/00_tools.html').ok
        tab.wait_for_function('window.MathJaxIsHere')
        tab.goto(url + 'search.html?q=add_up')
        tab.wait_for_selector('#search-results a')
        assert 'add_up' in tab.inner_text('#search-results')
        assert (outside, errors) == ([], [])
        browser.close()
