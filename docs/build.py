"""The site: stage the sources, build them with Sphinx, check every link. `make docs` runs it.

Nothing is executed: the notebooks are shown with the outputs that they have in the repository.
"""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import api  # noqa: E402
import check  # noqa: E402

REPO = api.REPO
OUT = REPO/'_docs'
SRC, HTML = OUT/'src', OUT/'html'
SHOWN = 'nbs', 'tables', 'figures', 'workflow', 'LICENSE'        # what of the repository is on the site
MATHJAX = 'mathjax@3.2.2'        # the last one whose SVG output is a single file, without fonts to load

GROUPS = [      # title, numbers, what they hold
    ('The paper and every option', range(0, 10),
     'The printed numbers as data, open points, claims, options, and small tools that all others use.'),
    ('Data', range(10, 18),
     'Three datasets from their official files, SynthPEDES drawn from factors, and batches of them.'),
    ('Descriptions', range(18, 30),
     'What a multimodal language model says of a picture: servers, limits, checks, styles.'),
    ('The model', range(30, 40), 'Encoders, BDAM, Mamba, the fusion, and the model in a file.'),
    ('Losses and optimization', range(40, 50),
     'Equations 1 to 6, optimizers, several processes, CUDA graphs, checkpoints.'),
    ('Training and scoring', range(50, 59), 'Metrics, evaluation, the loop, the run folder, intervals.'),
    ('Search', range(59, 64), 'A gallery, a query, the reason for a hit, a page and a panel.'),
    ('Tables and figures', range(65, 80), 'From finished runs to every table and figure.'),
    ('The audit', {64, *range(80, 87), *range(90, 100)},
     'Findings, readings, claims, protocol, ceiling, clothes change, report.'),
    ('Benchmarks and shell', range(87, 90), 'Programs compared, and a run from a shell.'),
]


def write(path: Path, text: str | bytes) -> None:
    "Write what is new or has changed, so that Sphinx builds only these pages anew."
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data: path.write_bytes(data)
    staged.add(path)


staged: set[Path] = set()


# ---- Markdown

def outside_code(text: str, change) -> str:
    "Apply `change` to what is not in a fenced block."
    parts = re.split(r'(?ms)(^```.*?^```\s*?$)', text)
    parts[::2] = [change(p) for p in parts[::2]]
    return ''.join(parts)


def links_for_site(text: str, up: str) -> str:
    "Links that mean another page here: figures, the index, folders. `up` leads to the root, '' or '../'."
    figure = rf'(?<!!)(\[[^\]]*\])\({re.escape(up)}figures/fig(\d)\.png\)'
    text = re.sub(figure, rf'\1({up}results/figures.md#figure-\2)', text)
    text = re.sub(r'(\[[^\]]*\])\((?:nbs/)?index\.ipynb(#[^)]*)?\)', rf'\1({up}handbook.md\2)', text)
    for name in ('docs/troubleshooting', 'CONTRIBUTING', 'CHANGELOG'):
        text = text.replace(f']({up}{name}.md', f']({up}{name.split("/")[-1].lower()}.md')
    def keep(m):
        "Text alone where a link leads to a folder, or to a file of the repository that the site has not."
        target = (REPO/'nbs'/m[2] if up else REPO/m[2]).resolve()
        place = target.relative_to(REPO).parts if target.is_relative_to(REPO) else ()
        outside = target.exists() and place[:1] not in {(p,) for p in SHOWN}
        return m[1] if target.is_dir() or outside else m[0]
    return re.sub(r'(?<!!)\[([^\]]*)\]\(([^)#:\s]+)\)', keep, text)


# ---- notebooks

