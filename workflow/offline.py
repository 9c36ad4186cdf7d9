"""Training on a GPU machine that reaches no network, and that one has for minutes.

Here, with a network:

    python workflow/offline.py pack .gpu --python 3.12 --have packages.txt

    writes .gpu/whl (what `bdam_repro` needs and the other machine lacks; never PyTorch, which it must have
    for its own CUDA), and .gpu/plan.jsonl (the runs that are missing beside the kept ones, the most telling
    first). packages.txt: names of the packages there, one per line, as `pip freeze` prints them there.
    --towers 'runs/synth/tiny/baseline/seed*' copies trained weights: their fusions are measured there.

There, with a copy of this repository and of .gpu:

    python3 workflow/offline.py run .gpu --out results --minutes 9

    installs the wheels aside, trains two small runs from start to test and stops if they fail, then trains
    the plan with several processes on one card, through CUDA MPS where it works, and measures the fusions of
    .gpu/towers beside it. results/ is complete at any moment: gpu.csv, grid.log, fusion.csv and runs-*.zip,
    which `python -m zipfile -e FILE runs` puts back. `--sections tests,shares` measures sections of
    benchmarks/gpu.py besides, after the grid, in the last `--bench-minutes`.
"""
import argparse
import atexit
import contextlib
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = 'pytest', 'hypothesis'          # for the tests marked `cuda`
THEIRS = re.compile(r'torch$|triton$|nvidia-|cuda-')      # of the machine itself
TAGS = [f'manylinux_2_{n}_x86_64' for n in range(17, 36)] + ['manylinux2014_x86_64', 'manylinux1_x86_64']


def plain(name: str) -> str:
    "A package's name as the index writes it."
    return re.sub(r'[-_.]+', '-', name).lower()


def needed(names: list[str], have: set[str]) -> dict[str, str]:
    "What these packages need, and they themselves, at the versions that are installed here: name -> version."
    from packaging.requirements import Requirement
    found: dict[str, str] = {}
    def add(name, extras):
        key = plain(name)
        if key in have or THEIRS.match(key) or (key in found and not extras): return
        try: d = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError: return            # for another system or Python
        found[key] = d.version
        for line in d.requires or ():
            r = Requirement(line)
            wanted = [r.marker.evaluate({'extra': e}) for e in ('', *extras)] if r.marker else [True]
            if any(wanted): add(r.name, r.extras)
    for name in names: add(name, ())
    found.pop('bdam-repro', None)                                         # it travels as it is
    return found


def pack_towers(folder: Path, pattern: str) -> None:
    "Copies of the weights of finished runs."
    found = [f.parent for f in sorted(ROOT.glob(f'{pattern}/metrics.json'))]
    found = [run for run in found if (run/'best.safetensors').exists()]
    if not found: sys.exit(f'no finished run with its weights in {pattern}')
    for run in found:
        target = folder.joinpath(*run.parts[-4:])
        target.mkdir(parents=True)
        for name in ('best.safetensors', 'config.json', 'metrics.json'): shutil.copy(run/name, target)
        shutil.copytree(run/'tokenizer', target/'tokenizer')
        print(target)


def pack(folder: Path, python: str, have: Path | None, towers: str, options: list[str]) -> None:
    "Wheels, weights and the plan."
    folder = folder.resolve()                              # the plan is made from the repository's folder
    lines = have.read_text().splitlines() if have else []
    there = {plain(re.split(r'[\s=@<>~!;\[]', line.strip())[0]) for line in lines if line.strip()}
    packages = needed(['bdam-repro', *TESTS], there)
    wheels = folder/'whl'
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    tags = [part for tag in TAGS for part in ('--platform', tag)]
    names = [f'{name}=={version}' for name, version in packages.items()]
    if names:
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:']
        command += ['--python-version', python, '--implementation', 'cp', *tags, '-d', wheels]
        subprocess.run([*command, *names], check=True)
    size = sum(f.stat().st_size for f in wheels.iterdir())/2**20
    print(f'{wheels}: {len(names)} packages, {size:.0f} MiB: {", ".join(packages)}')

    shutil.rmtree(folder/'towers', ignore_errors=True)
    if towers: pack_towers(folder/'towers', towers)

    from bdam_repro.archive import restore_kept
    from bdam_repro.results import ArtifactParameters
    restore_kept(ArtifactParameters())
    plan = [sys.executable, ROOT/'workflow/gpu_grid.py', '--worth', '--plan', folder/'plan.jsonl', *options]
    subprocess.run(plan, check=True, cwd=ROOT)


def quit_mps(env: dict[str, str]) -> None:
    "End the server, as far as it listens."
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(['nvidia-cuda-mps-control'], env=env, input=b'quit\n', check=False, timeout=20)


