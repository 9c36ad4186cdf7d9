"""What a GPU does with this repository: correctness first, then speed and memory, in order of worth.

    python benchmarks/gpu.py [--minutes 4] [--sections correct,tiny,...] [--out tables/benchmarks_gpu.csv]
    python benchmarks/gpu.py --smoke            every section at toy sizes, on a CPU too

Every figure is a row of the CSV, written as it is measured, so that a run that is cut off loses nothing. A
section that fails prints why and the next one begins. Sections stop early when the minutes are used up. Those
that the CSV has no row of come first.
"""
import argparse
import csv
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from bdam_repro.batches import Batch
from bdam_repro.capture import StaticStep
from bdam_repro.config import ROOT, make_config
from bdam_repro.evaluate import evaluate
from bdam_repro.fusion import mixer_layers
from bdam_repro.mamba import mamba_ssm_kernels
from bdam_repro.model import build_model
from bdam_repro.run_data import load_data, run_tokenizer
from bdam_repro.runs import code_version, finished, train
from bdam_repro.trainer import LossLog, Trainer, compile_parts, run_batches, train_epoch

COLUMNS = ('section', 'what', 'value', 'unit', 'batch', 'precision', 'device', 'torch', 'detail', 'cuda',
           'code')


class Bench:
    "The rows, the clock and the sizes of one call."
    def __init__(self, out: Path, minutes: float, smoke: bool):
        self.out, self.smoke, self.deadline = out, smoke, time.perf_counter() + 60*minutes
        self.cuda = torch.cuda.is_available()
        self.device = torch.device('cuda' if self.cuda else 'cpu')
        self.name = torch.cuda.get_device_name() if self.cuda else 'CPU'
        self.start, self.section, self.code = time.perf_counter(), '', code_version()
        self.folder = Path(tempfile.mkdtemp())
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists(): out.write_text(','.join(COLUMNS) + '\n')

    def row(self, what: str, value: float, unit: str, batch: int | str = '', precision: str = 'float32',
            detail: str = '') -> None:
        "Write one figure and show it."
        value = float(f'{value:.5g}')
        row = (self.section, what, value, unit, batch, precision, self.name, torch.__version__, detail,
               torch.version.cuda or '', self.code)
        with self.out.open('a', newline='') as f: csv.writer(f).writerow(row)
        at = time.perf_counter() - self.start
        line = f'[{at:6.1f}] {self.section:8} {what:44} {value:>12g} {unit:10} {batch} {precision} {detail}'
        print(line, flush=True)

    def left(self) -> float: return self.deadline - time.perf_counter()     # seconds

    def wait(self) -> None:
        if self.cuda: torch.cuda.synchronize()

    def seconds(self, f, repeats: int, warm: int = 2) -> float:
        "The median time of a call, each one waited for."
        for _ in range(warm): f()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            f()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak(self, f) -> float:   # GiB; 0 on a CPU
        "The most memory that is held during a call: weights and optimizers too."
        if not self.cuda: f(); return 0.
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()/2**30


# ---- tests

def tests(bench: Bench) -> None:
    "The tests marked `cuda`: listed, run, counted."
    marked = [str(f) for f in sorted((ROOT/'tests').glob('test_*.py')) if 'mark.cuda' in f.read_text()]
    command = [sys.executable, '-m', 'pytest', '-m', 'cuda', *marked]
    listed = subprocess.run([*command, '--collect-only'], capture_output=True, text=True, cwd=ROOT)
    names = [line for line in listed.stdout.splitlines() if '.py::' in line]
    print(*names, sep='\n')
    bench.row('tests marked cuda: listed', len(names), 'tests')
    counts = dict.fromkeys(('PASSED', 'FAILED', 'ERROR', 'SKIPPED'), 0)
    said = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([*command, '-vv', '--durations=0'], cwd=ROOT, **said) as run:
        stop = threading.Timer(max(30, bench.left()), run.kill)
        stop.start()
        for line in run.stdout:                       # as they come: what is cut off has shown some
            print(line, end='', flush=True)
            for word in counts: counts[word] += f' {word} ' in line
        stop.cancel()
    for word, n in counts.items(): bench.row(f'tests marked cuda: {word.lower()}', n, 'tests')
    if run.returncode: raise RuntimeError(f'pytest ended with {run.returncode}')


