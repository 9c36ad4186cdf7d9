"""Training on a GPU machine that reaches no network, and that one has for minutes.

Here, with a network:

    python workflow/offline.py pack .gpu --python 3.12 --have packages.txt

    writes .gpu/whl (what `bdam_repro` needs and the other machine lacks; never PyTorch, which it must have
    for its own CUDA), and .gpu/plan.jsonl (the runs that are missing beside the kept ones, the most telling
    first). packages.txt: names of the packages there, one per line, as `pip freeze` prints them there.

There, with a copy of this repository and of .gpu:

    python3 workflow/offline.py run .gpu --out results --minutes 9

    installs the wheels aside, trains two small runs from start to test and stops if they fail, then trains
    the plan with several processes on one card, through CUDA MPS where it is installed. results/ is complete
    at any moment: gpu.csv, runs-*.zip (unzip them in runs/), grid.log. `--sections tests,shares` measures
    sections of benchmarks/gpu.py besides, after the grid.
"""
import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
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


def pack(folder: Path, python: str, have: Path | None, options: list[str]) -> None:
    "Wheels and the plan."
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

    from bdam_repro.archive import restore_kept
    from bdam_repro.results import ArtifactParameters
    restore_kept(ArtifactParameters())
    plan = [sys.executable, ROOT/'workflow/gpu_grid.py', '--worth', '--plan', folder/'plan.jsonl', *options]
    subprocess.run(plan, check=True, cwd=ROOT)


def start_mps(folder: Path, env: dict[str, str]) -> None:
    "NVIDIA's server through which processes share a card, where it is installed."
    if not shutil.which('nvidia-cuda-mps-control'):
        return print('no nvidia-cuda-mps-control: processes take turns')
    for name in ('PIPE', 'LOG'):
        env[f'CUDA_MPS_{name}_DIRECTORY'] = str(folder/f'mps-{name.lower()}')
        (folder/f'mps-{name.lower()}').mkdir()
    subprocess.run(['nvidia-cuda-mps-control', '-d'], env=env, start_new_session=True, check=False)


def run(folder: Path, out: Path, minutes: float, processes: int, sections: str, smoke: bool) -> None:
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
    plan = folder/'plan.jsonl'
    with (out/'grid.log').open('w') as log:
        command = [sys.executable, 'workflow/gpu_grid.py', '--list', plan.resolve(), '--runs', work/'runs',
                   '--processes', str(processes), '--pack', out, '--minutes', f'{left() - .3:.2f}']
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) as grid:
            for line in grid.stdout:                       # at once: what is cut off has been seen
                print(line, end='', flush=True)
                log.write(line)
                log.flush()
    bad = grid.returncode
    if sections: bad = bench(sections) or bad
    sys.exit(bad)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(dest='verb', required=True)
    v = verbs.add_parser('pack', help='wheels and the list of runs, here')
    v.add_argument('folder', type=Path)
    v.add_argument('--python', default='3.12', help='the version there')
    v.add_argument('--have', type=Path, help='packages that are there, as `pip freeze` prints them')
    v.add_argument('options', nargs='*', help='of gpu_grid.py, after --')
    v = verbs.add_parser('run', help='install, try, train, there')
    v.add_argument('folder', type=Path)
    v.add_argument('--out', type=Path, required=True)
    v.add_argument('--minutes', type=float, default=9., help='in all')
    v.add_argument('--processes', type=int, default=max(1, (os.cpu_count() or 2) - 1))
    v.add_argument('--sections', default='', help='of benchmarks/gpu.py, after the grid')
    v.add_argument('--smoke', action='store_true', help='toy sizes in benchmarks/gpu.py')
    a = p.parse_args()
    if a.verb == 'pack': pack(a.folder, a.python, a.have, a.options)
    else: run(a.folder, a.out, a.minutes, a.processes, a.sections, a.smoke)


if __name__ == '__main__': main()
