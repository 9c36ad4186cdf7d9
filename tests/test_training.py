"""Whole runs of seconds: the same bits for a seed, through kills and full disks; mistakes of a user."""
import json
import multiprocessing as mp
import os
import pickletools
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bdam_repro import batches, objective, optimizers, runs
from bdam_repro import trainer as T
from bdam_repro.config import LITERAL, UserError, config_hash, make_config, run_dir
from bdam_repro.evaluate import evaluate
from bdam_repro.files import read_tensors
from bdam_repro.metrics import chance, rank_metrics, rerank_metrics
from bdam_repro.pedes import load_pedes
from bdam_repro.pretrained import from_pretrained
from bdam_repro.ranked import difference, load_run, metrics_table, run_evaluate
from bdam_repro.run_data import load_data
from bdam_repro.runs import finished, headline, prepare, result_table, train
from bdam_repro.synth import make_synth
from bdam_repro.trainer import pick_device

FILES = ['best.safetensors', 'config.json', 'features.safetensors', 'history.csv', 'metrics.json',
         'provenance.json', 'tokenizer']
SMALL = dict(preset='smoke', folder='small', synth_train_ids=16, synth_val_ids=4, synth_test_ids=4, epochs=2,
             amp='off', vocab_size=300)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('home')

def cfg(home: Path, **kw): return make_config(**SMALL | dict(data_root=str(home/'data')) | kw)


@pytest.fixture(scope='module')
def whole(home):
    "A run that nothing disturbed."
    torch.set_num_threads(1)
    return train(cfg(home), home/'runs', progress=False)


def bits(folder: Path) -> dict:
    "All of a run that must not depend on when and where it ran: everything except times."
    h = pd.read_csv(folder/'history.csv').drop(columns=['images_per_s', 'wait_share'])
    h = h[[k for k in h if not k.startswith('test_')]]                                 # of `log_test`: a note
    m = json.loads((folder/'metrics.json').read_text())
    m.pop('train_seconds')
    raw = lambda tensors: {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in tensors.items()}
    tensors = {p.name: raw(read_tensors(p)[0]) for p in folder.glob('*.safetensors')}
    tokenizer = {p.name: p.read_bytes() for p in (folder/'tokenizer').iterdir()}
    return tensors | tokenizer | {'history': h.to_csv(), 'metrics': m}

def names(folder: Path) -> list[str]: return sorted(p.name for p in folder.iterdir())

def weights(folder: Path): return read_tensors(folder/'best.safetensors')[0]


# --- what a run leaves --------------------------------------------------------------------------------------

def test_the_folder_of_a_run(home, whole):
    c = cfg(home)
    assert whole == run_dir(c, home/'runs') and names(whole) == FILES
    config = json.loads((whole/'config.json').read_text())
    assert config.pop('config_hash') == config_hash(c) and config == c.model_dump()
    p = json.loads((whole/'provenance.json').read_text())
    assert {'code', 'python', 'packages', 'device', 'precision', 'train_seconds', 'test_seconds'} <= set(p)
    assert p['packages']['torch'] == torch.__version__
    assert p['precision'] == 'float32' and p['device'].startswith('CPU')
    assert str(home) not in json.dumps(p)                                               # no path of a machine
    h = pd.read_csv(whole/'history.csv')
    assert h.epoch.tolist() == [1, 2] and not h.isna().any().any() and h.lr.is_monotonic_decreasing
    terms = ['align', 'triplet', 'clothing', 'decouple', 'gate', 'fusion']
    assert [k for k in h if k.startswith('loss_')] == [f'loss_{k}' for k in terms]
    assert np.allclose(h[[f'w_{k}' for k in terms]].sum(axis=1), 6)                   # GradNorm keeps the sum
    moved = h.filter(regex='^w_').iloc[0] != 1                             # and moves them; the fusion's loss
    assert moved.drop('w_fusion').all() and not moved['w_fusion']                  # does not reach the towers