def whole(bench: Bench) -> None:
    "Small runs from their data to their test, as the grid trains them: what fails late fails here."
    for variant in ('full', 'baseline'):
        c = make_config('synth', 'smoke', variant, data_root=str(bench.folder/'data'))
        start = time.perf_counter()
        folder = train(c, bench.folder/'runs', progress=False)
        assert finished(folder), folder
        bench.row(f'a run from start to test, {variant}', time.perf_counter() - start, 's', detail=c.preset)


def killed_run(c, runs: Path, step: int) -> None:
    "For a process of its own: a run that is killed once a step's losses are computed."
    note = LossLog.note
    def kill(log, now, *args):
        if now == step: os.kill(os.getpid(), signal.SIGKILL)
        note(log, now, *args)
    LossLog.note = kill
    train(c, runs, progress=False)


def resume(bench: Bench) -> None:
    "A run that was killed within an epoch and started again, against one that was not: the same bits?"
    ways = {'step by step': 'off'}
    if bench.cuda: ways['recorded'] = 'on'
    for name, graph in ways.items():
        c = make_config('synth', 'smoke', data_root=str(bench.folder/'data'), graph=graph, epochs=3,
                        save_steps=2, tag='resume')
        whole, again = bench.folder/f'whole-{graph}', bench.folder/f'killed-{graph}'
        process = multiprocessing.get_context('spawn').Process(target=killed_run, args=(c, again, 7))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        weights = [load_file(train(c, runs, progress=False)/'best.safetensors') for runs in (whole, again)]
        error = apart(*(list(w.values()) for w in weights))
        what, detail = f'weights of a killed run, {name}', 'killed at step 7'
        bench.row(what, error, 'relative', batch_of(c), detail=detail)


# ---- runs of `tiny`

def tiny_setup(folder: Path, smoke: bool, **options):
    "Configuration, dataset and tokenizer of a small SynthPEDES."
    sizes = dict(synth_train_ids=32 if smoke else 640, synth_val_ids=8 if smoke else 100,
                 synth_test_ids=8 if smoke else 10)
    options = dict(preset='smoke' if smoke else 'tiny', amp='off') | sizes | options
    c = make_config('synth', data_root=str(folder/'data'), folder='SynthPEDES-bench', epochs=20, **options)
    dataset = load_data(c, progress=False)
    return c, dataset, run_tokenizer(c, dataset, folder/'tokenizer')


def batch_of(c) -> int: return c.ids_per_batch*c.images_per_id             # images


