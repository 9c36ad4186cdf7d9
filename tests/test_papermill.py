"papermill on our notebooks as people type it: on a terminal, with pipes on either side, with mistakes."
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from PIL import Image
from test_resume import step_of
from test_training import bits

from bdam_repro.engine import USER_ERRORS

REPO = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent/'papermill')
TRAIN = ['nbs/train.ipynb', '-p', 'preset', 'smoke']


@pytest.fixture(scope='module')
def root(tmp_path_factory): return tmp_path_factory.mktemp('root')


def environment(root, **more):
    own = {'BDAM_ROOT': str(root), 'OMP_NUM_THREADS': '1'} | more
    return {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | own


def piped(root, *args, stdin=None, cwd=REPO, **more):
    given = dict(stdin=subprocess.DEVNULL) if stdin is None else dict(input=stdin)   # `input` makes it a pipe
    command, environ = [PAPERMILL, *map(str, args)], environment(root, **more)
    return subprocess.run(command, cwd=cwd, env=environ, **given, capture_output=True, text=True)


def on_terminal(root, *args, columns=80, cwd=REPO):
    "Exit code and everything a terminal of this width was sent."
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
    command = [PAPERMILL, *map(str, args)]
    p = subprocess.Popen(command, cwd=cwd, env=environment(root), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    sent = b''
    while True:
        try: part = os.read(master, 65536)
        except OSError: break             # Linux: nobody holds the other end any more
        if not part: break
        sent += part
    os.close(master)
    return p.wait(), sent.decode()


def errors(stderr): return [line for line in stderr.splitlines() if line.startswith('Error')]


def notebook(path, *sources):
    "A notebook of these code cells."
    kernel = dict(name='python3', display_name='python3', language='python')
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [v4.new_code_cell(s) for s in sources]
    nbformat.write(v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)


@pytest.fixture(scope='module')
def trained(root): return on_terminal(root, *TRAIN)


def test_terminal_without_output_path(root, trained):
    code, sent = trained
    assert code == 0, sent
    executed = root/'runs'/'train-preset=smoke.ipynb'
    assert f'executed notebook: {executed}' in sent.replace('\r\n', '\n')
    cells = json.loads(executed.read_text())['cells']
    outputs = [o for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
    assert any('chance' in ''.join(o.get('data', {}).get('text/html', '')) for o in outputs)
    assert all('\r' not in ''.join(o.get('text', '')) for o in outputs), 'states of a bar'
    assert [o for o in outputs if o.get('name') == 'stderr'] == [], 'red in JupyterLab'
    assert any('image/png' in o.get('data', {}) for o in outputs)
    assert (root/'runs/synth/smoke/full/seed0/metrics.json').is_file()


def test_terminal_shows_progress_that_fits(trained):
    _, sent = trained
    assert re.search(r'epoch +2/2 +dual R-1', sent) and 'chance' in sent
    drawn = re.findall(r'\r\x1b\[K([^\r\n]*)(?=\r\x1b|$)', sent)       # lines that are drawn over
    assert any('images/s' in d for d in drawn), 'no training bar'
    assert max(map(len, drawn)) < 80, 'a bar that wraps leaves its remains behind'


def test_finished_run_is_not_run_again_and_stdout_may_be_a_pipe(root, trained):
    metrics = root/'runs/synth/smoke/full/seed0/metrics.json'
    before = metrics.stat().st_mtime_ns
    r = piped(root, *TRAIN)
    assert r.returncode == 0, r.stderr
    assert 'complete already' in r.stdout and 'chance' in r.stdout and '"cells"' not in r.stdout
    assert '\r' not in r.stdout + r.stderr
    assert metrics.stat().st_mtime_ns == before


def test_nothing_alarms(root, trained):
    r = piped(root, *TRAIN, '-p', 'c_gate', '1.0')
    assert r.returncode == 0, r.stderr
    for word in ('Passed unknown', 'encryption', 'Warning', 'WARNING'): assert word not in r.stdout + r.stderr


def test_a_log_in_ascii(root, trained):
    r = piped(root, *TRAIN, PYTHONIOENCODING='ascii')
    assert r.returncode == 0, r.stderr
    assert 'complete already' in r.stdout and '\ufffd' not in r.stdout


def test_missing_data_with_a_piped_stdin(root):
    source = (REPO/'nbs/train.ipynb').read_bytes()
    r = piped(root, 'nbs/train.ipynb', '-p', 'dataset', 'cuhk', stdin='')
    assert r.returncode == 1
    line, = errors(r.stderr)
    assert r.stderr.rstrip().endswith(line) and 'Traceback' not in r.stderr + r.stdout
    for word in ('CUHK-PEDES', str(root/'data'), 'reid_raw.json', '-p dataset synth'): assert word in line
    assert (REPO/'nbs/train.ipynb').read_bytes() == source           # papermill alone writes its output there
    assert (root/'runs/train-dataset=cuhk.ipynb').is_file() and not (root/'runs/cuhk').exists()


@pytest.mark.parametrize('args, words', [
    (['-p', 'epoch', '3'], ["'epoch'", "did you mean 'epochs'"]),
    (['-p', 'dataset', 'cuhc'], ['dataset', 'cuhc', "'cuhk'"]),
    (['-p', 'epochs', '2.5', '-p', 'variant', 'full'], ['epochs=2.5', 'integer']),
    (['-p', 'overwrite', 'false'], ["overwrite='false'", 'True or False']),
    (['-p', 'runs', '2024'], ['runs=2024', 'string'])])
def test_unknown_parameter_or_value(root, args, words):
    check_refused(piped(root, 'nbs/train.ipynb', *args), words)


@pytest.mark.parametrize('notebook, args, words', [
    ('evaluate', ['-p', 'examples', 'three'], ["examples='three'", 'integer']),
    ('evaluate', ['-p', 'run', '5'], ['run=5', 'string']),
    ('evaluate', ['-p', 'examples', 'None'], ['examples=None', 'integer']),
    ('styles', ['-p', 'methods', '3'], ['methods=3', 'string']),
    ('styles', ['-p', 'tag', 'icgf'], ["tag='icgf'", 'icfg']),
    ('guide_module', ['-p', 'steps', 'forty'], ["steps='forty'", 'integer']),
    ('guide_loss', ['-p', 'strengh', '3'], ["'strengh'", "did you mean 'strength'"]),
    ('benchmarks', ['-p', 'quick', 'false'], ["quick='false'", 'True or False'])])
def test_parameters_of_a_notebook_that_are_no_options(root, notebook, args, words):
    check_refused(piped(root, f'nbs/{notebook}.ipynb', *args), words)


CHECKS = 'from_globals', 'page_parameters', 'artifact_parameters', 'check_parameters', 'search_parameters'

def test_every_notebook_checks_its_parameters_and_knows_the_home_folder():
    "The cell behind the parameters asks one of `CHECKS`; a folder among them goes through `in_repository`."
    tried = 0
    for path in sorted((REPO/'nbs').glob('*.ipynb')):
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
        at = [i for i, c in enumerate(cells) if 'parameters' in c.metadata.get('tags', ())]
        if not at: continue
        tried += 1
        behind, rest = cells[at[0] + 1].source, '\n'.join(c.source for c in cells)
        assert any(re.search(rf'\b{check}\(', behind) for check in CHECKS), path.name
        for name in re.findall(r'(?m)^(\w+):', cells[at[0]].source):
            assert not re.search(rf'ROOT/{name}\b', rest), f'{path.name}: ROOT/{name}'
    assert tried > 20


@pytest.mark.parametrize('args, words', [
    (['-p', 'variant', 'baseline'], ["variant='full'", "not 'baseline'"]),
    (['-p', 'rerank', '3'], ['rerank=8', 'not 3', 'leave rerank out'])])
def test_an_evaluation_is_of_the_run_that_was_asked_for(root, trained, args, words):
    run = root/'runs/synth/smoke/full/seed0'
    check_refused(piped(root, 'nbs/evaluate.ipynb', '-p', 'run', run, *args), words)
    if args[1] == 'rerank':                              # by its options, it would be another folder
        r = piped(root, 'nbs/evaluate.ipynb', '-p', 'preset', 'smoke', *args)
        check_refused(r, ['no finished run', 'full-rerank=3'])


def check_refused(r, words):
    assert r.returncode == 1
    line, = errors(r.stderr)
    for word in words: assert word in line
    assert 'Traceback' not in r.stderr + r.stdout


def test_a_search_as_the_readme_has_it(root, tmp_path):
    "A folder of pictures, a sentence, a sheet; the released model, no dataset."
    pictures = tmp_path/'pictures'
    pictures.mkdir()
    for i in range(3): Image.new('RGB', (64, 128), (80*i, 90, 120)).save(pictures/f'{i}.png')
    asked = '-p', 'query', 'a woman with a green backpack', '-p', 'sheet', tmp_path/'hits.png', '-p', 'k', 2
    r = piped(root, 'nbs/search.ipynb', '-p', 'folder', pictures, *asked)
    assert r.returncode == 0, r.stderr
    with Image.open(tmp_path/'hits.png') as sheet: assert sheet.size[0] > 64
    kept, = (root/'runs').glob('search-*.ipynb')
    assert 'green backpack' in kept.read_text()


@pytest.mark.parametrize('word, value', [('true', True), ('False', False)])
def test_a_switch_may_be_typed_in_small_letters(root, word, value):
    asked = '-p', 'grad_checkpoint', word, '-p', 'tag', f'switch-{word}', '-p', 'max_steps', 1
    r = piped(root, *TRAIN, *asked)
    assert r.returncode == 0, r.stderr
    config, = root.glob(f'runs/**/full-switch-{word}/seed0/config.json')
    assert json.loads(config.read_text())['grad_checkpoint'] is value


def test_help_lists_the_typed_parameters(root):
    r = piped(root, '--help-notebook', 'nbs/train.ipynb')
    assert r.returncode == 0
    for typed in ("dataset: str (default 'synth')", "variant: str (default 'full')",
                  'epochs: int (default None)', 'seed: int (default 0)', 'overwrite: bool (default False)'):
        assert typed in r.stdout
    assert 'no type' not in r.stdout.lower() and 'Unknown' not in r.stdout


def test_our_notebook_from_another_folder_with_an_output_path(root, tmp_path):
    r = piped(root, REPO/'nbs/train.ipynb', 'mine.ipynb', '-p', 'epoch', '3', cwd=tmp_path)
    assert r.returncode == 1 and errors(r.stderr)
    assert (tmp_path/'mine.ipynb').is_file()


def test_prepare_only_is_papermills(root, tmp_path):
    out = tmp_path/'prepared.ipynb'
    r = piped(root, 'nbs/train.ipynb', out, '--prepare-only', '-p', 'seed', '7')
    assert r.returncode == 0 and 'executed' not in r.stdout
    assert any('seed = 7' in ''.join(c['source']) for c in json.loads(out.read_text())['cells'])


def test_other_peoples_notebooks_are_papermills(root, tmp_path):
    notebook(tmp_path/'nbs'/'theirs.ipynb', 'print(6*7)')
    code, sent = on_terminal(root, 'nbs/theirs.ipynb', cwd=tmp_path)
    assert code == 2 and "Missing argument 'OUTPUT_PATH'" in sent
    r = piped(root, 'nbs/theirs.ipynb', cwd=tmp_path)
    assert json.loads(r.stdout)['cells'][0]['outputs'][0]['text'] in ('42\n', ['42\n'])


def test_other_errors_keep_their_traceback(root, tmp_path):
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = bdam_repro\n')
    notebook(tmp_path/'nbs'/'broken.ipynb', '1/0')
    r = piped(root, 'nbs/broken.ipynb', cwd=tmp_path)
    assert r.returncode == 1 and 'ZeroDivisionError' in r.stderr and 'Traceback' in r.stderr


def test_ctrl_c_saves_and_the_same_command_goes_on(root):
    "As a terminal sends it, to papermill and its kernel, after the first epoch of far too many."
    command = [PAPERMILL, *TRAIN, '-p', 'epochs', '100000', '-p', 'tag', 'cut']
    p = subprocess.Popen(command, cwd=REPO, env=environment(root), stdin=subprocess.DEVNULL, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    said = ''
    for line in p.stdout:
        said += line
        if re.match(r'epoch +1/', line): os.killpg(p.pid, signal.SIGINT)
    assert p.wait() == 130, said
    assert 'interrupted: the same command goes on' in said and 'Traceback' not in said, said
    folder, = root.glob('runs/synth/smoke/full-cut/seed0')
    assert (folder/'last.ckpt').exists() and not (folder/'metrics.json').exists()


def children(pid) -> list[int]:
    return [int(child) for task in Path(f'/proc/{pid}/task').iterdir()
            for child in (task/'children').read_text().split()]


def ended_by_sigterm(command, root, begun):
    "SIGTERM to this process alone, once something exists: what it said. It and its kernel are gone."
    p = subprocess.Popen(command, cwd=REPO, env=environment(root), stdin=subprocess.DEVNULL, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 300                                   # of a machine that is busy
        while not begun():
            assert time.monotonic() < end and p.poll() is None
            time.sleep(.02)
        kernels = children(p.pid)
        p.send_signal(signal.SIGTERM)
        said = p.communicate(timeout=120)[0]
    finally: p.kill()
    assert p.returncode == 143, said
    assert kernels and not any(Path(f'/proc/{kernel}').exists() for kernel in kernels)
    assert 'Traceback' not in said and 'Kernel died' not in said, said
    return said


@pytest.mark.skipif(not Path('/proc').exists(), reason='looks for processes in /proc')
@pytest.mark.parametrize('n', [1, 2])
def test_sigterm_to_papermill_alone_saves_and_the_same_command_goes_on(root, n):
    run = f'synth/smoke/full-ended{n}/seed0'
    asked = '-p', 'epochs', '12', '-p', 'tag', f'ended{n}', '-p', 'processes', str(n), '-p', 'device', 'cpu'
    command, folder = [PAPERMILL, *TRAIN, *asked], root/'runs'/run
    said = ended_by_sigterm(command, root, (folder/'last.ckpt').exists)
    saved = re.search(r'(?m)^stopped and saved after step (\d+) of 48: run the same again to go on$', said)
    assert saved, said
    assert step_of(folder) == int(saved[1]) > 0 and not (folder/'metrics.json').exists()
    assert said.endswith('\nstopped by SIGTERM: the same command goes on from what is saved\n')
    again = piped(root, *command[1:])
    assert again.returncode == 0 and f'resuming after step {saved[1]} of 48' in again.stdout, again.stderr
    whole = piped(root, *command[1:], '-p', 'runs', 'never_ended')
    assert whole.returncode == 0, whole.stderr
    assert bits(folder) == bits(root/'never_ended'/run)


@pytest.mark.skipif(not Path('/proc').exists(), reason='looks for processes in /proc')
def test_a_kernel_that_ignores_sigterm_is_killed(root, tmp_path):
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = bdam_repro\n')
    notebook(tmp_path/'nbs'/'deaf.ipynb', 'import signal, time\nfrom pathlib import Path',
             f'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath({str(tmp_path/"begun")!r}).touch()\n'
             'time.sleep(300)')
    code = 'from bdam_repro import engine; engine.PATIENCE = 1; from papermill import cli; cli.papermill()'
    said = ended_by_sigterm([sys.executable, '-c', code, str(tmp_path/'nbs'/'deaf.ipynb')], root,
                            (tmp_path/'begun').exists)
    assert 'its kernel did not end within 1 s of SIGTERM and was killed: the same command' in said


def test_every_user_error_is_known_by_name():
    names, found = {'UserError'}, None
    source = '\n'.join(p.read_text() for p in (REPO/'bdam_repro').glob('*.py'))
    while found != names:
        found = set(names)
        names |= set(re.findall(rf'^class (\w+)\((?:\w+, *)*(?:{"|".join(names)})\b', source, re.M))
    assert set(USER_ERRORS) == names