def test_metrics_are_those_of_the_stored_features(home, whole):
    m, (t, meta) = finished(whole), read_tensors(whole/'features.safetensors')
    pids = load_data(cfg(home), False).records['pid'].to_numpy()
    q, g = pids[t['q_rows']], pids[t['g_rows']]
    r = rank_metrics(t['t'], t['f_id'], q, g)
    results = {'dual': r, 'fused': rerank_metrics(r, t['top'], t['fused'])}
    assert m['test'] == {k: {n: round(v, 4) for n, v in x.summary().items()} for k, x in results.items()}
    for name, x in results.items():
        for k in ('R1', 'R5', 'R10', 'AP', 'INP'):
            assert np.array_equal(t[f'{name}.{k}'].numpy(), getattr(x, k))
        for k, value in (('R1', m['test'][name]['R1']), ('mAP', m['test'][name]['mAP'])):
            at, low, high = m['test_ci95'][name][k]
            assert at == pytest.approx(value, abs=1e-3) and low <= at <= high
    assert m['chance'] == pytest.approx(chance(q, g))
    assert (m['queries'], m['gallery'], m['gallery_ids']) == (32, 16, 4) == (len(q), len(g), len(set(g)))
    assert (m['dataset'], m['variant'], m['seed'], m['score']) == ('synth', 'full', 0, 'fused')
    assert meta['config_hash'] == m['config_hash'] == config_hash(cfg(home))
    assert t['w'].shape == (32, 2) and torch.allclose(t['w'].sum(1), torch.ones(32))
    assert ((t['g'] > 0) & (t['g'] < 1)).all()


def test_metrics_are_those_of_the_stored_weights(home, whole):
    ds = load_data(cfg(home), False)
    model, tok = from_pretrained(whole/'best.safetensors'), batches.load_tokenizer(whole/'tokenizer')
    for split in ('val', 'test'):
        e = evaluate(model, ds, tok, split)
        assert runs.summary(e) == finished(whole)[split]
        for rows in (e['q_rows'], e['g_rows']): assert set(ds.records['split'].iloc[rows]) == {split}
    h, m = pd.read_csv(whole/'history.csv'), finished(whole)
    best = h.val_fused_R1.idxmax()                                                     # the first of the best
    assert m['epoch'] == best + 1
    assert m['val'] == {k: {n: h[f'val_{k}_{n}'][best] for n in v} for k, v in m['val'].items()}