def tiny_trainer(c, dataset, tokenizer, device, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    model = build_model(c, len(tokenizer))
    return Trainer(c, model, run_batches(c, dataset, tokenizer), device)


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    "‖a − b‖/‖b‖ over all tensors."
    a, b = (torch.cat([x.detach().double().cpu().flatten() for x in xs]) for xs in (a, b))
    return float((a - b).norm()/b.norm())


def correct(bench: Bench) -> None:
    "The GPU against the CPU: losses, gradients, steps; a recorded step against the same step unrecorded."
    c, dataset, tokenizer = tiny_setup(bench.folder, bench.smoke, gradnorm_every=3)
    cpu = torch.device('cpu')
    devices = {'CPU': cpu, 'GPU': bench.device}
    trainers = {name: tiny_trainer(c, dataset, tokenizer, device) for name, device in devices.items()}
    batch, found = next(iter(trainers['CPU'].loader)), {}
    for name, trainer in trainers.items():
        terms = trainer.losses(batch.to(trainer.device))
        sum(terms.values()).backward()
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        found[name] = torch.stack(list(terms.values())), grads
        trainer.model.zero_grad()
    bench.row('losses, GPU against CPU', apart([found['GPU'][0]], [found['CPU'][0]]), 'relative', len(batch))
    bench.row('gradients, GPU against CPU', apart(found['GPU'][1], found['CPU'][1]), 'relative', len(batch))

    steps = {'CPU': trainers['CPU'], 'eager': trainers['GPU'], 'fixed shapes': None, 'graph': None}
    losses = {}
    for name in steps:
        trainer = steps[name] or tiny_trainer(c, dataset, tokenizer, bench.device)
        if name == 'graph' and bench.cuda:
            trainer.static = trainer.static_step()
            trainer.static.capture()
        elif name in ('fixed shapes', 'graph'): trainer.static = trainer.static_step()
        rows = [train_epoch(trainer, epoch, tqdm(disable=True)) for epoch in range(1)]
        losses[name] = torch.tensor([[row[f'loss_{k}'] for k in trainer.names] for row in rows])
        if name == 'graph': kept = trainer
    for name in ('eager', 'fixed shapes', 'graph'):
        detail = f'mean losses of {len(kept.loader)} steps'
        error = apart([losses[name]], [losses['CPU']])
        bench.row(f'an epoch, GPU {name} against CPU', error, 'relative', len(batch), detail=detail)
    again = [p.detach().clone() for p in kept.model.parameters()]
    other = tiny_trainer(c, dataset, tokenizer, bench.device)
    other.static = other.static_step()
    if bench.cuda: other.static.capture()
    train_epoch(other, 0, tqdm(disable=True))
    error = apart(list(other.model.parameters()), again)
    bench.row('weights of two equal recorded runs', error, 'relative', len(batch))


def graph_runs(setup, device, n: int, capture: bool) -> list[Trainer]:
    "Trainers with recorded steps."
    trainers = []
    for seed in range(n):
        trainer = tiny_trainer(*setup, device, seed)
        trainer.static = trainer.static_step()
        if capture: trainer.static.capture()
        trainers.append(trainer)
    return trainers


def at_once(trainers: list[Trainer], epochs: int) -> float:
    "Images per second of several runs in one process, a thread and a stream each."
    def work(trainer):
        for epoch in range(epochs): trainer.static.run(epoch)
    threads = [threading.Thread(target=work, args=(trainer,)) for trainer in trainers]
    start = time.perf_counter()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    images = epochs*sum(t.static.data.plan['images'].numel() for t in trainers)
    return images/(time.perf_counter() - start)


def top_kernels(run, steps: int, bench: Bench, batch: int | str = '', precision: str = 'float32') -> None:
    "Kernels of the steps that `run` takes: how many a step, their time, the longest."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        run()
        torch.cuda.synchronize()
    times = {}
    for event in p.events():
        if 'Mem' in event.name[:4]: continue
        count, total = times.get(event.name, (0, 0.))
        times[event.name] = count + 1, total + event.device_time
    count, total = sum(n for n, _ in times.values()), sum(t for _, t in times.values())
    bench.row('kernels per step', count/steps, 'kernels', batch, precision)
    bench.row('time in kernels per step', total/steps/1000, 'ms', batch, precision)
    for name, (n, t) in sorted(times.items(), key=lambda x: -x[1][1])[:30]:
        print(f'    {n/steps:7.1f} a step {t/steps:8.1f} us a step {t/n:6.1f} us each  {name[:110]}')


def tiny(bench: Bench) -> None:
    "`tiny`: one step after the other against recorded steps; several runs at once."
    setup = tiny_setup(bench.folder, bench.smoke)
    c = setup[0]
    trainer = tiny_trainer(*setup, bench.device)
    batch = next(iter(trainer.loader)).to(bench.device)
    n = len(batch)
    bench.row('eager', n/bench.seconds(lambda: trainer.train_step(batch), 5), 'images/s', n)
    start = time.perf_counter()
    runs = graph_runs(setup, bench.device, 1, bench.cuda)
    bench.row('to build and record a run', time.perf_counter() - start, 's', n)
    runs[0].static.run(0)
    bench.row('recorded', at_once(runs, 1 if bench.smoke else 4), 'images/s', n)
    if bench.cuda: top_kernels(partial(runs[0].static.run, 1), len(runs[0].loader), bench, n)
    start = time.perf_counter()
    evaluate(runs[0].model, setup[1], setup[2], 'val', runs[0].amp())
    bench.row('evaluate', time.perf_counter() - start, 's', detail=f'{c.synth_val_ids} people')
    start = time.perf_counter()
    evaluate(runs[0].model, setup[1], setup[2], 'val', runs[0].amp())
    bench.row('evaluate again', time.perf_counter() - start, 's', detail=f'{c.synth_val_ids} people')
    for threads in (2,) if bench.smoke else (2, 4, 8):
        if bench.left() < 20: return
        runs += graph_runs(setup, bench.device, threads - len(runs), bench.cuda)
        speed = at_once(runs, 1 if bench.smoke else 3)
        bench.row(f'recorded, {threads} runs in threads', speed, 'images/s', n)


def tiny_compiled(bench: Bench) -> None:
    "One recorded run of `tiny`, its encoders and BDAM compiled beforehand."
    setup = tiny_setup(bench.folder, bench.smoke)
    plain, trainer = (tiny_trainer(*setup, bench.device) for _ in range(2))
    plain.static = plain.static_step()
    if bench.cuda: plain.static.capture()
    backend, start = 'eager' if bench.smoke else 'inductor', time.perf_counter()
    compile_parts(trainer.model, dynamic=False, backend=backend)
    trainer.static = trainer.static_step()
    if bench.cuda: trainer.static.capture()
    else: trainer.static.run(0)
    n = batch_of(setup[0])
    bench.row('to compile and record a run', time.perf_counter() - start, 's', n)
    for name, one in (('recorded', plain), ('recorded, compiled', trainer)):
        one.static.run(0)
        bench.row(name, at_once([one], 1 if bench.smoke else 4), 'images/s', n)
    if bench.cuda: top_kernels(partial(trainer.static.run, 1), len(trainer.loader), bench, n)


def tiny_process(folder: Path, smoke: bool, ready, results) -> None:
    "One of several processes: a recorded run, alone in its process; then two more beside it."
    warnings.filterwarnings('ignore')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    setup = tiny_setup(folder, smoke)
    runs = graph_runs(setup, device, 3, device.type == 'cuda')
    at_once(runs, 1)
    for n in (1, 3):
        ready.wait()
        results.put((n, at_once(runs[:n], 1 if smoke else 4)))


def processes(bench: Bench) -> None:
    "Several processes on one card."
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    for count in (2,) if bench.smoke else (8,):
        context = multiprocessing.get_context('spawn')
        ready, results = context.Barrier(count), context.Queue()
        args = bench.folder, bench.smoke, ready, results
        pool = [context.Process(target=tiny_process, args=args) for _ in range(count)]
        c, *_ = tiny_setup(bench.folder, bench.smoke)
        for p in pool: p.start()
        speeds = {1: [], 3: []}
        for _ in range(2*count):
            n, speed = results.get(timeout=max(30, bench.left()))
            speeds[n].append(speed)
        for p in pool: p.join()
        for n, each in speeds.items():
            bench.row(f'recorded, {count} processes of {n} runs', sum(each), 'images/s', batch_of(c))


# ---- the paper's sizes

BASE = dict(hidden=768, layers=12, heads=12)
TOY = dict(hidden=32, layers=2, heads=2)


def paper_config(smoke: bool, **options):
    "The `paper` preset with random weights of the real sizes."
    size = TOY if smoke else BASE
    toy = dict(image_height=32, image_width=32, dim=32, bdam_depth=2, bdam_heads=2, fusion_dim=16)
    small = toy if smoke else {}
    towers = dict(vision={'type': 'vit', 'patch': 16, **size}, text={'type': 'bert', **size})
    own = dict(towers, graph='off', workers=0, vocab_size=30522)
    return make_config('synth', 'paper', **(own | small | options))


class Made:
    "A loader of one made batch: noise for pixels, words of a caption's length."
    def __init__(self, c, n: int, described: bool = True):
        g = torch.Generator().manual_seed(0)
        def texts():
            ids = torch.randint(5, 30000, (n, c.max_length), generator=g)
            lengths = torch.randint(20, 60, (n, 1), generator=g)
            mask = torch.arange(c.max_length) < lengths
            return (ids*mask)[:, :60], mask[:, :60]
        images = torch.randint(256, (n, 3, c.image_height, c.image_width), generator=g, dtype=torch.uint8)
        names = ('caption', 'id', 'clo') if described else ('caption',)
        fields = {}
        for name in names: fields[f'{name}_ids'], fields[f'{name}_mask'] = texts()
        pids = torch.arange(n)//c.images_per_id
        self.batch = Batch(torch.arange(n), pids, images, **fields)

    def __len__(self) -> int: return 100
    def __iter__(self): return iter([self.batch])
    def set_epoch(self, epoch: int) -> None: ...
    def files(self, rows: Tensor) -> list[str]: return [f'image {row}' for row in rows.tolist()]


class OneBatch:
    "What a recorded step reads, with the same batch every time."
    def __init__(self, loader: Made, device):
        self.loader, self.device, self.now = loader, device, loader.batch.to(device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)

    def load(self, epoch: int, first: int = 0) -> None: self.at.fill_(first)
    def row(self, table: Tensor) -> Tensor: return table.index_select(0, self.at)[0]
    def batch(self) -> Batch: return self.now


def recorded(trainer: Trainer, bench: Bench):
    "A step of the trainer as a call, recorded where there is a GPU."
    t = trainer
    step = StaticStep(t.c, t.model, OneBatch(t.loader, t.device), t.opts, t.weights, t.rates, t.clip, t.amp)
    if bench.cuda: step.capture()
    step.load(0)
    def call():
        step.data.at.zero_()
        step.do('forward')
        step.balance()
        step.do('backward')
    return call


def paper_trainer(bench: Bench, n: int, **options) -> tuple[Trainer, Batch]:
    c = paper_config(bench.smoke, **options)
    torch.manual_seed(0)
    trainer = Trainer(c, build_model(c, 30522), Made(c, n), bench.device)
    return trainer, trainer.loader.batch.to(bench.device)


def ceiling(bench: Bench) -> float:   # FLOP/s
    "The matrix product of this card, bf16, on random data."
    n = 512 if bench.smoke else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in 'ab')
    rate = 2*n**3/bench.seconds(lambda: a @ b, 10, 3)
    bench.row(f'matrix product {n}³', rate/1e12, 'TFLOP/s', precision='bfloat16')
    return rate


