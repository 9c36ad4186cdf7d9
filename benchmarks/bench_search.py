"""A million features: memory, time per query and recall of each index.

    python benchmarks/bench_search.py --model runs/synth/tiny/full/seed0 [--n 1000000] [--kinds exact hnsw]

A million pictures would take hours to draw, so the features are spread as real ones are: each lies between
the features of two similar pictures of SynthPEDES, with a little noise. The queries are features of captions.
Each kind is measured in a process of its own; times are per query, one query at a time."""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bdam_repro import vectors
from bdam_repro.files import write_tensors
from bdam_repro.images import ImageStore
from bdam_repro.run_data import load_data
from bdam_repro.trained import TrainedModel


def unit(x):
    return x/np.linalg.norm(x, axis=1, keepdims=True)


def features(model, queries=200):
    "Features of all pictures of the model's dataset [n, D], and of captions of its test split [queries, D]."
    c = model.model.config
    ds = load_data(c, progress=False)
    store = ImageStore(ds, (c.image_height, c.image_width), cache=False, columns=c.columns)
    v = [model.encode_images(store[range(i, min(i + 256, len(ds.records)))]).f_id
         for i in range(0, len(ds.records), 256)]
    test = ds.records[ds.records['split'] == 'test']
    captions = [texts[0] for texts in test['captions']][:queries]
    return unit(torch.cat(v).numpy()), unit(model.encode_text(captions).t.numpy())


def spread(v, n, seed=0):
    "n features, each between one of v and one of its 20 nearest."
    rng = np.random.default_rng(seed)
    near = vectors.exact_top(v, [v], 21)[1][:, 1:]
    out = np.empty((n, v.shape[1]), np.float32)
    for start in range(0, n, 100_000):
        i = rng.integers(0, len(v), min(100_000, n - start))
        j = near[i, rng.integers(0, 20, len(i))]
        a = rng.random((len(i), 1))*.5
        noise = .1*v.std(0)*rng.standard_normal((len(i), v.shape[1]))
        out[start:start + len(i)] = unit((1 - a)*v[i] + a*v[j] + noise)
    return out


def timed(search, q, repeats):
    "Milliseconds per query, wall and processor: median and 95 %."
    wall, cpu = [], []
    for i in range(repeats):
        s, c = time.perf_counter(), time.process_time()
        search(q[i % len(q):i % len(q) + 1])
        wall.append(1000*(time.perf_counter() - s))
        cpu.append(1000*(time.process_time() - c))
    at = lambda x, p: round(float(np.percentile(x, p)), 2)
    return dict(wall_ms=at(wall, 50), wall_p95=at(wall, 95), cpu_ms=at(cpu, 50), cpu_p95=at(cpu, 95))


def peak_MiB():
    "Of this process alone; `getrusage` would begin with its parent's."
    line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM'))
    return round(int(line.split()[1])/1024)


def measure(folder, kind):
    parts, q = [vectors.map_rows(p) for p in sorted(folder.glob('part-*'))], np.load(folder/'q.npy')
    found = {'kind': kind, 'n': sum(map(len, parts)), 'dim': parts[0].shape[1]}
    if kind == 'exact':
        search = lambda q: vectors.exact_top(q, parts, 10)
        found |= timed(search, q, 60)
    else:
        start = time.process_time()
        index = vectors.make_index(parts, kind)
        vectors.tune_index(index, q[:100], parts)                  # half of the queries tune it
        found |= dict(build_cpu_s=round(time.process_time() - start), build_peak_MiB=peak_MiB())
        vectors.write_index(index, folder/kind)
        true = vectors.exact_top(q[100:], parts, 10)[1]            # the other half says how good it is
        top = vectors.index_top(index, q[100:], parts, 10)[1]
        found['recall@10'] = round(vectors.recall_at(top, true), 4)
        found |= dict(looks_at=index.nprobe if kind == 'ivfpq' else index.hnsw.efSearch)
        found |= timed(lambda q: vectors.index_top(index, q, parts, 10), q[100:], 300)
        found |= dict(file_MiB=round((folder/kind).stat().st_size/2**20))
    return found | dict(peak_MiB=peak_MiB())


def searching(folder, kind):
    "Peak memory of a process that only searches, with everything mapped."
    parts, q = [vectors.map_rows(p) for p in sorted(folder.glob('part-*'))], np.load(folder/'q.npy')
    start = time.perf_counter()
    index = vectors.read_index(folder/kind) if kind != 'exact' else None
    opened = time.perf_counter() - start
    for i in range(len(q)):
        if index is None: vectors.exact_top(q[i:i + 1], parts, 10)
        else: vectors.index_top(index, q[i:i + 1], parts, 10)
    return dict(kind=kind, open_ms=round(1000*opened, 2), searching_peak_MiB=peak_MiB())


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model')
    p.add_argument('--n', type=int, default=1_000_000)
    p.add_argument('--kinds', nargs='+', default=['exact', 'hnsw', 'ivfpq'])
    p.add_argument('--step', nargs=3, help='for its own processes')
    args = p.parse_args()
    if args.step:
        step, folder, kind = args.step
        print(json.dumps({'measure': measure, 'searching': searching}[step](Path(folder), kind)))
        sys.exit()
    with tempfile.TemporaryDirectory() as tmp:
        v, q = features(TrainedModel.from_pretrained(args.model))
        x = spread(v, args.n)
        nearest = float((q @ x[:100_000].T).max(1).mean())
        print(json.dumps(dict(real=len(v), queries=len(q), nearest_cosine=round(nearest, 3))), flush=True)
        for i in range(0, args.n, 65_536):
            write_tensors(f'{tmp}/part-{i:09d}.safetensors', {'v': torch.from_numpy(x[i:i + 65_536])}, {})
        np.save(f'{tmp}/q.npy', q)
        del x
        for kind in args.kinds:
            for step in ('measure', 'searching'):
                subprocess.run([sys.executable, __file__, '--step', step, tmp, kind], check=True)
