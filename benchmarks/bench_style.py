"""Seconds and peak memory of style clustering, each method in a process of its own.

    python benchmarks/bench_style.py [N] [--methods dbscan kmeans ...] [--dim 8] [--as-written] [--threads 1]

The captions are SynthPEDES's first N (no picture is drawn). `--as-written` leaves the content in, so that
hardly two
captions are equal: the worst case, since equal ones are clustered once. Peak memory is the whole process's,
the
interpreter and its libraries included.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time

COLUMNS = dict(distinct='9', generalize='11.1f', embed='8.1f', cluster='9.1f', peak_mb='9.0f', k='4',
               noise='7.2f', ari='6.2f')


def measure(n, method, dim, as_written):
    from bdam_repro.generalize import embed_styles, generalize, synth_captions
    from bdam_repro.style import cluster_styles
    captions, truth = synth_captions(n)
    start = time.perf_counter()
    texts = captions if as_written else [generalize(c) for c in captions]
    generalized = time.perf_counter()
    x = embed_styles(texts, dim=dim)
    embedded = time.perf_counter()
    _, d = cluster_styles(x, method, truth=truth)
    done = time.perf_counter()
    return dict(distinct=len(set(texts)), generalize=generalized - start, embed=embedded - generalized,
                cluster=done - embedded, k=d.k, noise=d.noise_before, ari=d.ari,
                peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('n', type=int, nargs='?', default=80_000)
    p.add_argument('--methods', nargs='+', default=['dbscan', 'hdbscan', 'kmeans', 'gmm', 'agglomerative'])
    p.add_argument('--dim', type=int, default=8)
    p.add_argument('--as-written', action='store_true')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print(json.dumps(measure(a.n, a.one, a.dim, a.as_written)))
        return
    env = os.environ | dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'), str(a.threads))
    print(f'{a.n} captions, {a.dim} dimensions; times in seconds')
    print(f'{"method":14}' + ''.join(f'{name:>{int(form.split(".")[0])}}' for name, form in COLUMNS.items()))
    for method in a.methods:
        command = [sys.executable, __file__, str(a.n), '--one', method, '--dim',
                   str(a.dim)] + ['--as-written'] * a.as_written
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        r = json.loads(done.stdout.splitlines()[-1])
        print(f'{method:14}' + ''.join(f'{r[name]:{form}}' for name, form in COLUMNS.items()), flush=True)


if __name__ == '__main__':
    main()
