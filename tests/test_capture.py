"""A training step with fixed shapes against the ordinary trainer, for every kind of variant"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from bdam_repro import encoders
from bdam_repro import model as models
from bdam_repro.config import make_config
from bdam_repro.model import build_model
from bdam_repro.optimizers import Muon
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.trainer import READ_EVERY, Trainer, run_batches, train_epoch

CASES = {
    'full': {},
    'full adam hard tokens': dict(optimizer='adam', mining='hard', fusion_input='tokens'),
    'full triplet both': dict(fusion_loss='triplet', clothing='both', hsic_kernel='rbf', fusion_grad=True),
    'baseline': {}, 'baseline_described': {}, 'bdam_no_gate': {}, 'no_infonce': {}, 'no_adversarial': {},
    'fusion': {}, 'fusion_no_mamba': {}, 'fusion_no_gate': {}, 'fusion_no_align': {},
    'fusion_simple': dict(balance='fixed'), 'fusion_transformer2': {},
    'full hard first': dict(mining='hard', gradnorm_ref='first'),
    'sdm': {}, 'tal': dict(flip=.5, pad=4, erase=.5),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    c = make_config(preset='smoke', data_root=str(root))
    dataset = load_data(c, progress=False)
    return root, dataset, run_tokenizer(c, dataset, root/'tokenizer')


@pytest.mark.parametrize('case', CASES)
def test_the_same_losses_and_weights_in_20_steps(case, data):
    root, dataset, tokenizer = data
    common = dict(preset='smoke', data_root=str(root), amp='off', gradnorm_every=3, epochs=5)
    c = make_config(variant=case.split()[0], **common | CASES[case])

    def trainer():
        torch.manual_seed(0)
        model = build_model(c, len(tokenizer)).double()
        return Trainer(c, model, run_batches(c, dataset, tokenizer), torch.device('cpu'))

    plain, static = trainer(), trainer()
    static.static = static.static_step()
    for epoch in range(5):
        a, b = (train_epoch(t, epoch, tqdm(disable=True)) for t in (plain, static))
        for name in a.keys() - {'images_per_s', 'wait_share'}:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5), (epoch, name)
    assert plain.step == static.step == 20
    largest = max(p.grad.abs().max() for p in plain.model.parameters() if p.grad is not None)
    for (name, p), q in zip(plain.model.named_parameters(), static.model.parameters(), strict=True):
        if p.grad is None or p.grad.abs().max() < 1e-5*largest: continue   # Adam makes steps of rounding
        assert torch.allclose(p, q, rtol=1e-3, atol=2e-4), name


class NoLooking(TorchDispatchMode):
    "Refuses what a CUDA graph cannot record: a value that is read, a shape that depends on it, host data."
    REFUSED = ('local_scalar_dense', 'nonzero', 'unique', 'masked_select', 'equal', 'is_nonzero',
               'lift_fresh', 'repeat_interleave', 'multinomial', 'index_copy', 'scatter_add', 'index_add')

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__.strip('_') if hasattr(f, 'overloadpacket') else str(f)
        refused = any(name == x or name.startswith(('unique', 'nonzero')) for x in self.REFUSED)
        if f.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            refused |= any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        assert not refused, f
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize('case', CASES)
def test_a_step_can_be_recorded(case, data, monkeypatch):
    "On a GPU the encoders take fused attention, and the text's mask as it is used."
    monkeypatch.setattr(encoders, 'choose_attention', lambda net, *_: net.set_attn_implementation('sdpa'))
    root, dataset, tokenizer = data
    common = dict(preset='smoke', data_root=str(root), amp='off')
    c = make_config(variant=case.split()[0], **common | CASES[case])
    loader = run_batches(c, dataset, tokenizer)
    trainer = Trainer(c, build_model(c, len(tokenizer)), loader, torch.device('cpu'))
    step, net = trainer.static_step(), trainer.model.text.net
    plain = net.forward
    net.forward = lambda input_ids, attention_mask: plain(input_ids, attention_mask[:, None, None])
    for opt in step.opts:         # PyTorch's own reads its step count on a CPU
        if not isinstance(opt, Muon): opt.step = lambda: None
    step.load(0)
    with NoLooking():
        for _ in range(2):
            step.forward()
            step.measure()
            step.backward()


@pytest.mark.parametrize('case', [*CASES, 'full fp16'])
def test_a_step_that_is_not_recorded_does_not_look_either(case, data, monkeypatch):
    "A GPU waits for no value in a step: not for the losses, not for what they mine, not for fp16's scale."
    monkeypatch.setattr(encoders, 'choose_attention', lambda net, *_: net.set_attn_implementation('sdpa'))
    monkeypatch.setattr(models, 'encode_by_length', lambda m, texts, *_: [m.encode_text(*t) for t in texts])
    root, dataset, tokenizer = data
    options = dict(preset='smoke', data_root=str(root), amp='fp16' if 'fp16' in case else 'off')
    c = make_config(variant=case.split()[0], **options | CASES.get(case, {}))
    loader = run_batches(c, dataset, tokenizer)
    trainer = Trainer(c, build_model(c, len(tokenizer)), loader, torch.device('cpu'))
    loader.device = torch.device('cuda')                                   # images are changed in the step
    batch, net = next(iter(loader)), trainer.model.text.net
    assert batch.changes is not None
    plain = net.forward
    net.forward = lambda input_ids, attention_mask: plain(input_ids, attention_mask[:, None, None])
    monkeypatch.setattr(Trainer, 'update', lambda self: self.clip())       # on a CPU, Adam reads its step
    trainer.log.every, trainer.weights.calls = READ_EVERY, 1               # GradNorm reads where it is due
    with monkeypatch.context() as m:
        m.setattr(trainer, 'device', torch.device('cuda'))
        assert trainer.fixed_shapes(len(batch))
    monkeypatch.setattr(trainer, 'fixed_shapes', lambda images: True)
    with NoLooking(): trainer.train_step(batch)


def test_what_cannot_be_recorded_is_noticed():
    with NoLooking(), pytest.raises(AssertionError): torch.ones(3).sum().item()
    with NoLooking(), pytest.raises(AssertionError): torch.ones(3)[torch.ones(3) > 0]