def test_no_file_of_a_run_is_a_pickle(whole):
    for path in whole.rglob('*'):
        if path.is_dir(): continue
        head = path.read_bytes()
        assert head[:2] not in (b'PK', b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05'), path
        with pytest.raises(Exception): list(pickletools.genops(head[:4096]))  # noqa: B017 (many ways)
        if path.suffix == '.json': json.loads(head)
        elif path.suffix == '.csv': head.decode('ascii')
        else: assert path.suffix == '.safetensors' and read_tensors(path)[0]


# --- the same bits ------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_bits_and_another_seed_others(home, whole):
    again = train(cfg(home), home/'again', progress=False)
    assert bits(again) == bits(whole)
    other = train(cfg(home, seed=1), home/'again', progress=False)
    a, b = weights(whole), weights(other)
    assert all(not torch.equal(a[k], b[k]) for k in a if a[k].ndim > 1 and not k.endswith('A_log'))


@pytest.mark.parametrize('kw', [
    dict(workers=1, cache_gb=0., tag='x'), dict(grad_checkpoint=True, device='cpu'),
    dict(log_test=True)], ids=str)
def test_what_the_hash_leaves_out_changes_no_bit(home, whole, tmp_path, kw):
    assert bits(train(cfg(home, **kw), tmp_path, progress=False)) == bits(whole)


def test_what_the_metrics_say_is_what_the_kept_weights_score(home, whole):
    run = load_run(whole, str(home/'data'), progress=False)
    assert difference(run, run_evaluate(run, 'val'), 'val') < 1e-3
    e = run_evaluate(run)
    assert difference(run, e) < 1e-3
    shown, again = result_table(whole), metrics_table(run, e)
    assert list(shown.index) == list(again.index) and list(shown.columns) == list(again.columns)
    for column in ('R1', 'R5', 'R10', 'mAP', 'mINP'):
        assert (shown[column] - again[column]).abs().max() < .11                            # rounded twice
    for column in ('R1 95 %', 'mAP 95 %'): assert shown[column].tolist() == again[column].tolist()


def test_data_at_hand_is_not_read_again(home, whole, tmp_path, monkeypatch):
    ds = load_data(cfg(home), progress=False)
    monkeypatch.setattr(runs, 'load_data', lambda *a: pytest.fail('read again'))
    assert bits(train(cfg(home), tmp_path, progress=False, dataset=ds)) == bits(whole)


@pytest.mark.parametrize('dataset', ['cuhk', 'icfg', 'rstp'])
def test_an_epoch_of_real_data_deals_all_pairs(dataset):
    c = make_config(dataset)
    assert (c.preset, c.epoch_of, c.epochs) == ('paper', 'pairs', 60)


def test_steps_and_samples_are_printed_at_the_start(home, tmp_path, capsys):
    "16 people with 4 images of 2 captions: 128 pairs, in batches of 8 people with 2 each."
    c = cfg(home, epoch_of='pairs', ids_per_batch=8, images_per_id=2, epochs=3)
    trainer = prepare(c, tmp_path/'run').trainer
    assert trainer.steps == 3*128//16
    line = '3 epochs of 8 steps of 16: 24 steps, 384 samples; 64 images with 128 captions of 16 people'
    assert line in capsys.readouterr().out


def test_training_needs_no_client_of_an_mllm():
    "Nor the clusterings: they take seconds to import."
    code = 'import sys, bdam_repro.runs; print({"openai", "aiohttp", "sklearn.cluster"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'set()'


def test_a_finished_run_is_not_run_again(home, whole, monkeypatch, capsys):
    stamps = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
    monkeypatch.setattr(runs, 'prepare', lambda *a, **k: pytest.fail('it was run again'))
    assert train(cfg(home), home/'runs') == whole
    assert 'complete already' in capsys.readouterr().out
    train(cfg(home, workers=3, data_root='elsewhere'), home/'runs', progress=False)         # change no result
    assert stamps == {p: p.stat().st_mtime_ns for p in whole.rglob('*')}


def test_other_options_do_not_touch_a_finished_run(home, whole, tmp_path):
    shutil.copytree(home/'runs', tmp_path/'runs')
    run = run_dir(cfg(home), tmp_path/'runs')
    with pytest.raises(UserError, match=r'finished run of other options .* tag, or overwrite=True') as e:
        train(cfg(home, tau=.07), tmp_path/'runs', progress=False)
    assert '\n' not in str(e.value) and bits(run) == bits(whole)
    kw = dict(vocab_size=250, epochs=1)                           # the old tokenizer would not be of this run
    fresh = train(cfg(home, **kw, tag='t'), tmp_path/'runs', progress=False)
    assert fresh.parent.name == 'full-t' and bits(run) == bits(whole)
    assert bits(train(cfg(home, **kw), tmp_path/'runs', overwrite=True, progress=False)) == bits(fresh)


def test_other_options_do_not_touch_an_interrupted_run(home, tmp_path, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(runs, 'finish_run', interrupted)
        with pytest.raises(KeyboardInterrupt): train(cfg(home, epochs=1), tmp_path, progress=False)
    kept = (run_dir(cfg(home), tmp_path)/'last.ckpt').read_bytes()
    with pytest.raises(UserError, match=r'interrupted run of other options .* tag, or overwrite=True'):
        train(cfg(home, epochs=1, tau=.07), tmp_path, progress=False)
    assert (run_dir(cfg(home), tmp_path)/'last.ckpt').read_bytes() == kept
    assert finished(train(cfg(home, epochs=1, tau=.07), tmp_path, overwrite=True, progress=False))


# --- the test split is for the end --------------------------------------------------------------------------

def test_the_checkpoint_is_chosen_on_validation_alone(home, tmp_path, monkeypatch):
    "Scripted scores: validation is best in epoch 2, test would be best in epoch 1 or 3."
    script, asked, kept = {'val': [10., 30., 20.], 'test': [90., 0., 90.]}, [], {}
    def scripted(model, dataset, tokenizer, split, amp=None, *world):
        asked.append(split)
        e = evaluate(model, dataset, tokenizer, split, amp)
        if not model.training: return e                                       # the end: weights are read back
        epoch = len(kept)
        kept[epoch + 1] = {k: v.clone() for k, v in model.state_dict().items()}
        for r in e['results'].values(): r.R1[:] = script[split][epoch]/100
        return e
    monkeypatch.setattr(runs, 'evaluate', scripted)
    folder = train(cfg(home, epochs=3), tmp_path, progress=False)
    assert asked == ['val']*3 + ['test'] and finished(folder)['epoch'] == 2
    assert all(torch.equal(v, kept[2][k]) for k, v in weights(folder).items())


def test_nothing_of_the_test_split_reaches_the_training(home, whole, tmp_path):
    "Other test captions, pictures and people: tokenizer, weights and validation are the same bits."
    shutil.copytree(home/'data'/'small', tmp_path/'data'/'small')
    table = tmp_path/'data'/'small'/'reid_raw.json'
    rows = json.loads(table.read_text())
    for i, row in enumerate(r for r in rows if r['split'] == 'test'):
        row['captions'] = [f'zebra quagga number{i} xylophone '*3]*2
        Image.effect_noise((32, 64), 90).convert('RGB').save(tmp_path/'data'/'small'/'imgs'/row['file_path'])
    table.write_text(json.dumps(rows))
    folder = train(cfg(tmp_path), tmp_path, progress=False)
    a, b = bits(folder), bits(whole)
    assert a['metrics'].pop('test') != b['metrics'].pop('test')
    assert a['metrics']['val'] == b['metrics']['val'] and a['metrics']['epoch'] == b['metrics']['epoch']
    assert all(a[k] == b[k] for k in b if k not in ('metrics', 'features.safetensors'))


def test_the_headline_is_a_score_that_was_trained():
    for variant in ('full', 'fusion'): assert headline(make_config(variant=variant)) == 'fused'
    for variant in ('baseline', 'bdam', 'sdm'): assert headline(make_config(variant=variant)) == 'dual'


# --- kills and full disks -----------------------------------------------------------------------------------
# A server that has imported everything and trained nothing makes the processes: a start takes milliseconds.

def child(pipe, c, runs, at: int, after: bool, limit: int):
    "A run that kills itself before or after its `at`-th finished file, or that meets a full disk."
    torch.set_num_threads(1)
    replace, seen = os.replace, []
    def counted(*args):
        seen.append(args)
        if len(seen) == at and not after: os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if len(seen) == at: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = counted
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: train(c, runs, progress=False)
    except UserError as e: pipe.send(str(e))
    else: pipe.send('done')


@pytest.fixture(scope='module')
def start():
    context = mp.get_context('forkserver')
    context.set_forkserver_preload(['bdam_repro.runs'])
    def go(c, runs, at=0, after=False, limit=0):
        here, there = context.Pipe()
        p = context.Process(target=child, args=(there, c, runs, at, after, limit), daemon=True)
        p.start()
        there.close()
        return p, here
    return go

def said(p, pipe) -> str | None:
    "What the run said at its end; None where it was killed."
    p.join()
    try: return pipe.recv()
    except EOFError:
        assert p.exitcode == -signal.SIGKILL
        return None


@pytest.fixture(scope='module')
def longer(home):
    torch.set_num_threads(1)
    return train(cfg(home, epochs=3), home/'longer', progress=False)


@pytest.mark.parametrize('after', [False, True])
def test_killed_between_files_it_goes_on_to_the_same_bits(home, longer, tmp_path, start, after):
    "The first start dies at its first file, the next at its second, and so on, until one finishes."
    deaths = 0
    while (end := said(*start(cfg(home, epochs=3), tmp_path, at=deaths + 1, after=after))) is None:
        deaths += 1
        folder = run_dir(cfg(home, epochs=3), tmp_path)
        for p in folder.glob('*.safetensors'): read_tensors(p)                           # whole, or not there
        for p in folder.glob('*.json'): json.loads(p.read_text())
    assert end == 'done' and deaths >= 5 and bits(folder) == bits(longer)


def test_killed_at_random_moments_it_goes_on_to_the_same_bits(home, whole, tmp_path, start):
    rng, deaths = random.Random(0), 0
    for name in ('first', 'second'):                                # the first waits for the server's imports
        begun = time.perf_counter()
        assert said(*start(cfg(home), tmp_path/name)) == 'done'
    took = time.perf_counter() - begun                        # so that kills fall into the run on any machine
    for _ in range(5):
        p, pipe = start(cfg(home), tmp_path)
        p.join(rng.uniform(.1, .5)*took)
        if p.is_alive(): p.kill()
        deaths += said(p, pipe) is None
    folder = train(cfg(home), tmp_path, progress=False)
    assert deaths >= 1 and bits(folder) == bits(whole)


@pytest.mark.parametrize('kw', [
    dict(balance='literal', eval_every=2), dict(amp='fp16'), dict(amp='bf16', balance='fixed')], ids=str)
def test_every_kind_of_state_is_resumed(home, tmp_path, start, kw):
    c = cfg(home, epochs=2, **kw)
    a = train(c, tmp_path/'a', progress=False)
    first_history = 5 if c.eval_every > 1 else 8     # with a validation: a checkpoint (two names), the best
    assert said(*start(c, tmp_path/'b', at=first_history, after=True)) is None
    folder = run_dir(c, tmp_path/'b')
    assert (folder/'history.csv').exists() and not (folder/'metrics.json').exists()
    assert bits(train(c, tmp_path/'b', progress=False)) == bits(a)


def test_an_unfinished_run_of_other_options_is_not_continued(home, whole, tmp_path, start):
    other = cfg(home, vocab_size=250, lr=3e-3, epochs=1)
    assert said(*start(other, tmp_path, at=6, after=True)) is None
    assert bits(train(cfg(home), tmp_path, overwrite=True, progress=False)) == bits(whole)


@pytest.mark.parametrize('limit, has', [
    (1_000, ['provenance.json']), (5_000, ['config.json', 'provenance.json']),
    (100_000, ['config.json', 'provenance.json', 'tokenizer']),
    (700_000, ['best.safetensors', 'config.json', 'history.csv', 'provenance.json', 'tokenizer'])])
def test_a_full_disk_is_one_line_and_nothing_half_written(home, whole, tmp_path, start, limit, has):
    c = cfg(home, save_minutes=0.)                     # the first checkpoint is that of the epoch's end
    line = said(*start(c, tmp_path, limit=limit))
    assert line.startswith('cannot write') and 'free some space' in line and '\n' not in line
    folder = run_dir(c, tmp_path)
    assert names(folder) == has
    if limit > 5_000:  # with room, it goes on
        assert bits(train(c, tmp_path, progress=False)) == bits(whole)


# --- every reading trains -----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def ready(home):
    "Data and tokenizer, made once."
    training = prepare(cfg(home), home/'ready', False)
    return training.dataset, training.tokenizer


READINGS = [
    dict(id_text='generated'), dict(id_text='both'), dict(id_text='all'), dict(clothing='literal'),
    dict(clothing='matching_grl'), dict(clothing='both'),
    dict(p_pos='sigmoid', clothing='literal'), dict(fusion_loss='triplet'), dict(fusion_loss='infonce'),
    dict(fusion_text='identity'),
    dict(fusion_text='clothing'), dict(fusion_input='tokens'),
    *(dict(hsic_kernel=k) for k in ('linear', 'rbf', 'cka')),
    dict(gate_reg='entropy'), dict(balance='literal'), dict(balance='fixed'), dict(gradnorm_ref='first'),
    dict(mining='random'), dict(mining='all'), dict(positives='diagonal'), dict(positives='mask'),
    dict(symmetric=False), dict(align_loss='sdm'), dict(align_loss='tal', align_start=.5),
    dict(images_per_id=1), dict(optimizer='adamw'), dict(grad_clip=0.), dict(text_pool='mean'),
    dict(fusion_kind='product'), dict(fusion_kind='cross', fusion_input='tokens'), dict(fusion_norm=False),
    dict(fusion_input='tokens', fusion_order='text', fusion_scan='both', fusion_read='second'),
    dict(fusion_grad=True, fusion_apart=True), dict(fusion_grad=True, fusion_start=.5),
    dict(image_feature='pooled'), dict(image_feature='encoder'), dict(triplet_feature='raw'),
    dict(decay_all=True, optimizer='adam'), dict(gradnorm_ema=0., gradnorm_eps=0.), LITERAL,
    dict(variant='sdm'), dict(variant='tal'), dict(descriptions='none'), dict(max_length=8),
    *(dict(amp=a, fusion_input=i) for a in ('bf16', 'fp16') for i in ('pooled', 'tokens'))]


def reading_id(kw): return '-'.join(map(str, kw.values())) if len(kw) < 9 else 'literal'


@pytest.mark.parametrize('kw', READINGS, ids=reading_id)
def test_every_reading_trains(home, ready, kw):
    "Two steps: finite losses, and every weight moves that has a gradient."
    c = cfg(home, **kw)
    trainer = prepare(c, home/'ready', False).trainer
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    # a scale at which the first steps of fp16 do not overflow and are not skipped
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=256., enabled=c.amp == 'fp16')
    for step, batch in zip(range(2), trainer.loader):
        trainer.step = step + 1
        terms = trainer.train_step(batch)
        assert terms and np.isfinite(list(terms.values())).all() and set(terms) == set(trainer.names)
    moved = {n: not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()}
    still = [n for n, m in moved.items() if not m]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    grads = {n: p.grad for n, p in trainer.model.named_parameters()}
    assert all('A_log' in n or grads[n] is None or not grads[n].any() for n in still), still
    assert sum(moved.values()) > .8*len(moved)
    w = trainer.weights.weights
    assert all(0 < x < 10 for x in w.values())
    if len(w) > 1: assert (c.balance == 'fixed') == (set(w.values()) == {1.})


def test_two_threads_skip_a_step_that_overflows(home, ready, monkeypatch):
    "The first step of fp16 scales by 65,536: gradients overflow, so no weight may move, in neither thread."
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    trainer = prepare(cfg(home, amp='fp16', dropout=0.), home/'ready', False).trainer
    assert trainer.model.second is not None and len(trainer.opts) > 1
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=2.**40, enabled=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.step = 1
    trainer.train_step(next(iter(trainer.loader)))
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_descriptions_feed_what_their_option_says(home, ready):
    def batch(**kw):
        c = cfg(home, **kw)
        trainer = prepare(c, home/'ready', False).trainer
        return trainer, next(iter(trainer.loader))
    trainer, b = batch()
    assert b.id_ids is not None and b.clo_ids is not None                           # 'both'
    assert objective.forward(trainer.model, b, trainer.c).identity is not None
    trainer, b = batch(variant='no_infonce')                                        # no term reads it
    assert b.id_ids is not None and objective.forward(trainer.model, b, trainer.c).identity is None
    trainer, b = batch(id_text='caption')
    assert b.id_ids is None and b.clo_ids is not None
    trainer, b = batch(fusion_text='identity', id_text='caption')
    trainer.model.eval()
    out = objective.forward(trainer.model, b, trainer.c)
    assert torch.equal(out.anchor, out.identity.t) and not torch.equal(out.anchor, out.caption.t)
    trainer, b = batch(fusion_text='clothing')
    trainer.model.eval()
    out = objective.forward(trainer.model, b, trainer.c)
    assert torch.equal(out.anchor, out.clothing.t)
    trainer, b = batch(descriptions='none')
    assert b.id_ids is None and b.clo_ids is None
    assert 'clothing' not in trainer.names and trainer.model.proj_clo is None


@pytest.mark.parametrize('kw', [
    dict(fusion_input='tokens', amp='bf16', rerank=1000),
    dict(fusion_loss='triplet', amp='bf16', eval_every=5),
    dict(variant='baseline'), dict(variant='bdam_no_gate', descriptions='none'),
    dict(synth_layout='icfg', folder='icfg', clothes_change=True)], ids=str)
def test_whole_runs_of_other_kinds(home, tmp_path, kw):
    folder = train(c := cfg(home, epochs=1, **kw), tmp_path, progress=False)
    m, (t, _) = finished(folder), read_tensors(folder/'features.safetensors')
    assert names(folder) == FILES
    assert set(m['test']) == set(m['val']) == ({'dual', 'fused'} if c.fusion else {'dual'})
    assert all(x.isfinite().all() for x in t.values()) and m['epoch'] == 1


# --- bad input, over the whole way --------------------------------------------------------------------------

def edit(change):
    "Change the rows of the annotation file."
    def apply(folder):
        rows = json.loads((folder/'reid_raw.json').read_text())
        change(rows)
        (folder/'reid_raw.json').write_text(json.dumps(rows))
    return apply

def first(rows, split): return next(r for r in rows if r['split'] == split)

def picture(split, write):
    "Change the first picture of a split."
    def apply(folder):
        rows = json.loads((folder/'reid_raw.json').read_text())
        write(folder/'imgs'/first(rows, split)['file_path'])
    return apply

def move(split):
    "A split that is empty: its rows are of another."
    def change(rows):
        for r in rows:
            if r['split'] == split: r['split'] = 'test' if split == 'train' else 'train'
    return edit(change)

def other_seed(folder):
    spec = json.loads((folder/'synth.json').read_text())
    (folder/'synth.json').write_text(json.dumps(spec | {'seed': 7}))

def huge(path):
    "A few bytes that claim to be a picture of 900 million pixels."
    Image.new('RGB', (16, 16)).save(path, 'BMP')
    head = path.read_bytes()
    path.write_bytes(head[:18] + (30_000).to_bytes(4, 'little')*2 + head[26:])

def link_out(path):
    path.unlink()
    path.symlink_to('/etc/hostname')

def bad_descriptions(text):
    return lambda folder: (folder/'descriptions.jsonl').write_text(text)


BAD_DATA = {
    'annotations cut': (lambda f: (f/'reid_raw.json').write_text('[{"split": "tr'), 'not JSON'),
    'annotations gone': (lambda f: (f/'reid_raw.json').unlink(), 'reid_raw.json'),
    'a key missing': (edit(lambda rows: rows[5].pop('captions')), "row 5: the key 'captions' is missing"),
    'a path that climbs out': (edit(lambda rows: rows[5].update(file_path='../../../secret.jpg')),
                               'row 5: .* leaves'),
    'images gone': (lambda f: shutil.rmtree(f/'imgs'), 'imgs/'),
    'a train image gone': (picture('train', Path.unlink), 'no such image file'),
    'a train image cut': (picture('train', lambda p: p.write_bytes(p.read_bytes()[:200])),
                          'not a readable image'),
    'a train image of 1×1': (picture('train', lambda p: Image.new('RGB', (1, 1)).save(p)), '1×1 pixels'),
    'a huge train image': (picture('train', huge), 'pixels'),
    'an image that is a link out': (picture('train', link_out), 'link that leaves'),
    'no train split': (move('train'), "'train'"),
    'no test split': (move('test'), "'test'"),
    'descriptions cut': (bad_descriptions('{"image": 3}\n{"image'), 'descriptions.jsonl'),
    'descriptions of other images': (
        bad_descriptions('{"image": "x.jpg", "identity": "a", "clothing": "b"}\n'), 'descriptions.jsonl'),
    'other parameters in place': (other_seed, 'seed=7 .*choose another `folder`'),
    'not a SynthPEDES': (lambda f: (f/'synth.json').unlink(), 'no synth.json'),
}


@pytest.mark.parametrize('case', BAD_DATA)
def test_bad_data_is_one_line_before_the_first_epoch(home, whole, tmp_path, case, monkeypatch):
    damage, words = BAD_DATA[case]
    folder = tmp_path/'data'/'small'
    shutil.copytree(home/'data'/'small', folder, copy_function=shutil.copy)
    damage(folder)
    before = sorted(p.relative_to(folder) for p in folder.rglob('*'))
    monkeypatch.setattr(runs, 'one_epoch', lambda *a: pytest.fail('an epoch was trained first'))
    with pytest.raises(UserError, match=words) as e: train(cfg(tmp_path), tmp_path/'runs', progress=False)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500
    run = run_dir(cfg(tmp_path), tmp_path/'runs')
    assert set(names(run)) <= {'config.json', 'provenance.json', 'tokenizer'}
    assert before == sorted(p.relative_to(folder) for p in folder.rglob('*'))  # the user's data stays
    shutil.rmtree(folder)
    monkeypatch.undo()
    shutil.copytree(home/'data'/'small', folder)                           # mended, it runs, to the same bits
    if case == 'a train image cut':
        assert bits(train(cfg(tmp_path), tmp_path/'runs', progress=False)) == bits(whole)


@pytest.mark.parametrize('kw, words', [
    (dict(device='cuda'), 'CUDA'), (dict(device='cuda:1'), 'CUDA'), (dict(device='gpu'), "choose 'auto'"),
    (dict(device='mps'), "choose 'auto'"), (dict(ids_per_batch=17), 'lower p'),
    (dict(image_height=72), 'not tiled'), (dict(vision={'type': 'resnet'}), "'resnet'"),
    (dict(vision={'type': 'vit', 'hidden': 32, 'layers': 1}), "lack 'heads'"),
    (dict(text={'type': 'bert', 'hiden': 32}), "'hiden'"), (dict(vision='./nowhere'), 'no folder'),
    (dict(text='./nowhere'), 'no folder'),
    (dict(id_text='generated', descriptions='none'), 'descriptions'),
    (dict(fusion_text='identity', descriptions='none'), 'descriptions'),
    (dict(descriptions='descriptions_kmeans.jsonl'), 'no such file'),
    (dict(synth_seed=9), 'choose another `folder`'),
    (dict(synth_images=9), 'choose another `folder`'), (dict(folder='../up'), 'plain name'),
    (dict(lr=1e30, grad_clip=0.), 'not finite at step 1, the batch of .*: align nan'),
    (dict(dataset='rstp', vision='./x', folder=''), 'RSTPReid'),
])
def test_bad_options_are_one_line(home, whole, tmp_path, kw, words):
    if 'CUDA' in words and torch.cuda.is_available(): pytest.skip('there is CUDA here')
    c = cfg(home, **kw)
    with pytest.raises(UserError, match=words) as e: train(c, tmp_path, progress=False)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500
    folder = run_dir(c, tmp_path)
    left = {'config.json', 'provenance.json', 'tokenizer', 'bad_step.json'}
    assert not folder.exists() or set(names(folder)) <= left


@pytest.mark.parametrize('device, words', [
    ('cuda:2', 'there are 2 CUDA devices, from cuda:0'), ('cuda:x', 'there are 2'), ('cuda:1', '')])
def test_the_device_has_to_be_there(home, monkeypatch, device, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    if not words: assert pick_device(cfg(home, device=device)) == torch.device(device); return
    with pytest.raises(UserError, match=words): pick_device(cfg(home, device=device))


def test_runs_where_no_folder_can_be(home, tmp_path):
    (tmp_path/'runs').write_text('a file')
    with pytest.raises(UserError, match='cannot make the folder') as e:
        train(cfg(home), tmp_path/'runs', progress=False)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, content', [
    ('metrics.json', '[3]'), ('metrics.json', '{}'), ('config.json', '{'), ('config.json', '[]'),
    ('last.ckpt', 'x')])
