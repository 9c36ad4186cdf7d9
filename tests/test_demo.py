"The search page in a headless Chromium: what a person does there, and what they see."
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bdam_repro.batches import train_tokenizer
from bdam_repro.config import make_config
from bdam_repro.demo import demo_people
from bdam_repro.model import build_model
from bdam_repro.trained import TrainedModel

pytest.importorskip('gradio')
playwright = pytest.importorskip('playwright.sync_api')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if not CHROMIUM: pytest.skip('no chromium here: apt-get install chromium', allow_module_level=True)

REPO = Path(__file__).resolve().parent.parent
WAIT = 60_000      # milliseconds; a busy machine is no failure


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('demo')
    texts = ['a tall woman in a red coat with a black bag', 'a man in blue']
    tokenizer = train_tokenizer(texts, home/'t', 300)
    torch.manual_seed(0)
    model = TrainedModel(build_model(make_config(preset='smoke'), len(tokenizer)), tokenizer)
    model.save_file(home/'model.safetensors')
    ds = demo_people(str(home/'data'), people=6, progress=False)
    shutil.copytree(ds.images_dir, home/'pictures')
    (home/'broken.jpg').write_text('no picture')
    return home


def start(home, *arguments):
    env = os.environ | {'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'BDAM_ROOT': str(home)}
    code = 'from bdam_repro.demo import demo_main; demo_main()'
    return subprocess.Popen([sys.executable, '-c', code, '--port', '0', *map(str, arguments)], env=env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope='module')
def url(home):
    p = start(home, '--model', home/'model.safetensors', '--data-root', home/'data', '--people', 6)
    line = p.stdout.readline()
    assert line.startswith('http://127.0.0.1:'), line + p.stderr.read()
    yield line.split()[0]
    p.send_signal(signal.SIGINT)
    p.wait(30)


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, url):
    "A fresh visitor. Whatever they do, the browser asks no other server, and logs no error."
    context = browser.new_context(viewport={'width': 1000, 'height': 900})
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    outside, errors = [], []
    ours = url, 'data:', 'blob:'
    tab.on('request', lambda r: None if r.url.startswith(ours) else outside.append(r.url))
    tab.on('pageerror', lambda e: errors.append(str(e)))
    tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    tab.goto(url)
    tab.wait_for_selector('#text textarea, #text input')
    yield tab
    assert outside == []
    assert errors == []
    context.close()


def test_the_address_that_is_printed_answers_at_once(home):
    "Who opens it in that moment waits for the page, and is not refused."
    p = start(home, '--model', home/'model.safetensors', '--data-root', home/'data', '--people', 6)
    try:
        with urllib.request.urlopen(p.stdout.readline().split()[0], timeout=WAIT/1000) as answer:
            assert answer.status == 200 and b'<html' in answer.read()
    finally:
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=60)


def field(tab): return tab.locator('#text textarea, #text input').first
def cards(tab): return tab.locator('#results figure')
def status(tab): return tab.locator('#status [role=status]')


def ask(tab, text):
    field(tab).fill(text)
    tab.click('#go')


def test_type_submit_rerank_why(tab):
    ask(tab, 'a tall woman in a red coat')
    playwright.expect(cards(tab)).to_have_count(10, timeout=WAIT)
    first = cards(tab).first.locator('img')
    assert first.get_attribute('src').startswith('data:image/jpeg')
    assert first.get_attribute('alt').startswith('rank 1')
    assert 'person' in cards(tab).first.inner_text()
    playwright.expect(status(tab)).to_contain_text('10 pictures found', timeout=WAIT)
    tab.locator('#score label', has_text='fused').click()
    playwright.expect(tab.locator('#results')).to_contain_text('fusion', timeout=WAIT)
    tab.click('#ask')
    playwright.expect(tab.locator('#why figure')).to_have_count(3, timeout=WAIT)
    assert 'raises the score' in tab.locator('#why').inner_text()


def test_an_example_is_a_click_away(tab):
    tab.get_by_text('a man with a blue backpack and dark trousers').last.click()
    playwright.expect(field(tab)).to_have_value(re.compile('blue backpack'), timeout=WAIT)
    tab.click('#go')
    playwright.expect(cards(tab)).to_have_count(10, timeout=WAIT)


