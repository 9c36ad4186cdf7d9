"""What a training step of the paper's sizes keeps for the backward pass, counted on a CPU.

    python benchmarks/memory.py            # a minute or two; prints a table and writes tables/memory.csv
    python benchmarks/memory.py --measure  # minutes, 6 GB: the peak of a forward and a backward pass

Every tensor that autograd saves is counted once, whatever shares it. This is what grows with the batch;
weights, gradients and Adam's two moments come on top, and do not. No download: the encoders have the sizes of
ViT-B/16 and BERT-base and random weights.

`--measure` asks the operating system instead: in a fresh process, how far the resident memory rises while the
gradients of one batch are computed, above weights and gradients, which are there before.
"""
import argparse
import os
from unittest.mock import patch

import pandas as pd
import torch

from bdam_repro.config import ROOT, atomic_path, make_config
from bdam_repro.measuring import WorkProcess
from bdam_repro.model import build_model
from bdam_repro.trainer import Trainer, run_autocast
from bdam_repro.workloads import OneBatch, pairs_batch

VISION = {'type': 'vit', 'hidden': 768, 'layers': 12, 'heads': 12, 'patch': 16}
TEXT = {'type': 'bert', 'hidden': 768, 'layers': 12, 'heads': 12}
OPTIONS = {'float32': {}, 'bf16': dict(amp='bf16'), 'float32, grad_checkpoint': dict(grad_checkpoint=True),
           'bf16, grad_checkpoint': dict(amp='bf16', grad_checkpoint=True)}


def saved_bytes(forward) -> int:
    "Bytes of the storages that autograd keeps during `forward`, parameters left out by the caller."
    kept = {}
    def pack(x):
        if not isinstance(x, torch.nn.Parameter): kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): out = forward()
    own = {p.untyped_storage().data_ptr() for p in out[1]}
    return sum(s.nbytes() for key, s in kept.items() if key not in own)


def per_image(options: dict) -> tuple[float, float, int]:
    """Bytes per image of the towers, bytes that do not grow with the batch (weights in bf16), and weights.

    Per image there are a caption, an identity and a clothing description of 77 words each."""
    c = make_config('cuhk', 'paper', vision=VISION, text=TEXT, vocab_size=30522, **options)
    torch.manual_seed(0)
    model = build_model(c).train()
    def of_batch(n):
        pictures = torch.randint(0, 256, (n, 3, c.image_height, c.image_width), dtype=torch.uint8)
        ids = torch.randint(5, c.vocab_size, (n, c.max_length))
        text = ids, torch.ones_like(ids, dtype=torch.bool)
        def forward():
            with run_autocast(torch.device('cpu'), torch.bfloat16 if c.amp == 'bf16' else None):
                out = model.encode(pictures, text, text, text)
            return out, list(model.parameters())
        return saved_bytes(forward)
    two, four = of_batch(2), of_batch(4)
    return (four - two)/2, two - (four - two), sum(p.numel() for p in model.parameters())


def gradients_once(batch: int, **options):
    "A workload: the gradients of one batch, as the trainer computes them in a step."
    c = make_config('cuhk', 'paper', vision=VISION, text=TEXT, vocab_size=30522, device='cpu', **options)
    data = pairs_batch(batch, (c.image_height, c.image_width), c.max_length, 3)
    trainer = Trainer(c, build_model(c, c.vocab_size), OneBatch([data]), torch.device('cpu'))
    trainer.steps = 1000
    for p in trainer.model.parameters(): p.grad = torch.ones_like(p)      # written, so it is resident
    for opt in trainer.opts: opt.zero_grad = lambda *_: [p.grad.zero_() for p in trainer.model.parameters()]
    return lambda: float(sum(x.detach() for x in trainer.gradients(data).values()))


def measure(batch: int = 8) -> None:
    "The peak of one batch by option, each in a fresh process whose allocator gives back what is freed."
    rows = []
    for name, options in OPTIONS.items():
        options = {'amp': 'off'} | options
        for accumulate in (1, 4):
            with patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536'):
                side = WorkProcess('benchmarks.memory:gradients_once', batch=batch,
                                   accumulate=accumulate, **options)
            with side: mb = side.round()['mb']
            said = name if accumulate == 1 else f'{name}, accumulate={accumulate}'
            rows.append({'options': said, 'peak, MiB': round(mb), 'MB per image': round(mb*2**20/1e6/batch)})
            print(rows[-1], flush=True)
    print(f'batch of {batch}')
    print(pd.DataFrame(rows).to_string(index=False))


def main():
    rows = []
    for name, options in OPTIONS.items():
        one, fixed, params = per_image(options)
        for accumulate in (1, 4):
            said = name if accumulate == 1 else f'{name}, accumulate={accumulate}'
            row = {'options': said, 'MB per image': round(one/1e6, 1)}
            for n in (32, 64, 128): row[f'GiB, batch {n}'] = round((fixed + one*n/accumulate)/2**30, 1)
            rows.append(row)
        print(rows[-2], flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    print(f'besides, for {params/1e6:.0f} M weights, their gradients and Adam: {16*params/2**30:.1f} GiB')
    with atomic_path(ROOT/'tables'/'memory.csv') as tmp: table.to_csv(tmp, index=False)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--measure', action='store_true', help='the peak of resident memory, not the count')
    p.add_argument('--batch', type=int, default=8, help='of the measurement')
    a = p.parse_args()
    if a.measure: measure(a.batch)
    else: main()