def test_damaged_files_of_a_run(home, whole, tmp_path, name, content):
    "A run folder that somebody damaged is refused in one line, or done again to the same bits."
    run = run_dir(cfg(home), tmp_path)
    shutil.copytree(whole, run)
    if name != 'metrics.json': (run/'metrics.json').unlink()
    (run/name).write_text(content)
    try: train(cfg(home), tmp_path, progress=False)
    except UserError as e:
        assert '\n' not in str(e) and name in str(e) and 'delete' in str(e)
        (run/name).unlink()                                                          # does what the line says
        train(cfg(home), tmp_path, progress=False)
    assert bits(run) == bits(whole)


def test_a_loss_that_is_no_number_keeps_the_last_good_epoch(home, tmp_path, monkeypatch):
    step = T.Trainer.train_step
    def poisoned(self, batch):
        if self.step == 3: next(self.model.parameters()).data.fill_(float('nan'))
        return step(self, batch)
    monkeypatch.setattr(T.Trainer, 'train_step', poisoned)
    with pytest.raises(UserError, match='the loss is not finite at step 3'):
        train(cfg(home), tmp_path, progress=False)
    folder = run_dir(cfg(home), tmp_path)
    assert names(folder) == ['bad_step.json', 'best.safetensors', 'config.json', 'history.csv', 'last.ckpt',
                             'previous.ckpt', 'provenance.json', 'tokenizer']
    assert all(v.isfinite().all() for v in weights(folder).values())
    assert len(pd.read_csv(folder/'history.csv')) == 1


