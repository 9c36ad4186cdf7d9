"""Killed, interrupted, out of disk, without data: a run goes on to the bits of one that nothing disturbed."""
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_training import bits, cfg, names

from bdam_repro import checkpoints, files, runs
from bdam_repro import trainer as trainers
from bdam_repro.config import UserError, make_config, run_dir
from bdam_repro.files import read_tensors
from bdam_repro.runs import finished, train

# 3 epochs of 4 steps, a checkpoint after every second step
OFTEN = dict(epochs=3, ids_per_batch=4, save_steps=2, gradnorm_every=2, dropout=.1)
KILLS = int(os.environ.get('BDAM_KILLS', 1))         # of each of four kinds; `make soak`: 5


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def whole(home):
    torch.set_num_threads(1)
    return train(cfg(home, **OFTEN), home/'runs', progress=False)


# --- a run in a process of its own, with an accident at an event that is counted ----------------------------

def at_event(kind: str, number: int, act):
    "Call `act` at the `number`-th event of a kind in this process."
    seen = [0]
    def count():
        seen[0] += 1
        if seen[0] == number: act()
    if kind == 'step':                               # after the gradients, in the middle of the update
        update = trainers.clip_by_part
        trainers.clip_by_part = lambda *args: (count(), update(*args))[1]
    if kind == 'batch':                              # while a batch is computed
        losses = trainers.batch_losses
        trainers.batch_losses = lambda *args: (count(), losses(*args))[1]
    if kind == 'write':                              # half a file of tensors is written
        save = files.save_file
        def half(tensors, path, header):
            save(tensors, path, header)
            os.truncate(path, path.stat().st_size//2)
            count()
            save(tensors, path, header)
        files.save_file = half
    if kind == 'rename':                             # a file is written and not renamed
        replace = os.replace
        os.replace = lambda *args: (count(), replace(*args))[1]

def child(pipe, c, runs, kind: str, number: int, sign: int, limit: int):
    torch.set_num_threads(1)
    if kind: at_event(kind, number, lambda: os.kill(os.getpid(), sign))
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try: train(c, runs, progress=False)
    except UserError as e: pipe.send(str(e))
    except KeyboardInterrupt as e: pipe.send(f'interrupted: {e}')
    else: pipe.send('done')


@pytest.fixture(scope='module')
def start():
    context = mp.get_context('forkserver')
    context.set_forkserver_preload(['bdam_repro.runs'])
    def go(c, runs, kind='', number=0, sign=signal.SIGKILL, limit=0):
        here, there = context.Pipe()
        p = context.Process(target=child, args=(there, c, runs, kind, number, sign, limit), daemon=True)
        p.start()
        there.close()
        p.join()
        try: return here.recv()
        except EOFError: return -p.exitcode
    return go


def step_of(folder: Path) -> int:
    path = folder/'last.ckpt' if (folder/'last.ckpt').exists() else folder/'previous.ckpt'
    return read_tensors(path)[1]['step'] if path.exists() else 0


FIRST = dict(step=3, batch=4, write=2, rename=7)      # from this event on there is a checkpoint to go on from


@pytest.mark.parametrize('kind', FIRST)
def test_killed_at_random_moments_it_ends_with_the_same_bits(home, whole, tmp_path, start, kind):
    rng, deaths, c = random.Random(kind), 0, cfg(home, **OFTEN)
    folder = run_dir(c, tmp_path)
    while deaths < KILLS:
        first = 1 if deaths and step_of(folder) else FIRST[kind]
        end = start(c, tmp_path, kind, first + rng.randint(0, 3))
        deaths += end == signal.SIGKILL
        assert end == 'done' or step_of(folder) > 0                # else nothing was resumed
        if end == 'done': shutil.rmtree(folder)                    # through before the event: once more
        for path in folder.glob('*.json'): json.loads(path.read_text())
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)
    assert names(folder) == names(whole)                           # nothing half-written is left


