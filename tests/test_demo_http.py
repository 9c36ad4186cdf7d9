"The search page over HTTP, without a browser: who may ask, what comes back, how it ends."
# ruff: noqa: F811 (fixtures)
import re
import signal
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from demo_server import REPO, WAIT, home, start, url  # noqa: F401

pytest.importorskip('gradio')


def test_the_address_that_is_printed_answers_at_once(home):
    "Who opens it in that moment waits for the page, and is not refused."
    p = start(home, '--model', home/'model.safetensors', '--data-root', home/'data', '--people', 6)
    try:
        with urllib.request.urlopen(p.stdout.readline().split()[0], timeout=WAIT/1000) as answer:
            assert answer.status == 200 and b'<html' in answer.read()
    finally:
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=60)


def test_only_this_machine_by_its_own_name(url):
    import httpx
    port = url.rsplit(':', 1)[1]
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={'Host': f'elsewhere.example:{port}'}).status_code == 400
    assert "default-src 'self'" in httpx.get(url).headers['Content-Security-Policy']
    assert not re.search(r'(src|href)="https?:', httpx.get(url).text.replace(url, ''))


def test_own_folder_and_clear_lines(home):
    p = start(home, '--model', home/'model.safetensors', '--folder', home/'pictures')
    with urllib.request.urlopen(p.stdout.readline().split()[0], timeout=WAIT/1000) as answer:
        assert answer.status == 200                       # it runs, so it listens to signals
    p.send_signal(signal.SIGINT)
    p.wait(60)
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
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(measure, arguments, users=20, seconds=5).result()
    assert found['errors'] == 0, found
    assert found['searches'] >= 20, found
