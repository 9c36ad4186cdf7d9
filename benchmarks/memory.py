"""What a training step of the paper's sizes keeps for the backward pass, counted on a CPU.

    python benchmarks/memory.py            # a minute or two; prints a table and writes tables/memory.csv

Every tensor that autograd saves is counted once, whatever shares it. This is what grows with the batch;
weights, gradients and Adam's two moments come on top, and do not. No download: the encoders have the sizes of
ViT-B/16 and BERT-base and random weights.
"""
import argparse

import pandas as pd
import torch

from bdam_repro.config import ROOT, atomic_path, make_config
from bdam_repro.model import build_model
from bdam_repro.trainer import run_autocast

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
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
