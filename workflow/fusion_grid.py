"""Every fusion on the frozen towers of several runs (56_frozen), with several processes on one card.

    python workflow/fusion_grid.py 'runs/synth/tiny/baseline/seed*' --out tables/fusion.csv --processes 8
    python workflow/fusion_grid.py .gpu/towers --out results/fusion.csv --known tables/fusion.csv --minutes 6

A process freezes the features of one run after the other and measures fusions on them, the first seed of all
before the second, the fusions over patches and words first. Rows are written as they come; those in --out or
--known are not measured again, so the same command goes on after a break.
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

KEY = ['towers', 'run', 'fusion', 'reading', 'negatives', 'seed', 'steps']
GRACE = 20.       # seconds in which a process may end by itself: others may share its card's server


def patient(f, *args):
    "A call, again where others on the card have taken the memory: they end some time."
    for wait in (10, 20, 30, 60, 60, 60, 0):
        try: return f(*args)
        except RuntimeError as e:
            full = isinstance(e, torch.OutOfMemoryError)
            full |= 'out of memory' in str(e) or 'ALLOC_FAILED' in str(e)          # of other calls
            if not wait or not full: raise
        if torch.cuda.is_available(): torch.cuda.empty_cache()
        time.sleep(wait)


def measure_run(folder: Path, tokens: bool, jobs, rows, device, data_root, deadline: float) -> None:
    "The rows of one run, until there is no job, or no time for one as long as the last."
    run, took = patient(load_run, folder, data_root, device, False), 0.
    frozen = patient(FrozenRun.of, run, Budget(), tokens)
    while time.time() + took < deadline:
        entry, seed = jobs.get(timeout=2)
        start = time.time()
        try: rows.put(patient(measure_entry, frozen, entry, seed, Budget()))
        except Exception as e: rows.put(f'{folder}, {entry.fusion}: {type(e).__name__}: {e}'.splitlines()[0])
        if torch.cuda.is_available(): torch.cuda.empty_cache()             # others may be waiting for it
        took = time.time() - start


def work(shares, rows, *how) -> None:   # shares: (folder, whether tokens are read, queue of jobs)
    "Measure on one run after the other; rows, what went wrong, and None at the end go into `rows`."
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    for folder, tokens, jobs in shares:
        try: measure_run(folder, tokens, jobs, rows, *how)
        except queue.Empty: pass
        except Exception as e: rows.put(f'{folder}: {type(e).__name__}: {e}'.splitlines()[0])
    rows.put(None)


def find_folders(patterns: list[str]) -> list[Path]:
    "Finished runs with their weights, or folders of them, each once."
    found = []
    for pattern in patterns:
        for path in sorted(Path().glob(pattern)) if not Path(pattern).is_absolute() else [Path(pattern)]:
            weights = sorted(path.rglob('best.safetensors'))
            found += [f.parent for f in weights if (f.parent/'metrics.json').exists()]
    if not found: raise UserError(f'no finished run with its weights in {", ".join(patterns)}')
    return list(dict.fromkeys(found))


def missing_rows(folder: Path, entries, seeds: int, token_seeds: int, done: set[tuple], data_root) -> list:
    "(entry, seed) of the rows of a run that are not done; they are then."
    run, wanted = load_run(folder, data_root, 'cpu', False), []
    c, steps = run.config, Budget().steps
    for seed in range(max(seeds, token_seeds)):
        for tokens in (True, False):                                       # the long ones begin first
            some = [e for e in entries if (e.options.get('fusion_input') == 'tokens') == tokens]
            if seed < (token_seeds if tokens else seeds): wanted += [(e, seed) for e in some]
    towers, name = f'{c.dataset}/{c.preset}/{folder.parent.name}', f'seed{c.seed}-{weights_digest(run)}'
    keys = [(towers, name, *entry_name(e).values(), seed, steps) for e, seed in wanted]
    missing = [job for job, key in zip(wanted, keys, strict=True) if key not in done]
    done |= set(keys)
    return missing


def collect(workers, rows, total: int, out: Path, seconds: float) -> list[str]:   # what went wrong
    "Write rows as they come, until all processes have ended or the time is up."
    table = pd.read_csv(out) if out.exists() else pd.DataFrame()
    start, busy, measured, errors = time.perf_counter(), len(workers), 0, []
    while busy and (left := seconds - (time.perf_counter() - start)) > 0:
        try: row = rows.get(timeout=min(left, 5.))
        except queue.Empty:
            if any(w.exitcode is None for w in workers): continue
            errors += [f'a process ended with {w.exitcode}: out of memory?' for w in workers if w.exitcode]
            break
        if row is None: busy -= 1
        elif isinstance(row, str):
            errors.append(row)
            print(row, flush=True)
        else:
            measured += 1
            table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
            with atomic_path(out) as tmp: table.to_csv(tmp, index=False)
            name = f'{row["run"]} {row["fusion"]} ({row["reading"]}; {row["negatives"]}) {row["seed"]}'
            at, found = time.perf_counter() - start, f'{row["gain_R1"]:+.2f} R-1, {row["seconds"]:.0f} s'
            print(f'[{at:5.0f} s] {measured} of {total}: {name}: {found}', flush=True)
    return errors


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', help='run folders, patterns, or folders of them')
    p.add_argument('--out', type=Path, default=Path('tables/fusion.csv'))
    p.add_argument('--known', type=Path, help='a file of rows that need not be measured')
    p.add_argument('--only', default='', help='parts of names, by commas, as for fusion.ipynb')
    p.add_argument('--seeds', type=int, default=5, help='of each fusion whose input is pooled')
    p.add_argument('--token-seeds', type=int, default=1, help='of each fusion over patches and words')
    p.add_argument('--processes', type=int, default=1)
    p.add_argument('--minutes', type=float, default=float('inf'), help='begin no row that would end later')
    p.add_argument('--device')
    p.add_argument('--data-root')
    a = p.parse_args()
    deadline, entries = time.time() + 60*a.minutes, choose_entries(a.only)
    known = [pd.read_csv(f) for f in (a.out, a.known) if f and f.exists()]
    done = {key for table in known for key in table[KEY].itertuples(index=False, name=None)}
    context, shares = multiprocessing.get_context('spawn'), []
    total = 0
    for folder in find_folders(a.runs):
        jobs = missing_rows(folder, entries, a.seeds, a.token_seeds, done, a.data_root)
        if not jobs: continue
        tokens = any(e.options.get('fusion_input') == 'tokens' for e, _ in jobs)
        shares.append((folder, tokens, context.Queue()))
        for job in jobs: shares[-1][2].put(job)
        total += len(jobs)
    print(f'{total} rows to measure on {len(shares)} runs', flush=True)
    if not total: return
    rows, how, workers = context.Queue(), (a.device, a.data_root, deadline), []
    for n in range(a.processes):                                # more than runs: some share a run
        mine = shares[n::a.processes] or [shares[n % len(shares)]]
        workers.append(context.Process(target=work, args=(mine, rows, *how), daemon=True))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for worker in workers: worker.start()
    errors = collect(workers, rows, total, a.out, deadline - time.time() + GRACE)
    for _, _, jobs in shares: jobs.cancel_join_thread()
    for worker in workers: worker.terminate()
    if errors: sys.exit(f'{len(errors)} errors')


if __name__ == '__main__':
    try: main()
    except UserError as e: sys.exit(str(e))