def test_a_kill_costs_the_steps_since_the_last_checkpoint_alone(home, whole, tmp_path, start):
    c = cfg(home, **OFTEN)
    assert start(c, tmp_path, 'batch', 1 + 4) == signal.SIGKILL    # the first batch only names the terms
    assert step_of(run_dir(c, tmp_path)) == 2
    assert start(c, tmp_path, 'batch', 1 + 3) == signal.SIGKILL    # in steps 3, 4, 5
    assert step_of(run_dir(c, tmp_path)) == 4


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(home, whole, tmp_path, start, sign):
    c = cfg(home, **OFTEN | dict(save_steps=0))
    end = start(c, tmp_path, 'batch', 1 + 3, sign)
    assert end == ('interrupted: stopped and saved after step 3 of 12: run the same again to go on'
                   if sign == signal.SIGINT else signal.SIGTERM)
    assert step_of(run_dir(c, tmp_path)) == 3
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)


@pytest.fixture
def read_late(monkeypatch):
    "Losses are read when an epoch ends, as on a GPU with a thousand steps per second."
    log = trainers.LossLog
    monkeypatch.setattr(trainers, 'LossLog', lambda names, n, files: log(names, 1000, files))


def stop_at(monkeypatch, batch: int, act):
    losses, seen = trainers.batch_losses, []
    def counted(*args):
        seen.append(1)
        if len(seen) == 1 + batch: act()
        return losses(*args)
    monkeypatch.setattr(trainers, 'batch_losses', counted)


def fail(*args, **kwargs): raise RuntimeError('the power fails')


def test_a_signal_does_not_wait_for_losses_that_are_read_late(home, whole, tmp_path, monkeypatch, read_late):
    c = cfg(home, **OFTEN | dict(save_steps=0))
    with monkeypatch.context() as m:
        stop_at(m, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match='after step 2 of 12'): train(c, tmp_path, progress=False)
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)


def test_a_checkpoint_does_not_wait_for_losses_that_are_read_late(home, tmp_path, monkeypatch, read_late):
    c = cfg(home, **OFTEN | dict(save_steps=0))
    monkeypatch.setattr(checkpoints.SavePlan, 'by_time', lambda plan: True)
    stop_at(monkeypatch, 3, fail)
    with pytest.raises(RuntimeError, match='power'): train(c, tmp_path, progress=False)
    assert step_of(run_dir(c, tmp_path)) == 2


def test_a_kill_in_a_validation_costs_no_step(home, whole, tmp_path, monkeypatch):
    c = cfg(home, **OFTEN | dict(save_steps=0))
    with monkeypatch.context() as m:
        m.setattr(runs, 'evaluate', fail)
        with pytest.raises(RuntimeError, match='power'): train(c, tmp_path, progress=False)
    assert step_of(run_dir(c, tmp_path)) == 4 and not finished(run_dir(c, tmp_path))
    with monkeypatch.context() as m:
        stop_at(m, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match='after step 5'): train(c, tmp_path, progress=False)
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)


@pytest.mark.parametrize('split', ['val', 'test'])
def test_memory_that_is_full_in_scoring_is_one_line(home, tmp_path, monkeypatch, split):
    evaluate = runs.evaluate
    def full(model, dataset, tokenizer, name, *args):
        if name == split: raise RuntimeError('CUDA error: out of memory')
        return evaluate(model, dataset, tokenizer, name, *args)
    monkeypatch.setattr(runs, 'evaluate', full)
    with pytest.raises(UserError, match=r'out of memory .*: end what else uses the memory') as e:
        train(cfg(home, epochs=1), tmp_path, progress=False)
    assert '\n' not in str(e.value)


