"The API pages, read from the sources of the package: no import, so no PyTorch is needed to build the site."
import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PACKAGE, NBS = REPO/'bdam_repro', REPO/'nbs'
LONGEST_EXAMPLE = 24          # lines; of a longer cell only the statements that use the name are shown
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Definition:
    "A public name of the package, and where it comes from."
    name: str
    module: str
    node: ast.stmt
    cell: str                 # the id of the notebook's cell


@dataclass
class Module:
    name: str
    notebook: str             # its notebook's name, without .ipynb
    about: str                # the line below the notebook's title
    comments: dict[int, str]  # line -> the comment at its end
    whole_line: set[int]      # lines that hold a comment and nothing else
    definitions: list[Definition] = field(default_factory=list)
    private: list[Definition] = field(default_factory=list)      # what else stands at its top level


@cache
def notebook_cells(name: str) -> list[dict]:
    cells = json.loads((NBS/f'{name}.ipynb').read_text())['cells']
    return [c | {'source': ''.join(c['source'])} for c in cells]


@cache
def numbered() -> dict[str, str]:
    "Module -> its notebook."
    return {p.stem[3:]: p.stem for p in sorted(NBS.glob('[0-9][0-9]_*.ipynb'))}


def named_by(node: ast.stmt) -> list[str]:
    "The names that a top-level statement defines."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
    return [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]


@cache
def read_module(name: str) -> Module:
    source = (PACKAGE/f'{name}.py').read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    comments, whole_line = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        comments[token.start[0]] = token.string.lstrip('# ').strip()
        if not lines[token.start[0] - 1][:token.start[1]].strip(): whole_line.add(token.start[0])
    module = Module(name, numbered()[name], ast.get_docstring(tree) or '', comments, whole_line)
    cell_of = {n: m[1] for n, line in enumerate(lines, 1) if (m := re.match(r'# %% .*#(\w+)$', line))}
    public = next((ast.literal_eval(n.value) for n in tree.body
                   if isinstance(n, ast.Assign) and named_by(n) == ['__all__']), [])
    for node in tree.body:
        cell = next((cell_of[n] for n in range(node.lineno, 0, -1) if n in cell_of), '')
        known = {d.name for d in module.definitions}
        for defined in named_by(node):
            if defined in known or defined == '__all__': continue
            among = module.definitions if defined in public else module.private
            among.append(Definition(defined, name, node, cell))
    return module


def modules() -> list[Module]:
    return [read_module(name) for name in numbered()]


@cache
def public_names() -> dict[str, str]:
    "Name -> its full name, for every public name. A name is defined once in the package."
    return {d.name: f'bdam_repro.{m.name}.{d.name}' for m in modules() for d in m.definitions}


def link_names(text: str) -> str:
    "`name` in backticks -> a link to its entry here. Only names that cannot be a common word or a value."
    def link(m):
        name = m[1]
        told = '_' in name.strip('_') or re.search('[A-Z]', name)
        return f'{{py:obj}}`{name} <{public_names()[name]}>`' if told and name in public_names() else m[0]
    return re.sub(r'(?<![`\w}\[])`([A-Za-z_]\w*)`(?![`\]])', link, text)


def plain(text: str) -> str:
    "A comment or docstring as Markdown: what is not in backticks is shown as it is."
    parts = re.split(r'(`[^`\n]+`)', text)
    parts[::2] = [re.sub(r'([\\*_<$\[\]{}|])', r'\\\1', p) for p in parts[::2]]
    return link_names(''.join(parts))


def in_lines(text: str) -> str:
    "A docstring's paragraphs; a block that is indented is shown as written."
    blocks = re.split(r'\n\s*\n', text.strip())
    return '\n\n'.join(f'```text\n{b}\n```' if re.search(r'(?m)^\s{2,}\S', b) else plain(b) for b in blocks)


# ---- signatures

