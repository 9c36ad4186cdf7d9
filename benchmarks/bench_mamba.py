"""Mamba on a CPU against mambapy: two layers with residuals, forward and backward.

    python benchmarks/bench_mamba.py [--batch 64] [--lengths 66 197 261] [--threads 1] [--rounds 2]

Each measurement runs in a fresh process (its peak memory is then its own) and the two take turns, so that a
machine
busy with other work slows both. Prints the best time of each, the peak memory beyond model and input, and
the ratios.
Where mambapy would not fit into the free memory, both take the largest halved batch that does (the column
`batch` tells),
and a second line has ours at the full batch.
"""
import argparse
import resource
import subprocess
import sys
import time

# per token, two layers of 256: what it takes, to choose a batch that fits
MAMBAPY_BYTES = 18e9 / (64 * 261)


def available() -> float:
    "Bytes that can be taken without swapping."
    with open('/proc/meminfo') as f:
        return next(1024. * int(line.split()[1]) for line in f if line.startswith('MemAvailable'))


def make_block(peer: str, d_model: int):
    "One block of ours or of mambapy's; they start from the same weights under the same seed."
    if peer == 'ours':
        from bdam_repro.mamba import Mamba
        return Mamba(d_model, backend='torch')
    from mambapy.mamba import MambaBlock, MambaConfig
    return MambaBlock(MambaConfig(d_model=d_model, n_layers=1))


def measure(peer: str, batch: int, length: int, threads: int, repeats: int) -> None:
    "Print seconds, extra MiB and a checksum of the output, in a process of its own."
    import torch
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(make_block(peer, 256) for _ in range(2))
    x = torch.randn(batch, length, 256)

    def step(x):
        for m in layers: x = x + m(x)
        x.square().mean().backward()
        return x.detach().norm().item()

    step(x[:1])                                                    # loads the libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float('inf')
    for _ in range(repeats):
        start = time.perf_counter()
        check = step(x)
        best = min(best, time.perf_counter() - start)
    print(best, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, check)


def run(peer: str, batch: int, length: int, threads: int, repeats: int) -> list[float]:
    "Measure in a fresh process: seconds, MiB, checksum."
    command = [sys.executable, __file__, '--measure', peer, str(batch), str(length), str(threads),
               str(repeats)]
    return [float(v) for v in subprocess.run(command, check=True, capture_output=True,
                                             text=True).stdout.split()]


def compare(batch: int, length: int, threads: int, rounds: int) -> str:
    "One row of the table: ours and mambapy, in turns."
    while MAMBAPY_BYTES * batch * length > .7 * available() and batch > 1: batch //= 2
    rows = {'ours': [], 'mambapy': []}
    for _ in range(rounds):
        for peer, found in rows.items(): found.append(run(peer, batch, length, threads, repeats=2))
    (t, m, c), (t_peer, m_peer, c_peer) = ([min(v) for v in zip(*found, strict=True)]
                                           for found in rows.values())
    assert abs(c - c_peer) < 1e-3 * c, 'the two do not compute the same'
    times = f'{t:9.2f} {t_peer:9.2f} {t_peer / t:7.1f}x'
    return f'{length:5d} {batch:6d} {times} {m:9.0f} {m_peer:9.0f}   1/{m_peer / m:.0f}'


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--lengths', type=int, nargs='+', default=[66, 197, 261])
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--ours-only', action='store_true', help='leave mambapy out')
    a = p.parse_args()
    print(f'2 layers, d_model 256, {a.threads} thread(s), forward + backward; s and MiB')
    if a.ours_only: print('    L  batch      ours      MiB')
    else: print('    L  batch      ours   mambapy    ratio      MiB       MiB  memory')
    for length in a.lengths:
        if not a.ours_only:
            print(compare(a.batch, length, a.threads, a.rounds), flush=True)
        if a.ours_only or a.batch * length * MAMBAPY_BYTES > .7 * available():
            t, m, _ = run('ours', a.batch, length, a.threads, 2)
            note = '' if a.ours_only else '   (ours alone: mambapy does not fit)'
            print(f'{length:5d} {a.batch:6d} {t:9.2f} {m:8.0f}{note}', flush=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--measure']: measure(sys.argv[2], *(int(v) for v in sys.argv[3:]))
    else: main()