def site_cell(cell: dict) -> dict | None:
    "A cell as a reader of the site sees it; None: not at all."
    source = ''.join(cell['source'])
    tags = set(cell['metadata'].get('tags', []))
    if cell['cell_type'] == 'markdown':
        text = outside_code(source, lambda t: api.link_names(links_for_site(t, '../')))
        return cell | {'source': text}
    hidden = 'remove_cell' in tags or re.search(r'(?m)^#\|\s*(hide|default_exp)\b', source)
    if cell['cell_type'] != 'code' or hidden: return None
    if 'remove_input' in tags: tags.add('remove-input')
    elif cell['metadata'].get('jupyter', {}).get('source_hidden'): tags.add('hide-input')
    outputs = [o for o in map(site_output, cell['outputs']) if o]
    source = re.sub(r'(?m)^#\|.*\n?', '', source)
    if not source.strip(): return None
    return cell | {'source': source, 'outputs': outputs, 'metadata': {'tags': sorted(tags)}}


def site_output(output: dict) -> dict | None:
    "Progress bars and widgets live in a running notebook alone; their last state says nothing here."
    if output.get('name') == 'stderr' and '\r' in ''.join(output['text']): return None
    if output.get('name') == 'stderr' and ''.join(output['text']).isspace(): return None
    if 'data' in output:
        data = {k: v for k, v in output['data'].items() if 'widget' not in k}
        if set(data) != set(output['data']) and set(data) <= {'text/plain'}: return None
        return output | {'data': data}
    return output


def stage_notebook(path: Path) -> None:
    notebook = json.loads(path.read_text())
    cells = [c for c in map(site_cell, notebook['cells']) if c]
    module = path.stem[3:]
    if api.numbered().get(module) == path.stem and api.read_module(module).definitions:
        cells.insert(1, {'cell_type': 'markdown', 'id': 'reference', 'metadata': {}, 'source':
                         f'[Reference of `bdam_repro.{module}`](../api/{module}.md)'})
    without_widgets = {k: v for k, v in notebook['metadata'].items() if k != 'widgets'}
    notebook |= {'cells': cells, 'metadata': without_widgets}
    write(SRC/'nbs'/path.name, json.dumps(notebook, ensure_ascii=False))


def heading(path: Path) -> tuple[str, str]:
    "(title, the line below it) of a notebook."
    cells = json.loads(path.read_text())['cells']
    title, *rest = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown').splitlines()
    return title.lstrip('# ').strip(), next((r.lstrip('> ').strip() for r in rest if r.startswith('>')), '')


def toctree(entries: list[str], options: str = ':hidden:') -> str:
    return '\n'.join(['```{toctree}', *([options] if options else []), '', *entries, '```', ''])


def group_page(name: str, title: str, about: str, notebooks: list[Path]) -> None:
    lines, entries = [f'# {title}', '', about, '', '| notebook | title | holds |', '|---|---|---|'], []
    for p in notebooks:
        what, below = heading(p)
        number = f'{p.stem[:2]} · ' if p.stem[:2].isdigit() else ''
        lines.append(f'| [{p.stem}](../nbs/{p.name}) | {what} | {links_for_site(below, "../")} |')
        entries.append(f'{number}{what} <../nbs/{p.stem}>')
    write(SRC/'read'/f'{name}.md', '\n'.join(lines) + '\n\n' + toctree(entries))


def stage_notebooks() -> list[str]:
    "Every notebook, and a page for each group of them. Returns the names of these pages."
    all_of_them = sorted((REPO/'nbs').glob('*.ipynb'))
    for p in all_of_them:
        if p.stem != 'index': stage_notebook(p)
    pages = []
    def group(name, title, about, notebooks):
        if not notebooks: return
        group_page(name, title, about, notebooks)
        pages.append(f'read/{name}')
    guides = [p for p in all_of_them if p.stem.startswith('guide_')]
    group('guides', 'Guides',
          'One task each, from the first line to a result. They run as notebooks in `make test`.', guides)
    for title, numbers, about in GROUPS:
        members = [p for p in all_of_them if p.stem[:2].isdigit() and int(p.stem[:2]) in numbers]
        group(re.sub(r'\W+', '-', title.lower()), title, about, members)
    named = [p for p in all_of_them if not p.stem[:2].isdigit() and p not in guides and p.stem != 'index']
    group('run', 'Run with papermill',
          'One job or one artifact each: `papermill nbs/train.ipynb -p dataset synth`.', named)
    return pages


# ---- results

