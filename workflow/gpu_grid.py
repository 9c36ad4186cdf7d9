"""The runs of the tables, or of a list, on one GPU: several worker processes, each with its data in memory.

    python workflow/gpu_grid.py --seeds 0,1,2 --processes 8    # runs of the tables (--layouts, --audit: more)
    python workflow/gpu_grid.py --variants full,baseline --seeds 0-9 --minutes 15
    python workflow/gpu_grid.py --worth --plan runs.jsonl           # what is missing, most telling first
    python workflow/gpu_grid.py --list runs.jsonl --pack out/       # one run per line, as JSON

Complete runs are passed over, so the same command goes on after a break. `--minutes` begins no run that would
end too late. With `--pack`, what the tables and figures read of each finished run is copied into zip files of
at most 15 MiB, every 20 seconds; `python -m zipfile -e FILE runs` puts them back (some unzip programs do
not know their compression). If a CUDA MPS server runs already, the processes share the card through it.
"""
import argparse
import os
import sys
import time
import zipfile
from pathlib import Path

from bdam_repro.archive import SMALL_FILES, keeps_rankings, kept_features, query_results, restore_runs
from bdam_repro.config import UserError, atomic_path, config_hash, run_dir
from bdam_repro.grid import audit_grid, design_grid, grid, grid_by_worth
from bdam_repro.many import left_to_do, read_run_list, run_line, train_many
from bdam_repro.parameters import seed_numbers
from bdam_repro.run_data import dataset_folder
from bdam_repro.runs import finished

PART = 15*2**20      # bytes of a zip file


class Packer:
    "Copies finished runs into zip files, each run once."
    def __init__(self, folder: Path, runs: Path, configs):
        self.folder, self.runs = folder, runs
        folder.mkdir(parents=True, exist_ok=True)
        parts = sorted(folder.glob('runs-*.zip'))            # of this command before a break
        packed = {runs/Path(name).parent for part in parts for name in zipfile.ZipFile(part).namelist()}
        self.waiting = {f: c for c in configs if (f := run_dir(c, runs)) not in packed}
        self.part = len(parts)

    def content(self, folder: Path, c) -> dict[str, bytes]:
        small = {f.name: f.read_bytes() for name in SMALL_FILES if (f := folder/name).exists()}
        run = c.variant, c.tag, c.seed
        kept = query_results(folder/'features.safetensors', kept_features(*run), keeps_rankings(*run))
        return small | {'features.safetensors': kept}

    def __call__(self) -> None:
        "Pack what is finished since the last call."
        done = {folder: finished(folder) or {} for folder in self.waiting}
        ready = [f for f, c in self.waiting.items() if done[f].get('config_hash') == config_hash(c)]
        while ready:
            target = self.folder/f'runs-{self.part:02}.zip'
            before, written = target.read_bytes() if target.exists() else b'', []
            with atomic_path(target) as tmp:
                tmp.write_bytes(before)
                with zipfile.ZipFile(tmp, 'a', zipfile.ZIP_LZMA) as z:
                    while ready and tmp.stat().st_size < PART - 2**20:
                        folder = ready.pop()
                        for name, data in self.content(folder, self.waiting[folder]).items():
                            z.writestr(f'{folder.relative_to(self.runs).as_posix()}/{name}', data)
                        written.append(folder)
                full = tmp.stat().st_size >= PART - 2**20
            for folder in written: del self.waiting[folder]               # they are on the disk now
            self.part += full


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--list', type=Path, help='a file with one run per line; empty: the grid of the tables')
    p.add_argument('--dataset', default='synth')
    p.add_argument('--preset', default=None)
    p.add_argument('--variants', default='', help='only these, separated by commas')
    p.add_argument('--seeds', type=seed_numbers, default=[0, 1, 2],
                   help='how many, such as 3, or which: 0-9, 0,2,4')
    p.add_argument('--audit', action='store_true', help='the runs of other readings too')
    p.add_argument('--worth', action='store_true',
                   help='all runs of tables and audit, the most telling first: ten, five and three seeds')
    p.add_argument('--plan', type=Path, help='write what is missing into this file as a list, and end')
    p.add_argument('--layouts', action='store_true', help='the other two layouts of SynthPEDES too')
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--processes', type=int, default=max(1, (os.cpu_count() or 2) - 2))
    p.add_argument('--threads', type=int, default=1, help='runs at once in each process')
    p.add_argument('--minutes', type=float, default=float('inf'), help='begin no run that would end later')
    p.add_argument('--pack', type=Path, help='folder for zip files of finished runs')
    p.add_argument('--kept', type=Path, help='folder of kept-*.zip: what is in them is put back, not trained')
    p.add_argument('--options', default='', help='of every run, as name=value separated by commas')
    a = p.parse_args()
    options = dict(pair.split('=', 1) for pair in a.options.split(',') if pair)
    start = time.perf_counter()
    if a.list: configs = read_run_list(a.list, **options)
    elif a.worth: configs = grid_by_worth(a.dataset, a.preset, layouts=a.layouts, **options)
    else:
        given = dict(dataset=a.dataset, preset=a.preset, seeds=a.seeds, **options)
        variants = [v for v in a.variants.split(',') if v]
        configs = grid(styles=a.dataset == 'synth', layouts=a.layouts, variants=variants, **given)
        if a.audit: configs += [*audit_grid(**given), *design_grid(**given | dict(seeds=a.seeds[:1]))]
    for c in configs:
        if c.dataset == 'synth' or c.descriptions == 'none': continue
        texts = dataset_folder(c)/('descriptions.jsonl' if c.descriptions == 'auto' else c.descriptions)
        say = f'{texts} is missing: papermill nbs/describe.ipynb -p dataset {c.dataset} writes it'
        if not texts.is_file(): raise UserError(say)
    if a.kept and (back := restore_runs(a.runs, a.kept, configs)): print(f'{len(back)} runs put back')
    if a.plan:
        missing = left_to_do(configs, a.runs)
        with atomic_path(a.plan) as tmp: tmp.write_text(''.join(f'{run_line(c)}\n' for c in missing))
        return print(f'{len(missing)} of {len(configs)} runs are missing: see {a.plan}')
    pack = Packer(a.pack, a.runs, configs) if a.pack else lambda: None
    left = 60*a.minutes - (time.perf_counter() - start)
    errors = train_many(configs, a.runs, a.processes, a.threads, left, pack, every=20.,
                        say=lambda line: print(line, flush=True))
    if errors: sys.exit(f'{len(errors)} runs failed')


if __name__ == '__main__':
    try: main()
    except UserError as e: sys.exit(str(e))
