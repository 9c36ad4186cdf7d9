"""Our metrics against a full argsort, at the size of CUHK-PEDES's test split, alternated in one run.

    python benchmarks/bench_metrics.py [--dim 512] [--rounds 5] [--threads 1]

The rival is the usual evaluation of text-to-image person retrieval, written here after IRRA's: all
similarities in
float32, an argsort of each row, cumulated matches. Each side lives in a process of its own, so that its peak
memory is its own.
(torchmetrics is no rival here: its retrieval metrics group predictions by query in a Python loop, one query
at a time.)
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bdam_repro.metrics import retrieval_metrics

Q, G, IDS = 6156, 3074, 1000


def features(dim):
    rng = torch.Generator().manual_seed(0)
    g_pids = torch.cat([torch.arange(IDS), torch.randint(0, IDS, (G - IDS,), generator=rng)])
    q_pids = g_pids.repeat(3)[:Q]
    center = torch.randn(IDS, dim, generator=rng)
    noisy = lambda pids, noise: center[pids] + noise*torch.randn(len(pids), dim, generator=rng)
    return noisy(q_pids, 3.5), noisy(g_pids, 3.5), q_pids, g_pids


def by_argsort(q, g, q_pids, g_pids):
    q, g = torch.nn.functional.normalize(q), torch.nn.functional.normalize(g)
    order = torch.argsort(q @ g.T, dim=1, descending=True)
    matches = g_pids[order].eq(q_pids.view(-1, 1))
    cmc = matches[:, :10].cumsum(1).clamp(max=1).float().mean(0)
    matches_so_far, total = matches.cumsum(1), matches.sum(1).float()
    last = G - 1 - matches.flip(1).int().argmax(1)
    precision = matches_so_far / torch.arange(1, G + 1)
    ap = (precision*matches).sum(1) / total
    values = dict(R1=cmc[0], R5=cmc[4], R10=cmc[9], mAP=ap.mean(), mINP=(total/(last + 1)).mean())
    return {k: 100*float(v) for k, v in values.items()}


def resident(field):
    "Memory of this process in MB: now (VmRSS) or at its peak (VmHWM)."
    status = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1])/1024 for line in status if line.startswith(field))


def serve(side, dim, threads):
    """One side: each line read is one evaluation; the answer is its seconds, its peak memory above the
    features, its values."""
    torch.set_num_threads(threads)
    data = features(dim)
    evaluate = {'ours': retrieval_metrics, 'argsort': by_argsort}[side]
    for _ in sys.stdin:
        # Linux: the peak starts again from here
        Path('/proc/self/clear_refs').write_text('5')
        before, start = resident('VmRSS'), time.perf_counter()
        values = evaluate(*data)
        print(json.dumps([time.perf_counter() - start, resident('VmHWM') - before, values]), flush=True)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dim', type=int, default=512); a.add_argument('--rounds', type=int, default=5)
    a.add_argument('--threads', type=int, default=1)
    a.add_argument('--side', choices=['ours', 'argsort'], help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.side: return serve(a.side, a.dim, a.threads)
    command = [sys.executable, __file__, '--dim', str(a.dim), '--threads', str(a.threads), '--side']
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sides = {s: subprocess.Popen([*command, s], **pipe) for s in ('ours', 'argsort')}
    results = {s: [] for s in sides}
    for _ in range(a.rounds):
        for s, p in sides.items():
            p.stdin.write('\n'); p.stdin.flush()
            results[s].append(json.loads(p.stdout.readline()))
    for p in sides.values(): p.stdin.close(); p.wait()
    print(f'{Q} queries × {G} images, {a.dim} dimensions, {a.threads} thread(s), median of {a.rounds} '
          f'alternated rounds')
    seconds = {s: statistics.median(x[0] for x in r) for s, r in results.items()}
    memory = {s: max(x[1] for x in r) for s, r in results.items()}
    for s, r in results.items():
        print(f'{s:8} {seconds[s]:6.2f} s {memory[s]:7.0f} MB   ' + '  '.join(
            f'{k} {v:.4f}' for k, v in r[0][2].items()))
    print(f'argsort / ours: time ×{seconds["argsort"]/seconds["ours"]:.1f}, peak memory '
          f'×{memory["argsort"]/memory["ours"]:.1f}')


if __name__ == '__main__': main()