def titled(path: Path) -> str:
    "A table's page, with a heading where it has none."
    text = outside_code(path.read_text(), lambda t: links_for_site(t, '../'))
    if text.startswith('#'): return text
    return f'# {result_name(path.stem)}\n\n' + outside_code(text, lambda t: re.sub(r'(?m)^#', '##', t))


def result_name(stem: str) -> str: return stem.replace('table', 'table ').capitalize()


def stage_results() -> None:
    for folder in ('figures', 'tables', 'workflow'):
        for p in sorted((REPO/folder).iterdir()):
            plain = p.suffix in ('.png', '.pdf', '.csv') or (folder == 'workflow' and p.is_file())
            if plain: write(SRC/folder/p.name, p.read_bytes())
            if p.suffix == '.md': write(SRC/folder/p.name, titled(p))
    write(SRC/'LICENSE', (REPO/'LICENSE').read_bytes())
    figures = ['# Figures', '',
               'Each is drawn by its notebook from finished runs; what it shows stands there.', '']
    for p in sorted((REPO/'figures').glob('*.png')):
        title, below = heading(REPO/'nbs'/f'{p.stem}.ipynb')
        figures += [f'## Figure {p.stem[3:]}', '', f'![{title}](../figures/{p.name})', '',
                    f'{below.rstrip(".")}. Notebook: [{p.stem}](../nbs/{p.stem}.ipynb). '
                    f'[PDF](../figures/{p.stem}.pdf), [PNG](../figures/{p.name}).', '']
    write(SRC/'results'/'figures.md', '\n'.join(figures))
    data = ['# Data', '', 'The numbers behind the tables, to load and count again.', '',
            '| file | rows | columns |', '|---|---|---|']
    for p in sorted((REPO/'tables').glob('*.csv')):
        with p.open(newline='') as f: rows = list(csv.reader(f))
        names = ', '.join(f'`{c}`' for c in rows[0][:8])
        if len(rows[0]) > 8: names += f' and {len(rows[0]) - 8} more'
        data.append(f'| [{p.name}](../tables/{p.name}) | {len(rows) - 1:,} | {names} |')
    write(SRC/'results'/'data.md', '\n'.join(data) + '\n')
    tables = [p.stem for p in sorted((REPO/'tables').glob('*.md'))]
    listing = '\n'.join(f'- [{result_name(p)}](../tables/{p}.md)' for p in tables)
    entries = [f'{result_name(p)} <../tables/{p}>' for p in tables]
    write(SRC/'results'/'index.md',
          '# Results\n\nTables with their intervals and the paper\'s values beside them, the '
          f'[audit](../tables/audit.md), the [figures](figures.md) and the [data](data.md).\n\n{listing}\n\n'
          + toctree([*entries, 'figures', 'data']))


# ---- front page and the other prose

def sections(text: str) -> dict[str, str]:
    "Heading -> section, in order; the part above the first heading has the key ''."
    parts = re.split(r'(?m)^## +(.*)$', text)
    return {'': parts[0], **{h.strip(): f'## {h}{body}' for h, body in zip(parts[1::2], parts[2::2])}}


FRONT = ('', 'What was found', 'How to read the house', 'What this is')


