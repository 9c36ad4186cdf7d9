"""What only a GPU can show: it agrees with the CPU, and recorded steps with steps one by one"""

import pytest
import torch
from tqdm import tqdm

from bdam_repro.config import make_config
from bdam_repro.mamba import selective_scan, selective_scan_ref
from bdam_repro.many import train_many
from bdam_repro.model import build_model
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.runs import finished, train
from bdam_repro.trainer import Trainer, run_batches, train_epoch

cuda = pytest.mark.cuda
pytestmark = [cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    c = make_config(preset='smoke', data_root=str(root), amp='off', gradnorm_every=3, epochs=5)
    dataset = load_data(c, progress=False)
    return c, dataset, run_tokenizer(c, dataset, root/'tokenizer')


def trainer_on(device, data, **options):
    c, dataset, tokenizer = data
    c = c.model_copy(update=options)
    torch.manual_seed(0)
    model = build_model(c, len(tokenizer))
    return Trainer(c, model, run_batches(c, dataset, tokenizer), torch.device(device))


def same_epochs(a, b, epochs: int):
    for epoch in range(epochs):
        x, y = (train_epoch(t, epoch, tqdm(disable=True)) for t in (a, b))
        for name in x.keys() - {'images_per_s', 'wait_share'}:
            assert y[name] == pytest.approx(x[name], rel=1e-3), name


def test_losses_and_gradients_of_the_cpu(data):
    found = {}
    for device in ('cpu', 'cuda'):
        trainer = trainer_on(device, data)
        terms = trainer.losses(next(iter(trainer.loader)).to(device))
        sum(terms.values()).backward()
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        joined = torch.cat([g.flatten() for g in grads])
        found[device] = torch.stack(list(terms.values())).cpu(), joined.cpu()
    for a, b in zip(*found.values(), strict=True): assert (a - b).norm() < 1e-3*b.norm()


def test_images_changed_on_the_gpu_are_those_of_the_cpu(data):
    loaders = [trainer_on(device, data).loader for device in ('cpu', 'cuda')]
    for ours, theirs in zip(*loaders, strict=True):
        assert theirs.changes is not None and torch.equal(theirs.to('cuda').images.cpu(), ours.images)


def test_recorded_steps_are_those_of_the_cpu(data):
    recorded = trainer_on('cuda', data, graph='on')
    same_epochs(trainer_on('cpu', data), recorded, 2)
    assert set(recorded.static.graphs) == {'forward', 'measure', 'backward'}


def test_two_recorded_runs_are_equal_to_the_bit(data):
    a, b = (trainer_on('cuda', data, graph='on') for _ in range(2))
    for trainer in (a, b): train_epoch(trainer, 0, tqdm(disable=True))
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True): assert torch.equal(p, q)


def test_what_cannot_be_recorded_trains_step_by_step(data):
    trainer = trainer_on('cuda', data, graph='on', mining='random')
    train_epoch(trainer, 0, tqdm(disable=True))
    assert trainer.static is None


@pytest.mark.parametrize('L', [2, 9, 66, 261, 4096])
def test_the_scan_in_chunks_is_the_loop(L):
    "Chunk length and blocks are another choice on a GPU: output and gradients against float64 on a CPU."
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    args = [r(2, L, 24), r(2, L, 24) - 2, -r(24, 16).exp(), r(2, L, 16), r(2, L, 16), r(24), r(2, L, 24)]
    args, dy, found = [*args, r(24)], r(2, L, 24), []
    ways = (selective_scan, 'cuda', torch.float32), (selective_scan_ref, 'cpu', torch.float64)
    for scan, device, dtype in ways:
        own = [v.to(device, dtype).requires_grad_() for v in args]
        y = scan(*own)
        found.append([y, *torch.autograd.grad(y, own, dy.to(y))])
    for a, b in zip(*found, strict=True): assert (a.cpu() - b).norm() <= 1e-5*b.norm()


@pytest.mark.parametrize('variant', ['full', 'baseline', 'sdm'])
@pytest.mark.parametrize('graph', ['on', 'off'])
def test_a_run_from_start_to_test(data, tmp_path, variant, graph):
    "Validation, checkpoints, the test, every file: what fails at the end of a run fails here."
    c = make_config(preset='smoke', variant=variant, data_root=data[0].data_root, graph=graph, epochs=2)
    folder = train(c, tmp_path/'runs', progress=False)
    assert finished(folder)['epoch'] in (1, 2) and (folder/'features.safetensors').exists()


def test_several_runs_in_workers(data, tmp_path):
    "As `workflow/gpu_grid.py` trains them."
    runs = [make_config(preset='smoke', variant=v, data_root=data[0].data_root) for v in ('full', 'baseline')]
    assert train_many(runs, tmp_path/'runs', processes=2) == []
