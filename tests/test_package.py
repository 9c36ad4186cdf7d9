"What `import bdam_repro` offers by itself."
import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import bdam_repro

REPO = Path(__file__).resolve().parent.parent
HEAVY = {'torch', 'transformers', 'pandas', 'numpy', 'pydantic', 'matplotlib'}


def loaded_after(code):
    "The modules that are loaded in a process of its own."
    code = f'import sys; sys.path.insert(0, {str(REPO)!r})\n{code}\nprint(sorted(sys.modules))'
    return set(ast.literal_eval(subprocess.check_output([sys.executable, '-c', code], text=True)))


def test_the_import_alone_loads_nothing():
    assert HEAVY & loaded_after('import bdam_repro; dir(bdam_repro)') == set()


def test_a_name_is_imported_when_it_is_used():
    loaded = loaded_after('from bdam_repro import make_config')
    assert {m for m in loaded if m.startswith('bdam_repro')} == {'bdam_repro', 'bdam_repro.config'}


@pytest.mark.parametrize('name, module', [
    ('BDAM', 'bdam'), ('Mamba', 'mamba'), ('MambaFusion', 'fusion'), ('make_config', 'config'),
    ('train', 'runs'), ('load_run', 'ranked'), ('Gallery', 'search')])
def test_the_main_names(name, module):
    assert getattr(bdam_repro, name) is getattr(import_module(f'bdam_repro.{module}'), name)
    assert name in dir(bdam_repro) and name in bdam_repro.__all__


@pytest.mark.parametrize('name', ['BDAM', 'Mamba', 'MambaFusion'])
def test_help_shows_the_parameters(name):
    function = getattr(bdam_repro, name).__init__
    told = [line.partition(':')[0] for line in function.__doc__.splitlines()]
    assert len(told) > 8 and set(told) <= set(inspect.signature(function).parameters)
    assert told[-1] in ('mlp', 'backend', 'match')         # the last parameter too


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match='has no attribute'): _ = bdam_repro.nothing
