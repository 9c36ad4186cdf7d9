"""What a reading of the code found: odd values, broken files, money, runs of another kind."""
import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bdam_repro import capture, claims, runs, synth
from bdam_repro import trainer as trainer_module
from bdam_repro.accumulate import parts_of
from bdam_repro.answers import read_reply
from bdam_repro.batches import image_batches
from bdam_repro.batchmode import BatchPart, BatchRun, BatchSettings, BatchState, batch_line, find_lost_batches
from bdam_repro.checkpoints import save_checkpoint
from bdam_repro.config import UserError, make_config
from bdam_repro.describe import start_run
from bdam_repro.elsewhere import captions_elsewhere, elsewhere_factors
from bdam_repro.findings import ONE_SEED
from bdam_repro.journal import Journal, JournalLine
from bdam_repro.many import SharedData
from bdam_repro.mllm import History
from bdam_repro.model import ImageFeatures, TextFeatures, dual
from bdam_repro.people import image_factors
from bdam_repro.probes import spec_of
from bdam_repro.results import own_options
from bdam_repro.runs import prepare
from bdam_repro.shell import run_options


@pytest.mark.parametrize('name', ['fusion_kind', 'descriptions'])
def test_none_may_be_a_value_on_the_command_line(name):
    c = run_options(['-p', 'dataset', 'synth', '-p', name, 'none'])['c']
    assert getattr(c, name) == 'none'
    assert run_options(['-p', 'preset', 'None'])['c'].preset == 'tiny'


def shell(tmp_path, *args, **more):
    "`python -m bdam_repro.shell` on a run of two steps; its data and runs are in the folder."
    few = f'preset smoke epochs 1 max_steps 2 data_root {tmp_path} runs {tmp_path}/runs'.split()
    typed = [word for pair in zip(few[::2], few[1::2]) for word in ('-p', *pair)]
    command = [sys.executable, '-m', 'bdam_repro.shell', *typed, *args]
    environ = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | more
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)


def test_a_run_from_a_shell_whose_log_is_ascii(tmp_path):
    "Each loss is written as value·weight; options without effect are named, and `no` deletes nothing."
    r = shell(tmp_path, '-p', 'fusion_apart', 'true', PYTHONIOENCODING='ascii')
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith('no effect here: fusion_apart') and 'epoch   1/1' in r.stdout, r.stdout
    metrics, = tmp_path.glob('runs/**/metrics.json')
    before = metrics.stat().st_mtime_ns
    r = shell(tmp_path, '-p', 'fusion_apart', 'true', '-p', 'overwrite', 'no')
    assert r.returncode == 1 and r.stderr.startswith("error: parameter overwrite='no'"), r.stderr
    assert len(r.stderr.splitlines()) == 1 and metrics.stat().st_mtime_ns == before


def test_options_without_effect_are_no_options_of_a_run(tmp_path):
    c = make_config('synth', 'tiny', 'baseline', log='wandb', save_minutes=10, accumulate=2)
    (tmp_path/'config.json').write_text(c.model_dump_json())
    assert own_options(tmp_path) == {}
    (tmp_path/'config.json').write_text(c.model_copy(update={'lr': .1}).model_dump_json())
    assert own_options(tmp_path) == {'lr': .1}


def line(image, cost):
    return JournalLine(image, identity='A man.', clothing='A coat.', cost=cost, status='ok')


