"""What each of several processes does in `test_distributed.py`: started by `launch.start_processes`."""
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bdam_repro import evaluate as ev
from bdam_repro.config import make_config
from bdam_repro.distributed import ALONE, find_world, mean_gradients
from bdam_repro.model import build_model
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.trainer import Trainer, run_batches

SMALL = dict(preset='smoke', folder='small', synth_train_ids=16, synth_val_ids=4, synth_test_ids=4, epochs=2,
             amp='off', vocab_size=300, gradnorm_every=1, device='cpu')
# without gradnorm_ref='first': its first step takes the sign of what is 0 but for rounding (46_capture)
READINGS = [
    dict(), dict(fusion_grad=True), dict(fusion_input='tokens', fusion_grad=True), dict(variant='baseline'),
    dict(fusion_loss='triplet', fusion_grad=True), dict(fusion_loss='infonce'), dict(mining='hard'),
    dict(variant='sdm'), dict(variant='tal'), dict(positives='diagonal'), dict(positives='mask'),
    dict(symmetric=False), dict(id_text='generated'), dict(clothing='literal'), dict(clothing='matching_grl'),
    dict(clothing='both', p_pos='sigmoid'), dict(hsic_kernel='linear'), dict(hsic_kernel='rbf'),
    dict(hsic_kernel='cka'), dict(gate_reg='entropy'), dict(balance='fixed'),
    dict(fusion_text='identity'), dict(fusion_text='clothing', fusion_grad=True), dict(accumulate=2),
    dict(accumulate=2, fusion_input='tokens', fusion_grad=True), dict(lr_vision=0.),
    dict(equal_texts='same', nothing_said='out', epoch_of='pairs'),                      # as `paper` has them
    dict(image_feature='encoder', triplet_feature='raw', id_text='all'), dict(image_feature='pooled'),
    dict(fusion_kind='product'), dict(fusion_kind='cross', fusion_input='tokens'),
    dict(fusion_input='tokens', fusion_scan='both'), dict(mining='random'),
    dict(balance='literal', fusion_grad=True)]


def three_batches(c, ds, tok, world):
    "Terms, gradients and task weights after each of three batches, without a step of the optimizers."
    torch.manual_seed(0)
    model, loader = build_model(c, len(tok)).double(), run_batches(c, ds, tok, world)
    trainer = Trainer(c, model, loader, torch.device('cpu'), world)
    found = []
    for _, batch in zip(range(3), trainer.loader):
        trainer.seed()                                             # another on each process, as in a step
        terms = trainer.gradients(batch)
        params = dict(trainer.model.named_parameters())
        if trainer.weights.s.requires_grad: params['task weights'] = trainer.weights.s   # balance=literal
        mean_gradients(world, list(params.values()))
        grads = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
        found.append(({k: v.item() for k, v in terms.items()}, grads, trainer.weights.weights))
        trainer.step += 1
    return found


def difference(one, many) -> dict[str, float]:
    "The largest difference of losses, of task weights, and of gradients relative to the largest of them."
    worst = dict.fromkeys(('loss', 'weight', 'gradient'), 0.)
    for (terms, grads, weights), (terms2, grads2, weights2) in zip(one, many, strict=True):
        assert (list(terms), list(grads), list(weights)) == (list(terms2), list(grads2), list(weights2))
        largest = max(g.abs().max().item() for g in grads.values())
        gaps = dict(loss=[terms[k] - terms2[k] for k in terms],
                    weight=[weights[k] - weights2[k] for k in weights],
                    gradient=[(grads[k] - grads2[k]).abs().max().item()/largest for k in grads])
        for name, values in gaps.items(): worst[name] = max(worst[name], max(map(abs, values)))
    return worst


def same_losses(home, ds, tok, world):
    "Every reading in this world, against the same batches in one process."
    rows = {}
    for kw in READINGS:
        c = make_config(**SMALL | dict(data_root=str(home/'data')) | kw)
        many = three_batches(c, ds, tok, world)
        if world.is_main:
            alone = c.model_copy(update={'accumulate': 1})
            rows[str(kw)] = difference(three_batches(alone, ds, tok, ALONE), many)
    return rows


def scores(home, ds, tok, world):
    "Of a gallery of 15 images in batches of 2: everything that a test yields, as bytes."
    ds.records.drop(index=ds.records.index[ds.records.split == 'test'][-1], inplace=True)
    ds.records.reset_index(drop=True, inplace=True)
    ev.embed_images = partial(ev.embed_images, batch=2)
    ev.embed_texts = partial(ev.embed_texts, batch=3)
    found = {}
    for kw in (dict(rerank=5), dict(rerank=5, fusion_input='tokens')):
        torch.manual_seed(0)
        model = build_model(make_config(**SMALL | kw), len(tok))
        model.config = model.config.model_copy(update={'rerank': 5})
        e = ev.evaluate(model, ds, tok, 'test', world=world)
        assert len(e['g']) == 15
        arrays = [e['q'].t, e['g'].f_id, e['top'], e['fused'], *(getattr(r, k) for r in e['results'].values()
                  for k in ('R1', 'AP', 'INP', 'rank'))]
        found[str(kw)] = [np.asarray(x).tobytes().hex() for x in arrays]
    return found


if __name__ == '__main__':
    home, job = Path(sys.argv[2]), {'losses': same_losses, 'scores': scores}[sys.argv[1]]
    torch.set_num_threads(1)
    c = make_config(**SMALL | dict(data_root=str(home/'data')))
    world = find_world(c)
    dataset, tokenizer = load_data(c, False), run_tokenizer(c, None, home/'tokenizer')
    result = job(home, dataset, tokenizer, world)
    if world.is_main: print('result', json.dumps(result))
    world.barrier()
    if world.size > 1: torch.distributed.destroy_process_group()