def test_the_checkpoint_before_serves_where_the_last_is_broken(home, whole, tmp_path, start, capsys):
    c = cfg(home, **OFTEN)
    assert start(c, tmp_path, 'batch', 1 + 6) == signal.SIGKILL
    last = run_dir(c, tmp_path)/'last.ckpt'
    last.write_bytes(b'')                                          # what a power failure may leave
    assert bits(train(c, tmp_path)) == bits(whole)
    assert 'last.ckpt is not whole: taking previous.ckpt' in capsys.readouterr().out


def test_a_disk_that_is_full_for_a_while(home, whole, tmp_path, start):
    c = cfg(home, **OFTEN)
    assert start(c, tmp_path, 'batch', 1 + 4) == signal.SIGKILL
    line = start(c, tmp_path, limit=100_000)
    assert line.startswith('cannot write') and 'free some space' in line and '\n' not in line
    assert step_of(run_dir(c, tmp_path)) == 2                      # what was good is still there
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)


def test_a_folder_that_cannot_be_written(home, whole, tmp_path, monkeypatch):
    c = cfg(home, **OFTEN)
    def refuse(*args): raise OSError(30, 'Read-only file system')
    with monkeypatch.context() as m:
        m.setattr(checkpoints.os, 'replace', refuse)
        with pytest.raises(UserError, match=r'cannot write .* Read-only file system') as e:
            train(c, tmp_path, progress=False)
    assert '\n' not in str(e.value)
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)


def test_data_that_go_away_and_come_back(home, whole, tmp_path, monkeypatch):
    c = cfg(home, **OFTEN, cache_gb=0.)
    root, away = home/'data'/'small'/'imgs', home/'data'/'small'/'away'
    losses, seen = trainers.batch_losses, []
    def gone(*args):
        seen.append(1)
        if len(seen) == 5: root.rename(away)
        return losses(*args)
    with monkeypatch.context() as m:
        m.setattr(trainers, 'batch_losses', gone)
        try:
            with pytest.raises(UserError, match='no such image file') as e: train(c, tmp_path, progress=False)
        finally: away.rename(root)
    assert '\n' not in str(e.value) and step_of(run_dir(c, tmp_path)) >= 2
    assert bits(train(c, tmp_path, progress=False)) == bits(whole)


# --- losses that are not finite, and memory -----------------------------------------------------------------

@pytest.mark.parametrize('every', [1, 3])
def test_nan_names_the_step_and_keeps_the_last_good_checkpoint(home, tmp_path, monkeypatch, every):
    c, losses, seen = cfg(home, **OFTEN | dict(save_steps=1 if every == 1 else 3)), trainers.batch_losses, []
    def poisoned(out, batch, c, *how):
        seen.append(batch.rows)
        terms = losses(out, batch, c, *how)
        if len(seen) > 1 + 4: terms['clothing'] = terms['clothing']*float('nan')
        return terms
    log = trainers.LossLog
    monkeypatch.setattr(trainers, 'LossLog', lambda names, n, files: log(names, every, files))
    monkeypatch.setattr(trainers, 'batch_losses', poisoned)
    with pytest.raises(UserError, match=r'not finite at step 4, the batch of .* clothing nan') as e:
        train(c, tmp_path, progress=False)
    folder = run_dir(c, tmp_path)
    bad = json.loads((folder/'bad_step.json').read_text())
    assert '\n' not in str(e.value) and bad['step'] == 4 and bad['losses']['clothing'] == 'nan'
    table = runs.load_data(c, False).records['file']
    assert bad['files'] == [Path(table.iloc[row]).name for row in seen[1 + 4].tolist()]
    assert step_of(folder) == {1: 4, 3: 4}[every]                  # 3: of the end of epoch 1