def step_flops(trainer: Trainer, batch: Batch) -> float:
    "Floating-point operations of a step, as PyTorch counts them."
    with FlopCounterMode(display=False) as counter: trainer.train_step(batch)
    return counter.get_total_flops()


def paper(bench: Bench) -> None:
    "The `paper` preset: speed, memory, share of the matrix rate."
    rate, precision = ceiling(bench), 'bfloat16'
    repeats = 2 if bench.smoke else 6
    sizes, times, flops = (8,) if bench.smoke else (64, 128, 256), {}, None
    for n in sizes:
        if bench.left() < 20: return
        trainer, batch = paper_trainer(bench, n, amp='bf16')
        step = partial(trainer.train_step, batch)
        try:
            if flops is None: flops = step_flops(trainer, batch)/n
            memory = bench.peak(step)
            times[n] = bench.seconds(step, repeats, 1)
        except torch.cuda.OutOfMemoryError:
            bench.row('full: out of memory', n, 'images', n, precision)
            continue
        finally: del trainer, step
        share, detail = 100*flops*n/times[n]/rate, f'{flops/1e9:.0f} GFLOP/image'
        bench.row('full', n/times[n], 'images/s', n, precision)
        bench.row('full: peak memory', memory, 'GiB', n, precision)
        bench.row('full: MFU against the matrix product', share, '%', n, precision, detail)
        if bench.cuda: torch.cuda.empty_cache()
    for n in sizes:
        if bench.left() < 20: return
        trainer, batch = paper_trainer(bench, n, amp='bf16', dropout=0.)    # as a run that is recorded
        try:
            step = recorded(trainer, bench)
            t = bench.seconds(step, repeats, 1)
        except torch.cuda.OutOfMemoryError:
            bench.row('full, recorded: out of memory', n, 'images', n, precision)
            continue
        finally: del trainer
        bench.row('full, recorded', n/t, 'images/s', n, precision, 'dropout 0')
        bench.row('full, recorded: MFU', 100*flops*n/t/rate, '%', n, precision, 'dropout 0')
        del step
        if bench.cuda: torch.cuda.empty_cache()


