"""A step with fixed shapes ([46_capture] in the notebooks) against the ordinary trainer, for every kind of variant"""

import pytest
import torch
from tqdm import tqdm

from bdam_repro.config import make_config
from bdam_repro.model import build_model
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.trainer import Trainer, run_batches, train_epoch

CASES = {
    'full': {},
    'full adam hard tokens': dict(optimizer='adam', mining='hard', fusion_input='tokens', gradnorm_ref='first'),
    'full triplet both': dict(fusion_loss='triplet', clothing='both', hsic_kernel='rbf', fusion_grad=True),
    'baseline': {}, 'baseline_described': {}, 'bdam_no_gate': {}, 'no_infonce': {}, 'no_adversarial': {},
    'fusion': {}, 'fusion_no_mamba': {}, 'fusion_no_gate': {}, 'fusion_no_align': {},
    'fusion_simple': dict(balance='fixed'), 'fusion_transformer2': {},
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