def test_another_dataset_stays_as_it_is(home, whole):
    "A SynthPEDES of other parameters in the same place is neither used nor touched."
    with pytest.raises(UserError, match='choose another `folder`'):
        load_data(cfg(home, synth_train_ids=20), False)
    assert len(load_pedes('synth', home/'data', folder='small').records) == 96
    with pytest.raises(UserError, match='choose another `folder`'):
        make_synth(home/'data', folder='small', n_ids=3)


# --- two cores ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_a_second_core_changes_no_bit(home, optimizer, tmp_path):
    c = cfg(home, optimizer=optimizer)
    def after(threads):
        torch.set_num_threads(threads)
        trainer = prepare(c, tmp_path/f'{threads}', False).trainer
        assert (trainer.model.second is None) == (threads == 1)
        with T.single_threaded(trainer.model.second is not None):
            T.train_epoch(trainer, 0, runs.tqdm(disable=True))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        return trainer.model.state_dict()
    one, two = after(1), after(2)
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_dropout_and_second_derivatives_keep_to_one_thread(home):
    torch.set_num_threads(2)
    cpu = torch.device('cpu')
    assert T.two_cores(cfg(home), cpu) and not T.two_cores(cfg(home), torch.device('meta'))
    assert not T.two_cores(cfg(home, dropout=.1), cpu) and not T.two_cores(cfg(home, balance='literal'), cpu)


def test_muon_takes_the_matrices_and_the_patch_embedding(home, tmp_path):
    model = prepare(cfg(home), tmp_path, False).trainer.model
    *muon, rest = optimizers.make_optimizers(model, cfg(home))
    matrices = [p for o in muon for p in o.param_groups[0]['params']]
    assert sorted({p.ndim for p in matrices}) == [2, 4]
    groups = [g for opt in (*muon, rest) for g in opt.param_groups]
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert tables and not any(p is table for p in matrices for table in tables)


def test_the_temperature_falls(home, tmp_path):
    trainer, seen = prepare(cfg(home, tau=.1, tau_decay=.25), tmp_path, False).trainer, []
    real = T.batch_losses
    def spy(out, batch, c, *how):
        seen.append((c.tau, c.tau_end))
        return real(out, batch, c, *how)
    T.batch_losses = spy
    try:
        for step in (0, trainer.steps//2, trainer.steps):
            trainer.step = step
            trainer.losses(next(iter(trainer.loader)))
    finally: T.batch_losses = real
    assert np.allclose(seen, [(.1, .025), (.05, .025), (.025, .025)])
    assert trainer.c.tau_end == pytest.approx(.025)