def shares(bench: Bench) -> None:
    "What GradNorm and our parts cost over the bare towers: shares of a step of the full model."
    precision, n = 'bfloat16', 8 if bench.smoke else 64
    bare = dict(balance='fixed', c_triplet=0.)
    ways = {'full': {}, 'full, task weights fixed': dict(balance='fixed'),
            'bare towers, the same three texts': dict(variant='baseline_all_texts', **bare),
            'bare towers, caption and identity text': dict(variant='baseline_described', **bare),
            'bare towers, captions alone': dict(variant='baseline', **bare),
            'full, grad_checkpoint': dict(grad_checkpoint=True),
            'full, float32': dict(amp='off')}
    whole = None
    for name, options in ways.items():
        if bench.left() < 12: return
        trainer, batch = paper_trainer(bench, n, **dict(amp='bf16') | options)
        step = partial(trainer.train_step, batch)
        memory = bench.peak(step)
        every = trainer.c.gradnorm_every
        def steps(step=step, every=every):                     # one of them is with GradNorm
            for _ in range(every): step()
        t = bench.seconds(steps, 2 if bench.smoke else 3, 1)/every
        whole = whole or t
        used = 'float32' if 'float32' in name else precision
        bench.row(name, n/t, 'images/s', n, used, f'{t/whole:.3f} of the time of full')
        bench.row(f'{name}: peak memory', memory, 'GiB', n, used)
        if 'fixed' in name: bench.row('GradNorm, share of a step', 100*(1 - t/whole), '%', n, used)
        del trainer, step, steps
        if bench.cuda: torch.cuda.empty_cache()


