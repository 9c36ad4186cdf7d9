"""A run on a device that is not the CPU, without one: no tensor of the one meets a tensor of the other

PyTorch lets a program register a device of its own. The tensors here say that they lie on it, and compute on
the CPU. An operation of both kinds of tensors is refused, as a GPU refuses it. A registered device stays with
its process, so these tests have one of their own.
"""
import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bdam_repro import capture, runs, trainer
from bdam_repro.batches import train_tokenizer
from bdam_repro.config import make_config
from bdam_repro.demo import demo_people
from bdam_repro.images import decode_image
from bdam_repro.model import build_model
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.runs import finished, train
from bdam_repro.search import Gallery
from bdam_repro.trained import TrainedModel

NAME = 'second'
register = getattr(backend_registration, '_setup_privateuseone_for_python_backend', None)
own_process = os.environ.get('BDAM_SECOND_DEVICE')
inside = pytest.mark.skipif(not own_process, reason='in a process of its own')


class Far(Tensor):
    "A tensor on the second device."
    is_cuda = True                             # what the code asks to tell a GPU
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor):
        like = dict(strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype)
        far = torch.Tensor._make_wrapper_subclass(cls, near.size(), device=torch.device(NAME, 0), **like)
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None): return compute(f, args, kwargs or {})
    def tolist(self): return self.near.tolist()


def is_far(device) -> bool: return device is not None and torch.device(device).type == NAME


def compute(f, args: tuple, kwargs: dict):
    "The operation on the CPU; its results lie where its arguments do."
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far, moves = [x for x in tensors if isinstance(x, Far)], f.__name__.split('.')[0] in ('copy_', '_to_copy')
    near = [x for x in tensors if not isinstance(x, Far) and x.dim()]      # a number may come from anywhere
    own_index = f.__name__.startswith('index') and tensors and isinstance(tensors[0], Far)
    assert moves or own_index or not (far and near), f'{f} of tensors on two devices'
    result_far = is_far(kwargs['device']) if kwargs.get('device') is not None else bool(far)
    if 'device' in kwargs: kwargs = kwargs | {'device': torch.device('cpu')}
    def bare(x): return x.near if isinstance(x, Far) else x
    out = f(*tree_map(bare, args), **tree_map(bare, kwargs))
    if not f._schema.returns: return None
    if f.__name__.split('.')[0].endswith('_'): return args[0]                  # in place
    return tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, out) if result_far else out


class Everywhere(TorchDispatchMode):
    "Sees the operations that make a tensor, too."
    def __torch_dispatch__(self, f, types, args=(), kwargs=None): return compute(f, args, kwargs or {})


def carry(module: nn.Module) -> nn.Module:
    "The module's weights on the second device."
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None and not isinstance(p, Far):
                part._parameters[name] = nn.Parameter(Far(p.detach()), p.requires_grad)
        for name, b in list(part._buffers.items()):
            if b is not None and not isinstance(b, Far): part._buffers[name] = Far(b)
    return module


@pytest.fixture
def second_device(monkeypatch):
    "Runs take the second device for a GPU that records no steps."
    if not hasattr(torch, NAME):
        register(NAME)
        if not hasattr(torch, NAME): torch._register_device_module(NAME, ModuleType(NAME))
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    to, tensor = nn.Module.to, torch.tensor
    def move(self, *args, **how): return carry(self) if args and is_far(args[0]) else to(self, *args, **how)
    def make(data, **how):
        made = tensor(data, **{k: v for k, v in how.items() if k != 'device'})
        return Far(made) if is_far(how.get('device')) else made
    monkeypatch.setattr(nn.Module, 'to', move)
    monkeypatch.setattr(torch, 'tensor', make)
    monkeypatch.setattr(runs, 'pick_device', lambda c: torch.device(NAME, 0))
    monkeypatch.setattr(trainer, 'pick_dtype', lambda c, device: None)
    monkeypatch.setattr(trainer, 'run_autocast', lambda device, dtype: nullcontext())
    monkeypatch.setattr(trainer, 'why_not_static', lambda c, loader, device: '')
    monkeypatch.setattr(capture.StaticStep, 'capture', lambda step: None)      # replayed never, run each time


@pytest.mark.skipif(register is None, reason='this PyTorch registers no device in Python')
@pytest.mark.skipif(bool(own_process), reason='this is that process')
def test_in_a_process_of_its_own():
    command = [sys.executable, '-m', 'pytest', '-x', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__]
    env = os.environ | {'BDAM_SECOND_DEVICE': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and '7 passed' in done.stdout, done.stdout[-3000:]


@inside
def test_two_devices_do_not_mix(second_device):
    "The test can fail."
    with Everywhere():
        far = torch.zeros(2, device=torch.device(NAME, 0))
        assert far.device.type == NAME and (far + far).device.type == NAME and far.cpu().device.type == 'cpu'
        with pytest.raises(AssertionError, match='two devices'): far + torch.zeros(2)


@inside
@pytest.mark.parametrize('graph', ['off', 'on'])
@pytest.mark.parametrize('variant', ['full', 'baseline'])
def test_a_run_on_a_second_device(second_device, tmp_path, variant, graph, one_thread):
    own = dict(data_root=str(tmp_path/'data'), epochs=1, graph=graph, amp='off')
    c = make_config(preset='smoke', variant=variant, **own)
    with Everywhere(): folder = train(c, tmp_path/'runs', progress=False)
    assert finished(folder)['epoch'] == 1 and (folder/'features.safetensors').exists()


@inside
def test_images_are_changed_on_the_second_device(second_device, tmp_path):
    "To the bytes of the CPU; the loader hands out what is in the files."
    c = make_config(preset='smoke', data_root=str(tmp_path/'data'), amp='off')
    dataset = load_data(c, progress=False)
    tokenizer = run_tokenizer(c, dataset, tmp_path/'tokenizer')
    plain, far = (trainer.run_batches(c, dataset, tokenizer) for _ in range(2))
    model = build_model(c, len(tokenizer))
    with Everywhere():
        device = torch.device(NAME, 0)
        there = [(b.images, b.to(device)) for b in trainer.Trainer(c, model, far, device).loader]
        files = dataset.records['file'].tolist()
        for ours, (handed, moved) in zip(plain, there, strict=True):
            first = decode_image(dataset.root/'imgs'/files[ours.rows[0]], plain.data.images.size)
            assert torch.equal(handed[0], first) and not torch.equal(handed, ours.images)
            assert isinstance(moved.images, Far) and torch.equal(moved.images.near, ours.images)


@inside
def test_a_search_on_a_second_device(second_device, tmp_path):
    "Pictures are encoded there; the answers are those of the CPU."
    torch.manual_seed(0)
    tokenizer = train_tokenizer(['a tall woman in a red coat']*2, tmp_path/'tokenizer', 300)
    people = demo_people(str(tmp_path/'data'), people=4, progress=False)
    here = TrainedModel(build_model(make_config(preset='smoke'), len(tokenizer)), tokenizer)
    there = TrainedModel(copy.deepcopy(here.model), tokenizer)
    found = {}
    for place, model in (('here', here), ('there', there)):
        with Everywhere() if model is there else nullcontext():
            if model is there: model.model.to(torch.device(NAME, 0))
            gallery = Gallery.build(model, people, tmp_path/place, progress=False)
            found[place] = [gallery.search('a tall woman', 3, score).table['file'].tolist()
                            for score in ('dual', 'fused')]
    assert found['here'] == found['there']
