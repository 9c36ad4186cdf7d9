"""A runnable companion to *Robust Person Re-Identification via MLLM-Supervised Feature Decoupling*.

The main names are here and are imported when they are first used, so `import bdam_repro` alone takes no time."""
import re as _re
from importlib import import_module as _import_module
from inspect import getsource as _getsource
from inspect import signature as _signature

__version__ = "0.1.0"

_HOMES = {'BDAM': 'bdam', 'Mamba': 'mamba', 'MambaFusion': 'fusion', 'make_config': 'config', 'train': 'runs',
          'load_run': 'ranked', 'Gallery': 'search'}      # name -> module
__all__ = ['BDAM', 'Mamba', 'MambaFusion', 'make_config', 'train', 'load_run', 'Gallery']


def _tell_parameters(function):
    "Let `help` show the comments beside the parameters, which Python itself does not keep."
    told = _re.findall(r'(?m)^ +(\w+): .*?# (.*)$', _getsource(function))
    names = _signature(function).parameters
    if told: function.__doc__ = '\n'.join(f'{name}: {what.strip()}' for name, what in told if name in names)


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(_import_module(f'{__name__}.{_HOMES[name]}'), name)
    if isinstance(value, type) and '__init__' in vars(value): _tell_parameters(value.__init__)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *_HOMES})