def compiled(bench: Bench) -> None:
    "The same step by step with encoders and BDAM compiled, by batch."
    backend = 'eager' if bench.smoke else 'inductor'
    for n in (8,) if bench.smoke else (64, 128, 256):
        if bench.left() < (10 if bench.smoke else 90): return          # a compilation takes a minute
        trainer, batch = paper_trainer(bench, n, amp='bf16')
        step = partial(trainer.train_step, batch)
        plain = bench.seconds(step, 4, 2)
        start = time.perf_counter()
        compile_parts(trainer.model, dynamic=False, backend=backend)
        step()
        bench.wait()
        bench.row('to compile encoders and BDAM', time.perf_counter() - start, 's', n, 'bfloat16')
        t = bench.seconds(step, 6, 2)
        detail = f'{plain/t:.2f} times the plain speed'
        bench.row('full, encoders and BDAM compiled', n/t, 'images/s', n, 'bfloat16', detail)
        del trainer, step
        if bench.cuda: torch.cuda.empty_cache()


def agree(bench: Bench) -> None:
    "The `paper` preset on the GPU against the CPU in float32: losses and gradients of one batch."
    n = 4
    def found(device, amp):
        c = paper_config(bench.smoke, amp=amp, dropout=0.)
        torch.manual_seed(0)
        trainer = Trainer(c, build_model(c, 30522), Made(c, n), device)
        terms = trainer.losses(trainer.loader.batch.to(device))
        sum(terms.values()).backward()
        grads = [p.grad.cpu() for p in trainer.model.parameters() if p.grad is not None]
        return torch.stack(list(terms.values())).detach().cpu(), grads
    losses, grads = found(torch.device('cpu'), 'off')
    for amp, precision in {'off': 'float32', 'bf16': 'bfloat16'}.items():
        own = found(bench.device, amp)
        bench.row('losses, GPU against CPU', apart([own[0]], [losses]), 'relative', n, precision)
        bench.row('gradients, GPU against CPU', apart(own[1], grads), 'relative', n, precision)


