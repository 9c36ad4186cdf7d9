"The search page, started as `make demo` starts it, for the tests with a browser and those without."
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdam_repro.batches import train_tokenizer
from bdam_repro.config import make_config
from bdam_repro.demo import demo_people
from bdam_repro.model import build_model
from bdam_repro.trained import TrainedModel

REPO = Path(__file__).resolve().parent.parent
WAIT = 480_000     # milliseconds; a busy machine is no failure


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
