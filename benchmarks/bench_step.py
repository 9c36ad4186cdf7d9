"""A training step of `tiny` on a CPU: both towers in one thread, two threads inside each operation, a thread
for each tower.
And the optimizer's part of it, beside `torch.optim.Muon` on the same matrices.

    python benchmarks/bench_step.py [--variant full] [--steps 20] [--rounds 3]

Draws a small SynthPEDES into a temporary folder; prints milliseconds a step and ratios.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bdam_repro.config import make_config
from bdam_repro.optimizers import Muon
from bdam_repro.runs import prepare
from bdam_repro.threads import SecondThread

WAYS = {'one thread': (1, False), 'two threads in each operation': (2, False),
        'a thread for each tower': (1, True)}


def seconds(trainer, batches, threads: int, second: bool) -> float:
    "A step, on average over the batches."
    torch.set_num_threads(threads)
    trainer.model.second = SecondThread() if second else None
    trainer.train_step(batches[0])
    start = time.perf_counter()
    for batch in batches: trainer.train_step(batch)
    return (time.perf_counter() - start)/len(batches)


def optimizers(trainer, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step on the matrices of the model, by its own Muon and by PyTorch's; gradients are those
    of the last step."""
    torch.set_num_threads(1)
    matrices = [p for opt in trainer.opts if isinstance(opt, Muon) for g in opt.param_groups
                for p in g['params'] if p.ndim == 2]
    rivals = {'ours, float32': Muon(matrices, lr=0., weight_decay=0.),
              'torch.optim.Muon': torch.optim.Muon(matrices, lr=0.)}
    times = {name: [] for name in rivals}
    for _ in range(rounds + 1):
        for name, opt in rivals.items():
            start = time.perf_counter()
            opt.step()
            times[name].append(time.perf_counter() - start)
    return {name: t[1:] for name, t in times.items()}      # the first makes the momentum


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--variant', default='full')
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--rounds', type=int, default=3)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        c = make_config('synth', 'tiny', a.variant, data_root=folder, synth_train_ids=200, synth_val_ids=4,
                        synth_test_ids=4)
        trainer = prepare(c, Path(folder)/'run', False).trainer
        batches = [batch for _ in range(-(-a.steps//len(trainer.loader)))
                   for batch in trainer.loader][:a.steps]
        times = {name: [] for name in WAYS}
        for _ in tqdm(range(a.rounds), 'rounds'):
            for name, way in WAYS.items(): times[name].append(seconds(trainer, batches, *way))
    base = statistics.median(times['one thread'])
    print(f'{a.variant}, batch of {len(batches[0])} images, median of {a.rounds} rounds of {a.steps} steps')
    for name, t in times.items():
        print(f'{name:30} {1e3*statistics.median(t):6.0f} ms   {base/statistics.median(t):.2f}x')
    times = {name: statistics.median(t) for name, t in optimizers(trainer, a.rounds).items()}
    for name, t in times.items(): print(f'{name:30} {1e3*t:6.0f} ms   {times["torch.optim.Muon"]/t:.2f}x')


if __name__ == '__main__': main()