def loading(bench: Bench) -> None:
    "How long steps of `paper` wait for batches of SynthPEDES: pictures in memory, and from their files."
    small, _, _ = tiny_setup(bench.folder, bench.smoke)
    same = 'folder', 'data_root', 'synth_train_ids', 'synth_val_ids', 'synth_test_ids'
    drawn = {k: getattr(small, k) for k in same}
    drawn |= dict(ids_per_batch=4 if bench.smoke else 32, amp='bf16')
    workers = 1 if bench.smoke else 8
    ways = {'pictures in memory': {},
            f'pictures from files, workers={workers}': dict(cache_gb=0., workers=workers)}
    for name, options in ways.items():
        if bench.left() < 30: return
        c = paper_config(bench.smoke, max_steps=4 if bench.smoke else 40, **drawn | options)
        dataset = load_data(c, progress=False)
        tokenizer = run_tokenizer(c, dataset, bench.folder/'tokenizer')
        batches = run_batches(c, dataset, tokenizer)
        trainer = Trainer(c, build_model(c, len(tokenizer)), batches, bench.device)
        row = train_epoch(trainer, 0, tqdm(disable=True))
        bench.row(f'full, {name}', row['images_per_s'], 'images/s', batch_of(c), 'bfloat16')
        share = 100*row['wait_share']
        bench.row(f'loader, share of the time, {name}', share, '%', batch_of(c), 'bfloat16')