def start_mps(folder: Path, env: dict[str, str]) -> None:
    "NVIDIA's server through which processes share a card, where it is installed and works."
    if not shutil.which('nvidia-cuda-mps-control'):
        return print('no nvidia-cuda-mps-control: processes take turns')
    names = [f'CUDA_MPS_{name}_DIRECTORY' for name in ('PIPE', 'LOG')]
    for name in names:
        env[name] = str(folder/name.lower())
        Path(env[name]).mkdir()
    subprocess.run(['nvidia-cuda-mps-control', '-d'], env=env, start_new_session=True, check=False)
    probe = [sys.executable, '-c', 'import torch; print(torch.ones(2, device="cuda").sum().item())']
    try: good = subprocess.run(probe, env=env, check=False, timeout=60).returncode == 0
    except subprocess.TimeoutExpired: good = False
    print('CUDA MPS works' if good else 'CUDA MPS does not work here: processes take turns', flush=True)
    if good:
        atexit.register(quit_mps, dict(env))
        return
    quit_mps(env)
    for name in names: del env[name]


def run(folder: Path, out: Path, minutes: float, processes: int, sections: str, bench_minutes: float,
        smoke: bool) -> None:
    "Install, try, train, measure."
    start, work = time.perf_counter(), Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    wheels = sorted((folder/'whl').glob('*.whl'))
    if wheels:
        command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile']
        command += ['--no-cache-dir', '--upgrade', '--target', work/'site']
        subprocess.run([*command, *wheels], check=True)
    env = os.environ | dict(PYTHONPATH=f'{work/"site"}{os.pathsep}{ROOT}', PYTHONUNBUFFERED='1',
                            OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', TQDM_DISABLE='1')
    start_mps(work, env)
    def left(): return minutes - (time.perf_counter() - start)/60
    def bench(names):
        toy = ['--smoke'] if smoke else []
        command = [sys.executable, 'benchmarks/gpu.py', '--sections', names, '--minutes', f'{left():.2f}']
        command += ['--out', out/'gpu.csv', *toy]
        return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode

    if bench('whole'): sys.exit('a small run from start to test has failed: nothing else was begun')
    plan, towers, fusions = folder/'plan.jsonl', folder/'towers', None
    many = max(1, processes//2) if towers.exists() else processes
    for part in sorted(out.glob('runs-*.zip')):                     # of this command before a break
        with zipfile.ZipFile(part) as z: z.extractall(work/'runs')
    def grid_minutes(): return f'{left() - .6 - (bench_minutes if sections else 0):.2f}'
    def measure():
        command = [sys.executable, 'workflow/fusion_grid.py', towers.resolve(), '--out', out/'fusion.csv']
        command += ['--known', ROOT/'tables/fusion.csv', '--processes', str(max(1, processes - many))]
        return subprocess.Popen([*command, '--minutes', grid_minutes()], cwd=ROOT, env=env)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (out/'grid.log').open('a') as log:
        command = [sys.executable, 'workflow/gpu_grid.py', '--list', plan.resolve(), '--runs', work/'runs']
        command += ['--processes', str(many), '--pack', out, '--minutes', grid_minutes()]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) as grid:
            try:
                for line in grid.stdout:                   # at once: what is cut off has been seen
                    print(line, end='', flush=True)
                    log.write(line)
                    log.flush()
                    begun = re.match(r'\d+ of \d+ runs', line)               # so the dataset is there
                    if begun and towers.exists() and not fusions: fusions = measure()
            except BaseException:
                for process in filter(None, (grid, fusions)): process.terminate()
                raise
    if towers.exists() and not fusions: fusions = measure()             # no run of the list has ended
    bad = grid.returncode
    if fusions: bad = fusions.wait() or bad
    if sections: bad = bench(sections) or bad
    sys.exit(bad)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(dest='verb', required=True)
    v = verbs.add_parser('pack', help='wheels and the list of runs, here')
    v.add_argument('folder', type=Path)
    v.add_argument('--python', default='3.12', help='the version there')
    v.add_argument('--have', type=Path, help='packages that are there, as `pip freeze` prints them')
    v.add_argument('--towers', default='', help='pattern of run folders whose fusions are to be measured')
    v.add_argument('--grid', default='', help='options of gpu_grid.py, such as --grid=--layouts')
    v = verbs.add_parser('run', help='install, try, train, there')
    v.add_argument('folder', type=Path)
    v.add_argument('--out', type=Path, required=True)
    v.add_argument('--minutes', type=float, default=9., help='in all')
    v.add_argument('--processes', type=int, default=max(1, (os.cpu_count() or 2) - 1))
    v.add_argument('--sections', default='', help='of benchmarks/gpu.py, after the grid')
    v.add_argument('--bench-minutes', type=float, default=3., help='of these minutes, for the sections')
    v.add_argument('--smoke', action='store_true', help='toy sizes in benchmarks/gpu.py')
    a = p.parse_args()
    if a.verb == 'pack': pack(a.folder, a.python, a.have, a.towers, shlex.split(a.grid))
    else: run(a.folder, a.out, a.minutes, a.processes, a.sections, a.bench_minutes, a.smoke)


if __name__ == '__main__': main()