def test_the_keyboard_alone(tab):
    tab.keyboard.type('a man in blue')                           # the cursor is there already
    tab.keyboard.press('Enter')
    playwright.expect(cards(tab)).to_have_count(10, timeout=WAIT)
    def tab_to(selector):
        for _ in range(40):
            if tab.evaluate('s => !!document.activeElement.closest(s)', selector): return
            tab.keyboard.press('Tab')
        raise AssertionError(f'{selector} cannot be reached by Tab')
    tab_to('#score input[value=fused]')
    tab.keyboard.press('Space')
    playwright.expect(tab.locator('#results')).to_contain_text('fusion', timeout=WAIT)
    for part in ('#where', '#go', '#rank', '#ask'): tab_to(part)
    tab.keyboard.press('Enter')
    playwright.expect(tab.locator('#why figure')).to_have_count(3, timeout=WAIT)


def test_bad_input_is_answered(tab):
    playwright.expect(status(tab)).to_contain_text('Nothing searched yet', timeout=WAIT)
    ask(tab, '   ')
    playwright.expect(tab.locator('#results [role=alert]')).to_contain_text('in a few words', timeout=WAIT)
    ask(tab, 'x'*1001)
    playwright.expect(tab.locator('#results [role=alert]')).to_contain_text('1,000 at most', timeout=WAIT)
    ask(tab, '<img src=x onerror=alert(1)> ☃ 我 🙂')
    playwright.expect(cards(tab)).to_have_count(10, timeout=WAIT)
    assert '<img src=x' in tab.locator('#results').inner_text()
    tab.locator('#where label', has_text='my pictures').click()
    playwright.expect(tab.locator('#results [role=alert]')).to_contain_text('No pictures of', timeout=WAIT)


def test_own_pictures(tab, home):
    tab.get_by_text('My pictures').last.click()
    some = sorted(map(str, (home/'pictures').rglob('*.jpg')))[:4]
    tab.locator('#files input[type=file]').set_input_files([*some, str(home/'broken.jpg')])
    playwright.expect(tab.locator('#brought')).to_contain_text('4 pictures are ready', timeout=WAIT)
    playwright.expect(tab.locator('#brought')).to_contain_text('broken.jpg (unreadable)', timeout=WAIT)
    ask(tab, 'a man')
    playwright.expect(cards(tab)).to_have_count(4, timeout=WAIT)


def test_a_phone_needs_no_sideways_scrolling(tab):
    tab.set_viewport_size({'width': 360, 'height': 700})
    ask(tab, 'a tall woman in a red coat')
    playwright.expect(cards(tab)).to_have_count(10, timeout=WAIT)
    tab.click('#ask')
    playwright.expect(tab.locator('#why figure')).to_have_count(3, timeout=WAIT)
    assert tab.evaluate('document.documentElement.scrollWidth') <= 360


def test_only_this_machine_by_its_own_name(url):
    import httpx
    port = url.rsplit(':', 1)[1]
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={'Host': f'elsewhere.example:{port}'}).status_code == 400
    assert "default-src 'self'" in httpx.get(url).headers['Content-Security-Policy']
    assert not re.search(r'(src|href)="https?:', httpx.get(url).text.replace(url, ''))


def test_own_folder_and_clear_lines(home):
    p = start(home, '--model', home/'model.safetensors', '--folder', home/'pictures')
    assert p.stdout.readline().startswith('http://127.0.0.1:')
    p.send_signal(signal.SIGINT)
    p.wait(30)
    for arguments, said in ((('--model', home/'none.safetensors'), 'no file'),
                            (('--model', home/'model.safetensors', '--folder', home/'t'), 'no pictures in')):
        p = start(home, *arguments)
        _, err = p.communicate(timeout=250)
        assert p.returncode == 1 and said in err.splitlines()[-1], err
        assert 'Traceback' not in err


def test_many_visitors_at_once(home):
    "Shortened: 20 for five seconds. `benchmarks/bench_demo.py` sends 50 for two minutes."
    sys.path.insert(0, str(REPO/'benchmarks'))
    from bench_demo import measure
    arguments = ['--model', str(home/'model.safetensors'), '--data-root', str(home/'data'), '--people', '6']
    with ThreadPoolExecutor(1) as thread:                # playwright has an event loop in this one
        found = thread.submit(measure, arguments, users=20, seconds=5).result()
    assert found['errors'] == 0, found
    assert found['searches'] >= 20, found