def test_memory_that_is_full_ends_with_what_helps(home, tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    c = cfg(home, **OFTEN)
    training = runs.prepare(c, tmp_path, False)
    monkeypatch.setattr(trainers, 'batch_losses', full)
    with pytest.raises(UserError, match='out of memory with 8 images at a time: try accumulate=2'):
        training.trainer.train_step(next(iter(training.trainer.loader)))


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_pictures_that_are_missing_are_found_before_the_first_step(home, whole, tmp_path, monkeypatch, split):
    shutil.copytree(home/'data'/'small', tmp_path/'data'/'small')
    c = cfg(tmp_path, epochs=1)
    records = runs.load_data(c, False).records
    (tmp_path/'data'/'small'/'imgs'/records[records.split == split].file.iloc[-1]).unlink()
    monkeypatch.setattr(runs, 'Trainer', lambda *a: pytest.fail('it was begun'))
    with pytest.raises(UserError, match=f"split '{split}', the first of 1 that are missing"):
        train(c, tmp_path, progress=False)


# --- parts of a batch, and short runs -----------------------------------------------------------------------

def test_a_run_in_parts_has_the_scores_of_a_whole_one(home, tmp_path):
    "Float32 sums in another order: the losses agree to six digits, not in their bits."
    import pandas as pd
    a, b = (train(cfg(home, epochs=1, accumulate=n, tag=f'n{n}'), tmp_path, progress=False) for n in (1, 4))
    a, b = (pd.read_csv(folder/'history.csv').filter(regex='^loss_|^w_') for folder in (a, b))
    assert (a - b).abs().max().max() < 1e-4


def test_max_steps_ends_within_an_epoch_and_validates(home, tmp_path):
    folder = train(cfg(home, ids_per_batch=4, max_steps=6, epochs=3, limit=12), tmp_path, progress=False)
    m = finished(folder)
    assert m['epoch'] in (1, 2) and m['gallery_ids'] == 4
    assert len((folder/'history.csv').read_text().splitlines()) == 1 + 2     # 3 batches per epoch


def test_the_history_goes_to_tensorboard_too(home, whole, tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    import pandas as pd
    folder = train(cfg(home, **OFTEN, log='tensorboard'), tmp_path, progress=False)
    log = events.EventAccumulator(str(next((folder/'tensorboard').rglob('events*')).parent))
    log.Reload()
    table = pd.read_csv(folder/'history.csv')
    assert [e.value for e in log.Scalars('loss_align')] == pytest.approx(table.loss_align.tolist(), rel=1e-6)
    assert [e.step for e in log.Scalars('loss_align')] == [4, 8, 12]
    assert bits(folder) == bits(whole)                             # the log changes no result


def test_workers_of_a_list_end_with_the_process_that_started_them(home, tmp_path):
    "Killed, it cannot tell them: each saves its run and goes, or the next start would train beside it."
    code = ('import sys; from pathlib import Path; from bdam_repro.config import make_config\n'
            'from bdam_repro.many import train_many\n'
            'c = make_config(preset="smoke", data_root=sys.argv[1], epochs=2000)\n'
            'train_many([c], Path(sys.argv[2]))')
    parent = subprocess.Popen([sys.executable, '-c', code, str(home), str(tmp_path)])
    folder = run_dir(make_config(preset='smoke'), tmp_path)
    def wait_for(condition):
        end = time.monotonic() + 300                      # of a machine that is busy
        while not condition():
            assert time.monotonic() < end and parent.poll() in (None, -signal.SIGKILL)
            time.sleep(.05)
    try:
        wait_for((folder/'history.csv').exists)
        workers = [int(pid) for task in Path(f'/proc/{parent.pid}/task').iterdir()
                   for pid in (task/'children').read_text().split()]
        running = [pid for pid in workers if b'spawn_main' in Path(f'/proc/{pid}/cmdline').read_bytes()]
        assert running
        parent.kill()
        parent.wait()
        wait_for(lambda: not any(Path(f'/proc/{pid}/cmdline').exists() for pid in running))
    finally: parent.kill()                                # 2000 epochs end with it
    at_end = step_of(folder)
    assert at_end > 0 and not (folder/'metrics.json').exists()