def levers(bench: Bench) -> None:
    "What a step of `paper` spends its time on, and what makes it faster."
    rate, precision = ceiling(bench), 'bfloat16'
    n, most = (8, 8) if bench.smoke else (128, 256)
    trainer, batch = paper_trainer(bench, n, amp='bf16')
    step = partial(trainer.train_step, batch)
    flops = step_flops(trainer, batch)/n

    def row(what, images, t):
        share = f'{100*flops*images/t/rate:.1f} % of the matrix product'
        bench.row(what, images/t, 'images/s', images, precision, share)
    row('full', n, bench.seconds(step, 3, 1))
    if bench.cuda: top_kernels(step, 1, bench, n, precision)
    torch.use_deterministic_algorithms(False)
    row('full, algorithms that are not deterministic', n, bench.seconds(step, 3, 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    del trainer, step
    if bench.cuda: torch.cuda.empty_cache()
    trainer, _ = paper_trainer(bench, most, amp='bf16', dropout=0.)        # as a run that is recorded
    model, backend = trainer.model, 'eager' if bench.smoke else 'inductor'
    compile_parts(model, dynamic=False, backend=backend)
    start = time.perf_counter()
    call = recorded(trainer, bench)
    bench.row('to compile and record', time.perf_counter() - start, 's', most, precision)
    row('full, encoders and BDAM compiled, recorded', most, bench.seconds(call, 4, 1))
    if bench.cuda: top_kernels(call, 1, bench, most, precision)


# ---- Mamba

def mamba(bench: Bench) -> None:
    "A layer of Mamba and of a Transformer, forward and backward, against the length."
    dim, lengths = (32, (64, 128)) if bench.smoke else (256, (64, 256, 1024, 4096, 16384))
    layers = {'Mamba, 2 layers': ('mamba', 2), 'Transformer, 1 layer': ('transformer', 1),
              'Transformer, 2 layers': ('transformer', 2), 'Transformer, 4 layers': ('transformer', 4)}
    kernel = 'mamba-ssm' if bench.cuda and mamba_ssm_kernels() else 'plain PyTorch'
    times = {}
    for L in lengths:
        for name, (kind, count) in layers.items():
            if bench.left() < 10: return
            torch.manual_seed(0)
            stack = nn.Sequential(*mixer_layers(kind, count, dim, 0., 16, 4, 4)).to(bench.device)
            n = 8
            x = torch.randn(n, L, dim, device=bench.device, requires_grad=True)
            def step(stack=stack, x=x):
                with torch.autocast(bench.device.type, torch.bfloat16): y = stack(x)
                y.float().square().mean().backward()
                stack.zero_grad()
                x.grad = None
            memory = bench.peak(step)
            t = times[name, L] = bench.seconds(step, 3, 1)
            detail = 'scaled_dot_product_attention' if kind == 'transformer' else kernel
            if bench.cuda and detail == 'plain PyTorch': detail += ', chunks of √(L/2)'     # were of 16 once
            bench.row(f'{name}, {L} tokens', 1000*t, 'ms', n, 'bfloat16', detail)
            bench.row(f'{name}, {L} tokens: peak memory', memory, 'GiB', n, 'bfloat16', detail)
    for name in layers:
        a, b = lengths[-2:] if bench.smoke else (1024, 16384)
        slope = torch.tensor(times[name, b]/times[name, a]).log()/torch.tensor(b/a).log()
        detail = f'{a} to {b} tokens'
        bench.row(f'{name}: exponent of time in length', float(slope), '', 8, 'bfloat16', detail)


SECTIONS = dict(whole=whole, correct=correct, tests=tests, resume=resume, agree=agree, loading=loading,
                shares=shares, processes=processes, tiny_compiled=tiny_compiled, compiled=compiled,
                mamba=mamba, levers=levers, tiny=tiny, paper=paper)


def order_of_worth(out: Path) -> list[str]:
    "All sections: those that the file has no row of, then the others."
    seen = set()
    if out.exists():
        with out.open(newline='') as f: seen = {row['section'] for row in csv.DictReader(f)}
    return sorted(SECTIONS, key=lambda name: name in seen)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=4.)
    p.add_argument('--sections', help='by default all, those without a row in the file first')
    p.add_argument('--out', type=Path, default=Path('tables/benchmarks_gpu.csv'))
    p.add_argument('--smoke', action='store_true')
    a = p.parse_args()
    names = a.sections.split(',') if a.sections else order_of_worth(a.out)
    if unknown := set(names) - set(SECTIONS): p.error(f'no section {min(unknown)}: {", ".join(SECTIONS)}')
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=True)       # as a run does
    torch.utils.deterministic.fill_uninitialized_memory = False
    warnings.filterwarnings('ignore')
    bench = Bench(a.out, a.minutes, a.smoke)
    failed = []
    for name in names:
        bench.section = name
        if bench.left() < 10:
            print(f'no time left for {name}')
            continue
        try: SECTIONS[name](bench)
        except Exception:                # a section of its own: the others are still worth their time
            failed.append(name)
            traceback.print_exc()
        if bench.cuda: torch.cuda.empty_cache()
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
