"""Attention on a CPU: PyTorch's fused kernel against the plain products of `bdam.attend`, forward and
backward.

    python benchmarks/bench_attention.py [--batch 64] [--heads 4] [--width 32] [--lengths 32 96 196]
    [--threads 1] [--rounds 7]

The two take turns, each round a forward and a backward pass on the same tensors. What counts is the median
of the rounds, in
seconds of the process's own clock, so that a machine busy with other work adds little. The ratio is fused /
plain: above 1 the
plain products are faster.
"""
import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from bdam_repro.bdam import attend

KERNELS = {'plain': attend, 'fused': F.scaled_dot_product_attention}


def measure(kernel, q, k, v, dy):
    "Seconds of a forward and of a backward pass."
    start = time.process_time()
    y = kernel(q, k, v)
    middle = time.process_time()
    torch.autograd.grad(y, (q, k, v), dy)
    return middle - start, time.process_time() - middle


def compare(batch, heads, length, width, dtype, rounds):
    "Kernel -> median seconds (forward, backward); the two must agree."
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, width, dtype=dtype, requires_grad=True) for _ in range(3))
    dy = torch.randn_like(q)
    found = {name: [] for name in KERNELS}
    for _ in range(rounds + 1):
        for name, kernel in KERNELS.items(): found[name].append(measure(kernel, q, k, v, dy))
    torch.testing.assert_close(*(f(q, k, v) for f in KERNELS.values()), rtol=.05, atol=.05
                               if dtype == torch.bfloat16 else 1e-4)
    # the first round warms up
    return {name: [statistics.median(t) for t in zip(*times[1:])] for name, times in found.items()}


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--batch', type=int, default=64); a.add_argument('--heads', type=int, default=4)
    a.add_argument('--width', type=int, default=32, help='of a head')
    a.add_argument('--lengths', type=int, nargs='+', default=[32, 96, 196])
    a.add_argument('--threads', type=int, default=1); a.add_argument('--rounds', type=int, default=7)
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    print(f'batch {a.batch}, {a.heads} heads of {a.width}, {a.threads} thread(s), median of {a.rounds} '
          f'rounds in turns; '
          f'bf16 {"native" if native else "emulated"} on this CPU; ms')
    print('dtype    length   plain: forward backward    fused: forward backward    fused / plain: forward '
          'backward together')
    for dtype in (torch.float32, torch.bfloat16):
        for length in a.lengths:
            (pf, pb), (ff, fb) = compare(a.batch, a.heads, length, a.width, dtype, a.rounds).values()
            print(f'{str(dtype).removeprefix("torch."):8} {length:6} {1e3*pf:16.1f} {1e3*pb:8.1f} '
                  f'{1e3*ff:17.1f} {1e3*fb:8.1f} '
                  f'{ff/pf:23.2f} {fb/pb:8.2f} {(ff + fb)/(pf + pb):8.2f}', flush=True)


if __name__ == '__main__': main()