def test_a_whole_line_that_is_broken_is_not_thrown_away(tmp_path):
    path = tmp_path/'d.jsonl'
    with Journal(path, ['a', 'b']) as journal:
        journal.append(line('a', .5))
        journal.append(line('b', .5))
    broken = path.read_bytes().replace(b'A coat."', b'A "red" coat."', 2)
    for content in (broken, broken.split(b'\n', 1)[1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match='Remove the line'): Journal(path, ['a', 'b']).__enter__()
        assert path.read_bytes() == content


def test_an_answer_that_cannot_be_written_is_not_forgotten(tmp_path, monkeypatch):
    path = tmp_path/'d.jsonl'
    with Journal(path, ['a', 'b']) as journal:
        journal.append(line('a', .5))
        def full(data): raise OSError(errno.ENOSPC, 'No space left on device')
        monkeypatch.setattr(journal._file, 'append', full)
        with pytest.raises(UserError, match='Make room'): journal.append(line('b', .25))
    with Journal(path, ['a', 'b']) as journal: assert journal.cost == .75


def test_half_a_utf16_pair_in_an_answer():
    message = {'content': 'A PERSON \ud83d in ITEM.'}
    reply = read_reply({'choices': [{'message': message, 'finish_reason': 'stop'}]})
    assert reply.text.encode() and 'in ITEM' in reply.text
    history = History()
    history.reject('twice: \ud83d')
    assert history.reason.encode()


@pytest.fixture
def batches(tmp_path):
    "A run in batches whose provider notes what is deleted."
    (tmp_path/'imgs').mkdir()
    Image.new('RGB', (16, 32)).save(tmp_path/'secret.png')
    (tmp_path/'imgs'/'link.png').symlink_to(tmp_path/'secret.png')
    deleted = []
    async def delete(name): deleted.append(name)
    async def nothing(limit):
        for batch in (): yield batch
    client = SimpleNamespace(api_key='k', files=SimpleNamespace(delete=delete),
                             batches=SimpleNamespace(list=nothing))
    s = BatchSettings(model='m', images_dir=tmp_path/'imgs', prices=(1e6, 1e6))
    with Journal(tmp_path/'d.jsonl', ['link.png', 'b.png']) as journal:
        run = start_run(client, journal, s.online())
        b = BatchRun(run, s, tmp_path/'d.jsonl', BatchState(asked=[], started='x'))
        b.deleted = deleted
        yield b


def test_a_link_that_leaves_the_folder_is_not_sent_and_its_money_is_booked(batches):
    batches.state.history['link.png'] = History(tries=1, prompt_tokens=3, completion_tokens=2)
    assert batch_line(batches, 'link.png') == (None, 0.)
    kept = json.loads((batches.out).read_text())
    assert (kept['status'], kept['cost']) == ('failed', 5.) and 'cannot be read' in kept['reason']
    assert batches.state.history == {}


def test_an_upload_without_a_batch_is_deleted(batches):
    batches.state.parts = [BatchPart(name='x-0', images=['b.png'], input_file_id='file-1')]
    asyncio.run(find_lost_batches(batches))
    assert (batches.deleted, batches.state.parts) == (['file-1'], [])


def test_one_seed_gives_no_verdict_on_the_balance():
    rng = np.random.default_rng(0)
    tensors = dict(w=np.stack([.5 + .05*rng.standard_normal(400)]*2, 1), q_pids=np.repeat(np.arange(100), 4))
    e = SimpleNamespace(feature_folders=lambda *_: ['run'], tensors=lambda _: tensors, root=None)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(claims, 'folder_source', lambda *_: {})
        assert {f.verdict for f in claims.balance_claim(e)} == {ONE_SEED}


def test_people_elsewhere_change_clothes_as_at_home():
    c = make_config('synth', 'tiny', synth_outfits=2)
    s = spec_of(c, False)
    assert s.outfits == 2 and spec_of(c, True).outfits == 1
    clothes = dict(clothes_change=s.clothes_change, outfits=s.outfits)
    for k in range(4):
        home, away = image_factors(0, 5, k, **clothes), elsewhere_factors(0, 5, k, **clothes)
        for name in ('outfit', 'upper_color'): assert home[name] == away[name]
    same = spec_of(make_config('synth', 'tiny'), False)                    # one outfit each
    assert captions_elsewhere(s, 5, 1) != captions_elsewhere(same, 5, 1)


def test_a_dataset_that_is_still_drawn_is_left_alone(tmp_path):
    for name, age in (('alive', 10), ('dead', 7200)):
        folder = tmp_path/f'.Synth.{name}.tmp'
        folder.mkdir()
        (folder/'part0.jsonl').write_text('')
        os.utime(folder/'part0.jsonl', (time.time() - age,)*2)
        os.utime(folder, (time.time() - 7200,)*2)
    synth._remove_leftovers(tmp_path/'Synth')
    assert [p.name for p in tmp_path.iterdir()] == ['.Synth.alive.tmp']


# ---- training

def smoke(**options): return make_config('synth', 'smoke', **options)


def test_runs_of_other_people_share_no_dataset(tmp_path):
    shared = SharedData()
    few, all_ = (shared.of(smoke(data_root=str(tmp_path), limit=n)) for n in (2, 0))
    assert len(few.records) < len(all_.records)
    for ds in (few, all_):                                  # and neither their pictures
        rows = np.concatenate([rows.numpy() for rows, _ in image_batches(ds, (16, 8), split='train')])
        assert len(rows) == (ds.records['split'] == 'train').sum()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_dual_is_float32_under_autocast(dtype):
    g = torch.Generator().manual_seed(0)
    t, v = torch.randn(3, 16, generator=g), torch.randn(4, 16, generator=g)
    q = TextFeatures(t, t[:, None], torch.ones(3, 1, dtype=torch.bool))
    f = ImageFeatures(v, v, v, v, v[:, None])
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.bfloat16): found = dual(q, f)
    assert found.dtype == torch.float32 and torch.equal(found, dual(q, f))


