"The search page in a headless Chromium: what a person does there, and what they see."
# ruff: noqa: F811 (fixtures)
import re
import shutil

import pytest
from demo_server import WAIT, home, url  # noqa: F401

pytest.importorskip('gradio')
playwright = pytest.importorskip('playwright.sync_api')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if not CHROMIUM: pytest.skip('no chromium here: apt-get install chromium', allow_module_level=True)


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


