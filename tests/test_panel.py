"The panel of search.ipynb in a real JupyterLab: what a person types there, and what they see."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

playwright = pytest.importorskip('playwright.sync_api')
pytest.importorskip('ipywidgets')
pytest.importorskip('jupyterlab')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if not CHROMIUM: pytest.skip('no chromium here: apt-get install chromium', allow_module_level=True)

REPO, WAIT = Path(__file__).resolve().parent.parent, 480_000      # milliseconds; a busy machine is no failure

CELL = """
import tempfile, torch
from bdam_repro.batches import train_tokenizer
from bdam_repro.config import make_config
from bdam_repro.demo import demo_people
from bdam_repro.model import build_model
from bdam_repro.panel import make_panel
from bdam_repro.search import Gallery
from bdam_repro.trained import TrainedModel
tmp = tempfile.mkdtemp()
tokenizer = train_tokenizer(['a tall woman in a red coat']*2, f'{tmp}/t', 300)
model = TrainedModel(build_model(make_config(preset='smoke'), len(tokenizer)), tokenizer)
people = demo_people(tmp, people=4, progress=False)
make_panel(Gallery.build(model, people, f'{tmp}/g', progress=False), k=4)
"""


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a notebook of one cell: its address."
    cell = dict(cell_type='code', id='panel', metadata={}, outputs=[], execution_count=None, source=CELL)
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    page = dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)
    (tmp_path/'panel.ipynb').write_text(json.dumps(page))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | {'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'HOME': str(tmp_path)}
    options = '--no-browser', '--allow-root', f'--port={port}', '--IdentityProvider.token=of-the-test'
    with open(tmp_path/'lab.log', 'w') as log:
        p = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', f'--notebook-dir={tmp_path}', *options],
                             env=env, stdout=log, stderr=log)
    end = time.monotonic() + WAIT/1000
    while time.monotonic() < end and p.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(('127.0.0.1', port)) == 0: break
        time.sleep(.5)
    assert p.poll() is None, (tmp_path/'lab.log').read_text()[-2000:]
    yield f'http://127.0.0.1:{port}/lab/tree/panel.ipynb?token=of-the-test'
    p.terminate()
    p.wait(60)


def run_first_cell(tab):
    """Shift+Enter once the kernel is idle, and again while nothing has run.

    A page that is still being built takes the key and does nothing with it."""
    tab.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').first.wait_for(timeout=WAIT)
    prompt = tab.locator('.jp-CodeCell .jp-InputPrompt').first
    for _ in range(20):
        tab.locator('.jp-CodeCell .cm-content').first.click()
        tab.keyboard.press('Shift+Enter')
        try: playwright.expect(prompt).to_contain_text(re.compile(r'\[[*\d]'), timeout=20_000)
        except AssertionError: continue
        return
    raise AssertionError('the cell never ran')


@pytest.mark.timeout(1800)
def test_the_panel_in_jupyterlab(lab):
    expect = playwright.expect
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        tab = browser.new_page(viewport={'width': 1200, 'height': 1200})
        tab.set_default_timeout(WAIT)
        tab.goto(lab)
        run_first_cell(tab)
        panel = tab.locator('.jp-OutputArea-output .widget-vbox').first
        expect(panel.locator('figure')).to_have_count(4, timeout=WAIT)
        text = panel.locator('input[type=text]').first
        text.fill('a man in blue')
        text.press('Enter')
        expect(panel).to_contain_text('a man in blue', timeout=WAIT)
        panel.get_by_role('button', name='fused').click()
        expect(panel).to_contain_text('fusion', timeout=WAIT)
        panel.locator('select').last.select_option('2')
        expect(panel).to_contain_text(re.compile('raises the score'), timeout=WAIT)
        expect(panel.locator('figure')).to_have_count(4 + 3, timeout=WAIT)
        text.fill(' ')
        text.press('Enter')
        expect(panel.get_by_role('alert')).to_contain_text('in a few words', timeout=WAIT)
        browser.close()