@pytest.mark.parametrize('options', [dict(rerank_weight=0., fusion_negatives=15),
                                     dict(fusion_loss='triplet', accumulate=16)], ids=str)
def test_a_step_is_finite(tmp_path, options):
    c = smoke(data_root=str(tmp_path), device='cpu', **options)
    trainer = prepare(c, tmp_path/'run', progress=False).trainer
    trainer.train_step(next(iter(trainer.loader)))
    trainer.log.read()
    assert np.isfinite(list(trainer.log.sums.values())).all()


def test_a_batch_that_does_not_split(tmp_path):
    trainer = prepare(smoke(data_root=str(tmp_path), device='cpu'), tmp_path/'run', progress=False).trainer
    batch = next(iter(trainer.loader))
    assert sum(map(len, parts_of(batch, 4))) == len(batch) == 16
    for n in (5, 32):
        with pytest.raises(UserError, match='equal parts'): parts_of(batch, n)


def test_a_step_that_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    trainer = prepare(smoke(data_root=str(tmp_path), device='cpu'), tmp_path/'run', progress=False).trainer
    static = trainer.static_step()
    static.load(0)
    def full(*_, **__): raise torch.OutOfMemoryError('no memory')
    monkeypatch.setattr(capture, 'batch_losses', full)
    with pytest.raises(torch.OutOfMemoryError): static.forward()
    assert not trainer.model.fixed
    assert 'dropout' in capture.why_not_static(smoke(dropout=.1), trainer.loader, torch.device('cuda'))


def test_seconds_are_those_of_all_parts(tmp_path, monkeypatch):
    "Three interruptions in one epoch: no second is counted twice."
    c, now = smoke(data_root=str(tmp_path), device='cpu', save_steps=1, epochs=2), [0.]
    def tick():
        now[0] += 1.
        return now[0]
    for module in (runs, trainer_module): monkeypatch.setattr(module.time, 'perf_counter', tick)
    def steps(n):
        training = prepare(c, tmp_path/'run', progress=False)
        runs.resume(training, progress=False)
        class Enough(Exception): pass
        left = [n]
        def after():
            save_checkpoint(tmp_path/'run'/'last.ckpt', training.trainer, training.state)
            left[0] -= 1
            if not left[0]: raise Enough
        with runs.progress_bar(training, False) as bar:
            try: runs.one_epoch(training, bar, after)
            except Enough: pass
        return training
    parts = [steps(1).trainer.log.seconds for _ in range(3)]
    assert parts == sorted(parts)
    done = steps(100)
    assert done.state.epoch == 1 and done.state.seconds >= parts[-1]
    assert done.state.seconds < now[0]


def test_a_signal_reaches_the_processes_and_is_waited_for(tmp_path):
    "SIGTERM to who started them: all save, the slow one too, then it ends of SIGTERM."
    child = tmp_path/'child.py'
    child.write_text('import os, pathlib, signal, sys, time\n'
                     'def end(*_):\n'
                     '    time.sleep(2*(os.environ["RANK"] == "0"))\n'
                     f'    pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text("saved")\n'
                     '    sys.exit(1)\n'
                     'signal.signal(signal.SIGTERM, end)\n'
                     f'pathlib.Path({str(tmp_path)!r}, os.environ["RANK"] + ".ready").touch()\n'
                     'time.sleep(60)\n')
    start = ('import sys; from bdam_repro.launch import start_processes; '
             f'start_processes([sys.executable, {str(child)!r}], 2)')
    parent = subprocess.Popen([sys.executable, '-c', start])
    ready = [tmp_path/f'{rank}.ready' for rank in '01']
    while not all(file.exists() for file in ready) and parent.poll() is None: time.sleep(.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == -signal.SIGTERM
    assert [(tmp_path/rank).read_text() for rank in '01'] == ['saved']*2


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    "Who starts processes is killed: each gets SIGTERM, so that it saves."
    child = ('import pathlib, signal, sys, threading, time\n'
             'from bdam_repro.launch import end_with_parent\n'
             f'def end(*_): pathlib.Path({str(tmp_path/"saved")!r}).write_text("saved"); sys.exit()\n'
             'signal.signal(signal.SIGTERM, end)\n'
             'threading.Thread(target=end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()\n'
             'print("ready", flush=True)\n'
             'time.sleep(60)\n')
    start = ('import os, subprocess, sys\n'
             f'subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())]).wait()\n')
    parent = subprocess.Popen([sys.executable, '-c', start], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == 'ready\n'
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while not (tmp_path/'saved').exists() and time.monotonic() < until: time.sleep(.1)
    assert (tmp_path/'saved').exists()