def short(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 48 else '...'


def arguments(f: Function, method: bool) -> list[tuple[str, ast.arg, ast.expr | None]]:
    "(prefix, argument, default) in order, without self."
    a = f.args
    ordered = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(ordered) - len(a.defaults)) + a.defaults
    out = [('', x, d) for x, d in zip(ordered, defaults)]
    if method and out and out[0][1].arg in ('self', 'cls'): out = out[1:]
    if a.vararg: out.append(('*', a.vararg, None))
    out += [('', x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: out.append(('**', a.kwarg, None))
    return out


def signature(f: Function, method: bool = False) -> str:
    shown, a = [], f.args
    for prefix, x, default in arguments(f, method):
        if x in a.kwonlyargs and not a.vararg and '*' not in shown: shown.append('*')
        text = prefix + x.arg + (f': {short(x.annotation)}' if x.annotation else '')
        if default is not None: text += f' = {short(default)}' if x.annotation else f'={short(default)}'
        shown.append(text)
        if a.posonlyargs and x is a.posonlyargs[-1]: shown.append('/')
    returns = f' -> {short(f.returns)}' if f.returns and f.name != '__init__' else ''
    return f'({", ".join(shown)}){returns}'


def comment_of(module: Module, node: ast.AST, first: int) -> str:
    "The comment behind what ends on a line, and those on lines of their own above it, from line `first` on."
    above = [module.comments[n] for n in range(first, node.lineno) if n in module.whole_line]
    return ' '.join([*above, module.comments.get(node.end_lineno, '')]).strip()


def parameters(module: Module, f: Function, method: bool = False) -> list[str]:
    "One line per parameter: the comment beside it. Several on one line of the source share its comment."
    by_line: dict[int, list[str]] = {}
    end, said, returns = f.lineno, {}, f.returns
    for prefix, x, default in arguments(f, method):
        last = default if default is not None and default.end_lineno >= x.end_lineno else x
        if not (returns and returns.end_lineno == last.end_lineno):
            said[last.end_lineno] = comment_of(module, last, end + 1) if last.end_lineno != end or not said \
                else said.get(last.end_lineno, '')
            by_line.setdefault(last.end_lineno, []).append(prefix + x.arg)
        end = last.end_lineno
    lines = [f'- {", ".join(f"`{n}`" for n in names)}: {plain(said[line])}'
             for line, names in by_line.items() if said.get(line)]
    out = ['**Parameters**', '', *lines, ''] if lines else []
    if returns and (what := comment_of(module, returns, returns.end_lineno)):
        out += [f'**Returns** {plain(what)}', '']
    return out


# ---- where it stands, where it is used

def defining_cell(d: Definition) -> int:
    cells = notebook_cells(numbered()[d.module])
    return next(i for i, c in enumerate(cells) if c.get('id') == d.cell)


def heading_slug(text: str) -> str:
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return re.sub(r'[^\w\- ]', '', text.strip().lower()).replace(' ', '-')


def section(d: Definition) -> tuple[str, str]:
    "(heading, slug) of the section that defines it."
    seen: dict[str, int] = {}
    found = ('', '')
    for c in notebook_cells(numbered()[d.module])[:defining_cell(d)]:
        if c['cell_type'] != 'markdown': continue
        for heading in re.findall(r'(?m)^#{1,6} +(.*)$', re.sub(r'```.*?```', '', c['source'], flags=re.S)):
            slug = heading_slug(heading)
            seen[slug] = seen.get(slug, -1) + 1
            found = heading, slug + (f'-{seen[slug]}' if seen[slug] else '')
    return found


def paper_places(d: Definition, source: str) -> list[str]:
    "Sections and equations of the paper: as the definition names them, else the prose above, else the page."
    cells = notebook_cells(numbered()[d.module])
    at = defining_cell(d)
    above = [c['source'] for c in cells[max(0, at - 2):at] if c['cell_type'] == 'markdown']
    for text in (source, '\n'.join(above), cells[0]['source']):
        found = re.findall(r'\b(?:Sec\. \d(?:\.\d)?|Eq\. \d|Table [1-5]\b|Figure [1-5]\b)', text)
        if found: return sorted(set(found))
    return []


@cache
def equations() -> dict[str, str]:
    "Eq. number -> notebook that holds its anchor."
    return {n: p.stem for p in sorted(NBS.glob('*.ipynb'))
            for n in re.findall(r'<a id=\\"eq-(\d)\\"></a>', p.read_text())}


def place_link(place: str) -> str:
    kind, number = place.split(' ', 1)
    if kind == 'Eq.' and number in equations():
        return f'[{place}](../nbs/{equations()[number]}.ipynb#eq-{number})'
    if kind == 'Table': return f'[{place}](../tables/table{number}.md)'
    if kind == 'Figure': return f'[{place}](../results/figures.md#figure-{number})'
    return place


@cache
def names_in(code: str) -> frozenset[str]:
    "The names that a piece of code uses; imports, comments and texts do not count."
    try: tree = ast.parse(code)
    except SyntaxError: return frozenset()           # a cell for the shell
    return frozenset({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
                     | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)})


@cache
def imported_by(notebook: str) -> frozenset[str]:
    "The package's names that a notebook imports."
    code = '\n'.join(c['source'] for c in notebook_cells(notebook) if c['cell_type'] == 'code')
    found = re.findall(r'^from bdam_repro\.\w+ import (\([^)]*\)|.*)$', code, re.M)
    return frozenset(re.findall(r'\w+', ' '.join(found)))


def shown_code(cells: list[dict], hidden: bool) -> list[str]:
    "Code cells that a reader sees, or (hidden) those that are tests alone."
    code = [c['source'].strip() for c in cells if c['cell_type'] == 'code'
            and not re.search(r'(?m)^#\|\s*(export|default_exp|slow)', c['source'])]
    return [re.sub(r'(?m)^#\|.*\n', '', c) for c in code if ('#| hide' in c) == hidden]


def shortened(source: str, name: str) -> str:
    "Of a long cell only the statements that use the name."
    lines, kept = source.splitlines(), []
    if len(lines) <= LONGEST_EXAMPLE: return source
    for n in ast.parse(source).body:
        if any((isinstance(x, ast.Name) and x.id == name) or (isinstance(x, ast.Attribute) and x.attr == name)
               for x in ast.walk(n)):
            kept += [*lines[n.lineno - 1:n.end_lineno], '']
    if not 0 < len(kept) <= LONGEST_EXAMPLE: kept = [*lines[:LONGEST_EXAMPLE], '...', '']
    return '\n'.join(kept[:-1])


@dataclass
class Example:
    place: str                # a notebook, or tests/test_x.py
    code: str
    by_way_of: str = ''       # the name that uses it, where no page uses it directly


@cache
def tests() -> list[tuple[str, str, frozenset[str]]]:
    "(file, code, names that the file imports from the package) of each test function."
    out = []
    for p in sorted((REPO/'tests').glob('test_*.py')):
        source = p.read_text()
        lines, tree = source.splitlines(), ast.parse(source)
        taken = frozenset(a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
                          and (n.module or '').startswith('bdam_repro.') for a in n.names)
        out += [(f'tests/{p.name}', '\n'.join(lines[n.lineno - 1:n.end_lineno]), taken)
                for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')]
    return out


@cache
def used_in_package() -> dict[str, list[Definition]]:
    "Name -> the definitions of the package that use it."
    out: dict[str, list[Definition]] = {}
    for m in modules():
        for d in m.definitions + m.private:
            for name in names_in(ast.unparse(d.node)) - {d.name}: out.setdefault(name, []).append(d)
    return out


def direct_example(d: Definition) -> Example | None:
    "The first use in a cell below the definition, else above it, in other notebooks, hidden cells, tests."
    home, at = numbered()[d.module], defining_cell(d)
    own = notebook_cells(home)
    others = [p.stem for p in sorted(NBS.glob('*.ipynb')) if p.stem not in (home, 'index')]
    others = [o for o in others if d.name in imported_by(o)]
    places = [(home, own[at + 1:]), (home, own[:at]), *((o, notebook_cells(o)) for o in others)]
    for hidden in (False, True):
        for notebook, cells in places:
            for code in shown_code(cells, hidden):
                if d.name in names_in(code): return Example(notebook, shortened(code, d.name))
    for file, code, taken in tests():
        if d.name in taken and d.name in names_in(code): return Example(file, shortened(code, d.name))
    return None


@cache
def example(d: Definition) -> Example | None:
    "An example that runs: of the name itself, else of the nearest name that uses it."
    seen, ring = {d.name}, [d]
    while ring:
        for user in ring:
            if found := direct_example(user):
                return found if user is d else Example(found.place, found.code, user.name)
        users = {u.name: u for x in ring for u in used_in_package().get(x.name, []) if u.name not in seen}
        seen |= set(users)
        ring = list(users.values())
    return None


# ---- pages

def fields(module: Module, node: ast.ClassDef) -> list[str]:
    "Annotated fields of a class: the comment beside each, or the reason that an option states."
    out = []
    for n in node.body:
        if not isinstance(n, ast.AnnAssign) or n.target.id.startswith('_'): continue
        said = module.comments.get(n.end_lineno, '')
        if isinstance(n.value, ast.Call):
            words = [x.value for x in [*n.value.args[1:], *(k.value for k in n.value.keywords)]
                     if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            said = said or (words[0] if words else '')
        plain_value = n.value is not None and not isinstance(n.value, ast.Call)
        default = f' = `{short(n.value)}`' if plain_value else ''
        about = f': {plain(said)}' if said else ''
        out.append(f'- `{n.target.id}` ({plain(short(n.annotation))}){default}{about}')
    return ['**Fields**', '', *out, ''] if out else []


def directive(kind: str, head: str, body: list[str], fence: int, options: tuple = ()) -> list[str]:
    return ['`'*fence + f'{{py:{kind}}} {head}', *options, '', *body, '`'*fence, '']


def method_entry(module: Module, f: Function) -> list[str]:
    decorators = {ast.unparse(d).split('(')[0].split('.')[-1] for d in f.decorator_list}
    method = 'staticmethod' not in decorators
    body = [in_lines(ast.get_docstring(f) or ''), '', *parameters(module, f, method)]
    if decorators & {'property', 'cached_property'}:
        kind = f':type: {ast.unparse(f.returns)}' if f.returns else ''
        return directive('property', f.name, body, 5, (kind,) if kind else ())
    options = tuple(f':{d}:' for d in ('classmethod', 'staticmethod') if d in decorators)
    return directive('method', f.name + signature(f, method), body, 5, options)


def entry(module: Module, d: Definition, source: str) -> list[str]:
    node, body, options = d.node, [], (f':module: bdam_repro.{d.module}',)
    heading, slug = section(d)
    where = f'Defined in [{module.notebook} › {plain(heading)}](../nbs/{module.notebook}.ipynb#{slug})'
    places = ', '.join(map(place_link, paper_places(d, source)))
    facts = where + (f'. In the paper: {places}' if places else '') + '.'
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        kind, head = 'function', d.name + signature(node)
        body = [in_lines(ast.get_docstring(node) or ''), '', *parameters(module, node)]
    elif isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        init = next((m for m in methods if m.name == '__init__'), None)
        bases = ', '.join(f'`{ast.unparse(b)}`' for b in node.bases)
        kind, head = 'class', d.name + (signature(init, method=True) if init else '')
        body = [in_lines(ast.get_docstring(node) or ''), '', *([f'A {bases}.', ''] if bases else []),
                *(parameters(module, init, method=True) if init else fields(module, node))]
    else:
        kind, head = 'data', d.name
        value = ast.unparse(node.value) if node.value is not None else ''
        if value and len(value) <= 72: options += (f':value: {value}',)
        body = [plain(module.comments.get(node.end_lineno, '')), '']
    body += [f'<div class="where">\n\n{facts}\n\n</div>', '']
    if found := example(d):
        from_test = found.place.startswith('tests/')
        place = f'`{found.place}`' if from_test else f'[{found.place}](../nbs/{found.place}.ipynb)'
        way = f' by way of {link_names(f"`{found.by_way_of}`")}' if found.by_way_of else ''
        elsewhere = '' if found.place == module.notebook else f' (from {place})'
        body += [f'**Example**{way}{elsewhere}', '', '```python', *found.code.splitlines(), '```', '']
    if isinstance(node, ast.ClassDef):
        for m in methods:
            if not m.name.startswith('_'): body += method_entry(module, m)
    return directive(kind, head, body, 7, options)


def module_page(module: Module) -> str:
    lines = (PACKAGE/f'{module.name}.py').read_text().splitlines()
    notebook = f'[{module.notebook}](../nbs/{module.notebook}.ipynb)'
    out = [f'# {module.name}', '', f'{plain(module.about)}. Notebook: {notebook}.', '']
    for d in module.definitions:
        out += entry(module, d, '\n'.join(lines[d.node.lineno - 1:d.node.end_lineno]))
    return '\n'.join(out)


def index_page() -> str:
    rows = [f'| [{m.name}]({m.name}.md) | {plain(m.about)} | '
            + ', '.join(f'{{py:obj}}`{d.name} <{public_names()[d.name]}>`' for d in m.definitions) + ' |'
            for m in modules() if m.definitions]
    tree = '\n'.join(m.name for m in modules() if m.definitions)
    return f'''# Reference

{len(public_names())} public names in {len(rows)} modules. Each has its signature, the shapes and meaning
of its parameters, the place in the paper, and an example. The examples are cells of the notebooks, which
`make test` runs; a variable that an example does not define comes from a cell above it, one link away.

| module | about | names |
|---|---|---|
{chr(10).join(rows)}

```{{toctree}}
:hidden:

{tree}
```
'''
