"""A training step of `tiny` on a CPU: both towers in one thread, two threads inside each operation, a thread for each tower.

    python benchmarks/bench_step.py [--variant full] [--steps 20] [--rounds 3]

Draws a small SynthPEDES into a temporary folder; prints milliseconds a step and the ratio to one thread.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bdam_repro.config import make_config
from bdam_repro.model import SecondThread
from bdam_repro.training import prepare

WAYS = {'one thread': (1, False), 'two threads in each operation': (2, False), 'a thread for each tower': (1, True)}


def seconds(trainer, batches, threads: int, second: bool) -> float:
    "A step, on average over the batches."
    torch.set_num_threads(threads)
    trainer.model.second = SecondThread() if second else None
    trainer.train_step(batches[0])
    start = time.perf_counter()
    for batch in batches: trainer.train_step(batch)
    return (time.perf_counter() - start)/len(batches)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--variant', default='full')
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--rounds', type=int, default=3)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        c = make_config('synth', 'tiny', a.variant, data_root=folder, synth_train_ids=200, synth_val_ids=4, synth_test_ids=4)
        trainer = prepare(c, Path(folder)/'run', False)[2]
        batches = [batch for _ in range(-(-a.steps//len(trainer.loader))) for batch in trainer.loader][:a.steps]
        times = {name: [] for name in WAYS}
        for _ in tqdm(range(a.rounds), 'rounds'):
            for name, way in WAYS.items(): times[name].append(seconds(trainer, batches, *way))
    base = statistics.median(times['one thread'])
    print(f'{a.variant}, batch of {len(batches[0])} images, median of {a.rounds} rounds of {a.steps} steps')
    for name, t in times.items(): print(f'{name:30} {1e3*statistics.median(t):6.0f} ms   {base/statistics.median(t):.2f}x')


if __name__ == '__main__': main()