def stage_prose(reading: list[str]) -> None:
    parts = sections((REPO/'README.md').read_text())
    missing = [h for h in FRONT if h not in parts]
    if missing: raise SystemExit(f'docs: README.md has no section {missing[0]!r}, which the front page shows')
    front = '\n'.join(parts[h] for h in FRONT)
    rest = '\n'.join(body for h, body in parts.items() if h not in FRONT)
    here = {api.heading_slug(h) for h in FRONT if h}
    front = re.sub(r'\]\(#([\w-]+)\)', lambda m: m[0] if m[1] in here else f'](handbook.md#{m[1]})', front)
    rest = re.sub(r'\]\(#([\w-]+)\)', lambda m: f'](index.md#{m[1]})' if m[1] in here else m[0], rest)
    start = ['handbook', 'troubleshooting', 'contributing', 'changelog']
    start = [s for s in start if s in ('handbook', 'troubleshooting') or (REPO/f'{s.upper()}.md').exists()]
    trees = [('Start', ['read/guides', *start] if 'read/guides' in reading else start),
             ('Read', [r for r in reading if r != 'read/guides']),
             ('Look up', ['results/index', 'api/index'])]
    tree = '\n'.join(toctree(entries, f':hidden:\n:caption: {caption}') for caption, entries in trees)
    write(SRC/'index.md', outside_code(front, lambda t: links_for_site(t, '')) + '\n\n' + tree)
    write(SRC/'handbook.md', '# Handbook\n\n' + outside_code(rest, lambda t: links_for_site(t, '')))
    write(SRC/'troubleshooting.md', (REPO/'docs'/'troubleshooting.md').read_text())
    for name in ('contributing', 'changelog'):
        if (file := REPO/f'{name.upper()}.md').exists():
            write(SRC/f'{name}.md', outside_code(file.read_text(), lambda t: links_for_site(t, '')))


def stage_reference() -> None:
    write(SRC/'api'/'index.md', api.index_page())
    for m in api.modules():
        if m.definitions: write(SRC/'api'/f'{m.name}.md', api.module_page(m))


# ---- MathJax beside the pages, so that none is fetched by a reader

def stage_mathjax() -> None:
    kept = OUT/MATHJAX.replace('@', '-')
    if not (kept/'tex-svg.js').exists():
        if not shutil.which('npm'):
            raise SystemExit('docs: npm is needed once, to fetch MathJax: install Node.js')
        OUT.mkdir(exist_ok=True)
        pack = ['npm', 'pack', '--silent', MATHJAX]
        packed = subprocess.run(pack, cwd=OUT, capture_output=True, text=True)
        if packed.returncode:
            raise SystemExit(f'docs: npm cannot fetch {MATHJAX}: {packed.stderr.strip()[:300]}')
        archive = OUT/packed.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                name = member.name.removeprefix('package/es5/')
                wanted = name.startswith(('tex-svg.js', 'input/tex/extensions/'))
                if not (member.isfile() and wanted): continue
                (kept/name).parent.mkdir(parents=True, exist_ok=True)
                (kept/name).write_bytes(tar.extractfile(member).read())
        archive.unlink()
    for p in sorted(kept.rglob('*.js')): write(SRC/'_static'/'mathjax'/p.relative_to(kept), p.read_bytes())


def stage() -> None:
    "All sources of the site in _docs/src, and nothing else there."
    staged.clear()
    reading = stage_notebooks()
    stage_results()
    stage_prose(reading)
    stage_reference()
    write(SRC/'_static'/'site.css', (REPO/'docs'/'site.css').read_bytes())
    stage_mathjax()
    for p in SRC.rglob('*'):
        if p.is_file() and p not in staged: p.unlink()


def needs() -> list[str]:
    "What the site wants from the package index: the extra `docs`."
    project = tomllib.loads((REPO/'pyproject.toml').read_text())['project']
    return project['optional-dependencies']['docs']


def main() -> None:
    if sys.argv[1:] == ['--needs']: return print(*needs())
    stage()
    command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-j', 'auto', '-q', '-W', '--keep-going',
               '-c', str(REPO/'docs'), '-d', str(OUT/'doctrees'), str(SRC), str(HTML)]
    shutil.rmtree(HTML, ignore_errors=True)                  # pages of notebooks that have another name now
    done = subprocess.run(command, env=os.environ | {'PYTHONWARNINGS': 'ignore::DeprecationWarning'})
    if done.returncode: shutil.rmtree(OUT/'doctrees', ignore_errors=True)   # so the next build warns
    problems = check.problems(HTML)
    print(*problems, sep='\n', end='\n' if problems else '')
    if done.returncode or problems:
        raise SystemExit(f'docs: {len(problems)} broken links; Sphinx ended with {done.returncode}')
    pages = sum(1 for _ in HTML.rglob('*.html'))
    print(f'{pages} pages, every link leads somewhere, nothing comes from another host: '
          f'{HTML.relative_to(REPO)}/index.html')


if __name__ == '__main__': main()
