"Encoders against checkpoints in the hub's own layout, written here, and against what a user can get wrong."
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from bdam_repro.config import UserError
from bdam_repro.encoders import TextEncoder, VisionEncoder, encoder_config, resize_positions

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
VIT = {'type': 'vit', 'hidden': 32, 'layers': 2, 'heads': 4, 'patch': 8}
BERT = {'type': 'bert', 'hidden': 32, 'layers': 2, 'heads': 4}
CLIP_V = {'type': 'clip', 'hidden': 32, 'layers': 2, 'heads': 4, 'patch': 8, 'projection': 16}
CLIP_T = {'type': 'clip', 'hidden': 32, 'layers': 2, 'heads': 4, 'projection': 16}


def noisy(net):
    "Random values everywhere: fresh layers have zero biases and unit norms, which would hide a swapped key."
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn_like(p)*.1)
    return net.eval()


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "A ViT classifier, a pretraining BERT with the old gamma/beta names, and a whole CLIP, as on the hub."
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('hub')
    vit = noisy(ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)))
    vit.save_pretrained(root/'vit')
    stats = {'image_mean': [.1, .2, .3], 'image_std': [.5, .6, .7]}
    (root/'vit'/'preprocessor_config.json').write_text(json.dumps(stats))
    noisy(BertForPreTraining(BertConfig(**SMALL, vocab_size=99))).save_pretrained(root/'bert')
    old_name = lambda k: k.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')
    rename(root/'bert', old_name)
    text = dict(SMALL, vocab_size=99, bos_token_id=97, eos_token_id=98)
    vision = dict(SMALL, image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    noisy(CLIPModel(config)).save_pretrained(root/'clip')
    return root


def rename(folder, f):
    weights = load_file(folder/'model.safetensors')
    save_file({f(k): v for k, v in weights.items()}, folder/'model.safetensors', metadata={'format': 'pt'})


def copy(folder, to, change=lambda weights: weights):
    to.mkdir()
    for f in folder.iterdir(): (to/f.name).write_bytes(f.read_bytes())
    weights = change(load_file(folder/'model.safetensors'))
    save_file(weights, to/'model.safetensors', metadata={'format': 'pt'})
    return to


def texts(n=3, length=12, vocab=97):
    ids = torch.randint(5, vocab, (n, length))
    mask = torch.arange(length) < torch.tensor([[length], [length//2], [3]])[:n]
    return ids*mask, mask


def test_hub_layout_of_the_fixture(hub):
    assert 'vit.encoder.layer.0.attention.attention.query.weight' in load_file(hub/'vit'/'model.safetensors')
    assert 'bert.encoder.layer.1.output.LayerNorm.gamma' in load_file(hub/'bert'/'model.safetensors')


def test_vit_equals_the_librarys_at_its_own_size(hub):
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours = VisionEncoder(hub/'vit', image_size=(32, 32)).eval()
    theirs = ViTModel.from_pretrained(hub/'vit', add_pooling_layer=False).eval()
    mean, std = torch.tensor([.1, .2, .3]).view(3, 1, 1), torch.tensor([.5, .6, .7]).view(3, 1, 1)
    want = theirs(pixel_values=(x/255 - mean)/std).last_hidden_state
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
    assert ours.dim == 32 and ours.patch == 8 and ours.grid == (4, 4)


@pytest.mark.parametrize('size', [(64, 24), (16, 16), (24, 64)])
def test_vit_equals_the_librarys_interpolation_at_other_sizes(hub, size):
    x = torch.rand(2, 3, *size)
    theirs = ViTModel.from_pretrained(hub/'vit', add_pooling_layer=False).eval()
    mean, std = torch.tensor([.1, .2, .3]).view(3, 1, 1), torch.tensor([.5, .6, .7]).view(3, 1, 1)
    want = theirs(pixel_values=(x - mean)/std, interpolate_pos_encoding=True).last_hidden_state
    ours = VisionEncoder(hub/'vit', image_size=size).eval()
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)


def test_bert_equals_the_librarys_and_ignores_padding(hub):
    ids, mask = texts()
    ours = TextEncoder(hub/'bert', vocab_size=99).eval()
    theirs = BertModel.from_pretrained(hub/'bert', add_pooling_layer=False).eval()
    tokens = ours(ids, mask)
    want = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(tokens[mask], want[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.pool(tokens, mask), tokens[:, 0])
    torch.testing.assert_close(ours(ids[1:2, :6], mask[1:2, :6]), tokens[1:2, :6], rtol=1e-4, atol=1e-4)


def test_clip_equals_the_librarys_features(hub):
    clip = CLIPModel.from_pretrained(hub/'clip').eval()
    vision, text = VisionEncoder(hub/'clip', image_size=(32, 32)).eval(), TextEncoder(hub/'clip').eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = vision.mean/255, vision.std/255
    want = clip.get_image_features(pixel_values=(x - mean)/std).pooler_output
    torch.testing.assert_close(vision(x)[:, 0], want, rtol=1e-4, atol=1e-4)
    ids, mask = texts()
    ids[torch.arange(3), mask.sum(1) - 1] = 98  # the closing token
    want = clip.get_text_features(input_ids=ids, attention_mask=mask.long()).pooler_output
    torch.testing.assert_close(text.pool(text(ids, mask), mask), want, rtol=1e-4, atol=1e-4)
    assert vision.dim == text.dim == 16


def test_clip_runs_on_a_grid_that_is_not_square(hub):
    encoder = VisionEncoder(hub/'clip', image_size=(64, 24)).eval()
    tokens = encoder(torch.rand(2, 3, 64, 24))
    assert tokens.shape == (2, 1 + 8*3, 16)
    table = load_file(hub/'clip'/'model.safetensors')['vision_model.embeddings.position_embedding.weight']
    resized = encoder.net.vision_model.embeddings.position_embedding.weight.data
    torch.testing.assert_close(resized, resize_positions(table, (4, 4), (8, 3)))


def cases():
    "Class, spec, options and inputs of the four towers."
    pixels = (torch.rand(2, 3, 32, 16),)
    size, vocab = {'image_size': (32, 16)}, {'vocab_size': 99}
    return [(VisionEncoder, VIT, size, pixels), (VisionEncoder, CLIP_V, size, pixels),
            (TextEncoder, BERT, vocab, texts()), (TextEncoder, CLIP_T, vocab, texts())]


def test_every_parameter_gets_a_gradient():
    for kind, spec, options, inputs in cases():
        encoder = kind(spec, **options)
        encoder(*inputs).square().mean().backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


def kept_for_backward(net, inputs):
    "How many numbers the forward pass keeps; gradients are left in the parameters."
    count = [0]
    def pack(t):
        count[0] += t.numel()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): net(*inputs).square().mean().backward()
    return count[0]


def test_gradient_checkpointing_changes_nothing_but_memory():
    for kind, spec, options, inputs in cases():
        plain, saving = kind(spec, **options).train(), kind(spec, **options, checkpoint=True).train()
        saving.load_state_dict(plain.state_dict())
        assert kept_for_backward(saving, inputs) < kept_for_backward(plain, inputs)/2
        for a, b in zip(plain.parameters(), saving.parameters()): torch.testing.assert_close(a.grad, b.grad)


def test_bf16_autocast_stays_close():
    for kind, spec, options, inputs in cases():
        encoder = kind(spec, **options).eval()
        with torch.autocast('cpu', torch.bfloat16): low = encoder(*inputs)
        torch.testing.assert_close(low.float(), encoder(*inputs), rtol=.1, atol=.1)


def test_config_rebuilds_without_hub_or_folder(hub):
    size, pixels = {'image_size': (64, 24)}, (torch.rand(2, 3, 64, 24),)
    for kind, spec, kw, inputs in [(VisionEncoder, hub/'vit', size, pixels),
                                   (VisionEncoder, hub/'clip', size, pixels),
                                   (VisionEncoder, VIT, size | {'dropout': .1}, pixels),
                                   (TextEncoder, hub/'bert', {}, texts()),
                                   (TextEncoder, hub/'clip', {}, texts())]:
        encoder = kind(spec, **kw).eval()
        again = kind.from_config(json.loads(json.dumps(encoder_config(encoder)))).eval()
        again.load_state_dict(encoder.state_dict())
        assert torch.equal(again(*inputs), encoder(*inputs))
        assert encoder_config(again) == encoder_config(encoder)


def test_dropout_is_set_and_survives_saving():
    saved = encoder_config(VisionEncoder(VIT, image_size=(32, 16), dropout=.3))
    encoder = VisionEncoder.from_config(saved).train()
    x = torch.rand(1, 3, 32, 16)
    assert not torch.equal(encoder(x), encoder(x))
    assert {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)} == {.3}
    still = VisionEncoder(VIT, image_size=(32, 16)).train()
    assert torch.equal(still(x), still(x))


def one_line(e, *words):
    assert '\n' not in str(e.value)
    for w in words: assert w in str(e.value)


def test_missing_weights_are_refused(hub, tmp_path):
    drop = lambda w: {k: v for k, v in w.items() if 'layer.1.output.dense' not in k}
    with pytest.raises(UserError) as e:
        VisionEncoder(copy(hub/'vit', tmp_path/'a', drop), image_size=(32, 32))
    one_line(e, 'lacks 2 weights', 'layers.1')
    with pytest.raises(UserError) as e: TextEncoder(copy(hub/'bert', tmp_path/'b', drop))
    one_line(e, 'lacks 2 weights')
    no_projection = lambda w: {k: v for k, v in w.items() if k != 'text_projection.weight'}
    with pytest.raises(UserError) as e: TextEncoder(copy(hub/'clip', tmp_path/'c', no_projection))
    one_line(e, 'lacks 1 weights', 'text_projection')


def test_unknown_weights_are_refused(hub, tmp_path):
    more = lambda w: w | {'adapter.weight': torch.zeros(3)}
    with pytest.raises(UserError) as e:
        VisionEncoder(copy(hub/'vit', tmp_path/'a', more), image_size=(32, 32))
    one_line(e, 'unknown', 'adapter.weight')
    with pytest.raises(UserError) as e:
        third_layer = {'bert.encoder.layer.2.output.dense.bias': torch.zeros(32)}
        TextEncoder(copy(hub/'bert', tmp_path/'b', lambda w: w | third_layer))
    one_line(e, 'unknown', 'layer.2')


def test_shapes_that_do_not_fit_are_refused(hub, tmp_path):
    seven = {'vit.encoder.layer.0.attention.attention.query.bias': torch.zeros(7)}
    folder = copy(hub/'vit', tmp_path/'a', lambda w: w | seven)
    with pytest.raises(UserError) as e: VisionEncoder(folder, image_size=(32, 32))
    one_line(e, 'misshapen', 'q_proj.bias')


def test_pickles_are_refused(hub, tmp_path):
    folder = copy(hub/'vit', tmp_path/'a')
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()
    with pytest.raises(UserError) as e: VisionEncoder(folder, image_size=(32, 32))
    one_line(e, '.bin', 'convert')


def test_damaged_weights_are_refused(hub, tmp_path):
    folder = copy(hub/'bert', tmp_path/'a')
    whole = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(UserError) as e: TextEncoder(folder)
    one_line(e, 'model.safetensors')


@pytest.mark.parametrize('content, words', [(None, 'no config.json'), ('{', 'not JSON'),
                                            ('[]', 'not a JSON object'),
                                            ('{"model_type": "gpt2"}', "type 'gpt2'")])
def test_a_folder_that_is_no_checkpoint(tmp_path, content, words):
    if content is not None: (tmp_path/'config.json').write_text(content)
    with pytest.raises(UserError) as e: VisionEncoder(tmp_path, image_size=(32, 32))
    one_line(e, words, str(tmp_path))


def test_a_tower_of_the_wrong_kind(hub):
    with pytest.raises(UserError) as e: VisionEncoder(hub/'bert', image_size=(32, 32))
    one_line(e, 'vision encoder is one of')
    with pytest.raises(UserError) as e: TextEncoder(hub/'vit')
    one_line(e, 'text encoder is one of')


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as e: VisionEncoder(tmp_path/'none', image_size=(32, 32))
    one_line(e, 'no folder')


def test_the_hub_out_of_reach_names_the_way_out(tmp_path):
    code = ("from bdam_repro.config import UserError\nfrom bdam_repro.encoders import VisionEncoder\n"
            "try: VisionEncoder('vit-base-patch16-224', image_size=(384, 128))\n"
            "except UserError as e: print(e)")
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert out.stdout.count('\n') == 1, out.stderr
    assert 'google/vit-base-patch16-224' in out.stdout
    assert 'HF_HUB_OFFLINE' in out.stdout
    assert 'folder' in out.stdout


def test_options_are_checked():
    size, no_hidden = (32, 16), {'type': 'vit', 'layers': 2, 'heads': 4}
    for make, word in [(lambda: VisionEncoder({**VIT, 'depth': 3}, image_size=size), "'depth' is unknown"),
                       (lambda: VisionEncoder({**VIT, 'type': 'bert'}, image_size=size), 'none of vit, clip'),
                       (lambda: VisionEncoder({**VIT, 'heads': 5}, image_size=(32, 16)), '5 heads'),
                       (lambda: VisionEncoder(no_hidden, image_size=size), "lack 'hidden'"),
                       (lambda: VisionEncoder(VIT, image_size=(33, 16)), '33×16'),
                       (lambda: VisionEncoder(VIT, image_size=(0, 16)), '0×16'),
                       (lambda: TextEncoder(BERT), 'vocab_size')]:
        with pytest.raises(UserError) as e: make()
        one_line(e, word)


def test_tokenizer_and_lengths_are_checked_against_the_checkpoint(hub):
    with pytest.raises(UserError) as e: TextEncoder(hub/'bert', vocab_size=100)
    one_line(e, '100 tokens', '99')
    with pytest.raises(UserError) as e: TextEncoder(hub/'clip', max_length=78)
    one_line(e, '78 tokens', '77')
    with pytest.raises(ValueError, match='built for 8'): TextEncoder(hub/'bert', max_length=8)(*texts())
    with pytest.raises(ValueError, match='built for'):
        VisionEncoder(hub/'vit', image_size=(32, 32))(torch.rand(1, 3, 64, 32))
