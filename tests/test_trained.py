"A model goes to the hub and comes back, against a small server that speaks the hub's protocol."
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from bdam_repro.batches import train_tokenizer
from bdam_repro.config import make_config
from bdam_repro.model import build_model
from bdam_repro.trained import TrainedModel

REPO, COMMIT = Path(__file__).resolve().parent.parent, 'a'*40
EVALUATION = dict(dataset='SynthPEDES', split='test', queries=64, images=32, people=8, rerank=8,
                  scores={'dual': {'R1': 14.1, 'R1 95 %': '7.8 … 20.3', 'R5': 50., 'R10': 70., 'mAP': 25.}})


class Hub(BaseHTTPRequestHandler):
    "One repository in a folder; the requests that huggingface_hub makes, and no others."
    def log_message(self, *args): pass

    def answer(self, body, code=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        headers |= {'Content-Length': str(len(data))}
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        here = f'http://{self.headers["Host"]}/somebody/people'
        kind = self.path.split('?')[0].rsplit('/', 2)
        if self.path == '/api/repos/create': return self.answer({'url': here})
        if self.path == '/api/validate-yaml': return self.answer({'errors': [], 'warnings': []})
        if kind[1] == 'preupload':
            asked = json.loads(data)['files']
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in asked]
            return self.answer({'files': files})
        if kind[1] == 'commit':
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry['key'] != 'file': continue
                file = self.server.folder/entry['value']['path']
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry['value']['content']))
            return self.answer({'success': True, 'commitOid': COMMIT, 'commitUrl': f'{here}/commit/{COMMIT}'})
        return self.answer({'error': self.path}, 404)

    def do_GET(self):
        path, files = self.path.split('?')[0], sorted(p for p in self.server.folder.rglob('*') if p.is_file())
        names = [str(p.relative_to(self.server.folder)) for p in files]
        if path.startswith('/api/models/somebody/people/tree'):
            sizes = [(n, p.stat().st_size) for n, p in zip(names, files)]
            tree = [dict(type='file', path=n, size=size, oid='0'*40) for n, size in sizes]
            return self.answer(tree)
        if path.startswith('/api/models/somebody/people'):
            siblings = [dict(rfilename=n) for n in names]
            return self.answer(dict(id='somebody/people', sha=COMMIT, siblings=siblings, private=False,
                                    downloads=0, likes=0, tags=[]))
        name = path.removeprefix('/somebody/people/resolve/').partition('/')[2]
        if name not in names:
            return self.answer({'error': 'no entry'}, 404, **{'X-Error-Code': 'EntryNotFound'})
        data = (self.server.folder/name).read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(data, ETag=f'"{etag}"', **{'X-Repo-Commit': COMMIT})

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder = tmp_path/'hub'
    server.folder.mkdir()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def python(code, *args, **env):
    env = os.environ | {'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'HF_HUB_DISABLE_XET': '1'} | env
    p = subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout


def test_push_to_hub_and_back(hub, tmp_path):
    tokenizer = train_tokenizer(['a tall woman in a red coat']*2, tmp_path/'tokenizer', 300)
    torch.manual_seed(0)
    model = build_model(make_config(preset='smoke'), len(tokenizer))
    model = TrainedModel(model, tokenizer, 'somebody/people', EVALUATION)
    file = model.save_file(tmp_path/'model.safetensors')
    address = f'http://127.0.0.1:{hub.server_port}'
    push = '''
import sys
from bdam_repro.trained import TrainedModel
model = TrainedModel.from_pretrained(sys.argv[1])
model.name = 'somebody/people'
print(model.push_to_hub('somebody/people', token='of-nobody'))
'''
    load = '''
from bdam_repro.trained import TrainedModel
model = TrainedModel.from_pretrained('somebody/people')
print(model.sha256, model.name)
'''
    said = python(push, file, HF_ENDPOINT=address, HF_HOME=str(tmp_path/'pusher'))
    assert COMMIT in said
    there = {p.name for p in hub.folder.iterdir()}
    assert there == {'README.md', 'config.json', 'evaluation.json', 'model.safetensors', 'tokenizer.json',
                     'tokenizer_config.json'}
    card = (hub.folder/'README.md').read_text()
    for needed in ('library_name: bdam-repro', 'license: apache-2.0', "from_pretrained('somebody/people')",
                   '64 queries', '14.1 | 7.8 … 20.3', 'is no identification'): assert needed in card, needed
    cache = dict(HF_HOME=str(tmp_path/'reader'))
    assert python(load, HF_ENDPOINT=address, **cache).split() == [model.sha256, 'somebody/people']
    assert python(load, HF_HUB_OFFLINE='1', **cache).split()[0] == model.sha256       # again, offline
