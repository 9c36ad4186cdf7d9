"""Every fusion on the frozen towers of several runs (56_frozen), with several processes on one card.

    python workflow/fusion_grid.py 'runs/synth/tiny/baseline/seed*' --out tables/fusion.csv --processes 8
    python workflow/fusion_grid.py .gpu/towers --out results/fusion.csv --known tables/fusion.csv --minutes 6

Each process freezes the features of one run and measures fusions on them, the first seed of all before the
second. Rows are written as they come; those in --out or --known are not measured again. The dataset must be
there: it is drawn with the first run that is trained.
"""
import argparse
import multiprocessing
import queue
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import torch

from bdam_repro.config import UserError, atomic_path
from bdam_repro.frozen import Budget, FrozenRun, choose_entries, entry_name, measure_entry, weights_digest
from bdam_repro.launch import end_with_parent
from bdam_repro.ranked import load_run

KEY = ['run', 'fusion', 'reading', 'negatives', 'seed']


def patient(f, *args):
    "A call, again where others on the card have taken the memory: they end some time."
    for wait in (10, 20, 30, 60, 60, 60, 0):
        try: return f(*args)
        except torch.OutOfMemoryError:
            if not wait: raise
        torch.cuda.empty_cache()
        time.sleep(wait)


def work(folder: Path, tokens: bool, jobs, rows, device: str | None, data_root: str | None) -> None:
    "Measure until there is no job: (entry, seed) -> a row, or what went wrong."
    torch.set_num_threads(1)
    parent, budget = multiprocessing.parent_process().pid, Budget()
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    try:
        run = load_run(folder, data_root, device, False)
        frozen = patient(FrozenRun.of, run, budget, tokens)
        while True:
            entry, seed = jobs.get_nowait()
            rows.put(patient(measure_entry, frozen, entry, seed, budget))
    except queue.Empty: rows.put(None)
    except Exception as e: rows.put(f'{folder}: {type(e).__name__}: {e}'.splitlines()[0])


def find_folders(patterns: list[str]) -> list[Path]:
    "Finished runs, or folders of them."
    found = []
    for pattern in patterns:
        for path in sorted(Path().glob(pattern)) if not Path(pattern).is_absolute() else [Path(pattern)]:
            found += sorted(f.parent for f in path.rglob('best.safetensors'))
    if not found: raise UserError(f'no finished run with its weights in {", ".join(patterns)}')
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', help='run folders, patterns, or folders of them')
    p.add_argument('--out', type=Path, default=Path('tables/fusion.csv'))
    p.add_argument('--known', type=Path, help='a file of rows that need not be measured')
    p.add_argument('--only', default='', help='parts of names, by commas, as for fusion.ipynb')
    p.add_argument('--seeds', type=int, default=5, help='of each fusion whose input is pooled')
    p.add_argument('--token-seeds', type=int, default=1, help='of each fusion over patches and words')
    p.add_argument('--processes', type=int, default=1)
    p.add_argument('--minutes', type=float, default=float('inf'), help='take no more rows after this')
    p.add_argument('--device')
    p.add_argument('--data-root')
    a = p.parse_args()
    start, entries, folders = time.perf_counter(), choose_entries(a.only), find_folders(a.runs)
    known = [pd.read_csv(f) for f in (a.out, a.known) if f and f.exists()]
    done = {key for t in known for key in t[KEY].itertuples(index=False, name=None)}
    rows_out = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame()
    def tokens(e): return e.options.get('fusion_input') == 'tokens'
    context = multiprocessing.get_context('spawn')
    rows, todo = context.Queue(), {}
    for folder in folders:
        run = load_run(folder, a.data_root, 'cpu', False)
        name = f'seed{run.config.seed}-{weights_digest(run)}'
        wanted = [(e, k) for k in range(max(a.seeds, a.token_seeds)) for e in entries
                  if k < (a.token_seeds if tokens(e) else a.seeds)]
        wanted.sort(key=lambda job: (job[1], not tokens(job[0])))         # the long ones begin first
        jobs = [(e, k) for e, k in wanted if (name, *entry_name(e).values(), k) not in done]
        if jobs: todo[folder] = jobs
    total = sum(map(len, todo.values()))
    print(f'{total} rows to measure on {len(todo)} runs', flush=True)
    if not total: return
    queues, workers = {f: context.Queue() for f in todo}, []
    for folder, jobs in todo.items():
        for job in jobs: queues[folder].put(job)
    for n in range(max(a.processes, len(todo))):
        folder = list(todo)[n % len(todo)]
        args = folder, any(tokens(e) for e, _ in todo[folder]), queues[folder], rows, a.device, a.data_root
        workers.append(context.Process(target=work, args=args, daemon=True))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for worker in workers: worker.start()
    busy, measured, errors = len(workers), 0, []
    while busy:
        left = 60*a.minutes - (time.perf_counter() - start)
        if left <= 0: break
        try: row = rows.get(timeout=min(left, 5.))
        except queue.Empty:
            if not any(w.exitcode for w in workers): continue
            errors.append('a worker ended: out of memory?')
            break
        if not isinstance(row, dict):
            busy -= 1
            if row: errors.append(row); print(row, flush=True)
            continue
        measured += 1
        rows_out = pd.concat([rows_out, pd.DataFrame([row])], ignore_index=True)
        with atomic_path(a.out) as tmp: rows_out.to_csv(tmp, index=False)
        name = f'{row["run"]} {row["fusion"]} ({row["reading"]}; {row["negatives"]}) {row["seed"]}'
        at, took = time.perf_counter() - start, f'{row["seconds"]:.0f} s'
        print(f'[{at:5.0f} s] {measured} of {total}: {name}: {row["gain_R1"]:+.2f} R-1, {took}', flush=True)
    for worker in workers: worker.terminate()
    if errors: sys.exit(f'{len(errors)} of {len(workers)} processes failed')


if __name__ == '__main__':
    try: main()
    except UserError as e: sys.exit(str(e))
