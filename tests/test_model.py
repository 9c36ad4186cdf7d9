"""The whole model: who may see whom, what each switch and parameter does, damaged and foreign files."""
import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from bdam_repro.batches import Batch
from bdam_repro.bdam import BDAM
from bdam_repro.config import VARIANTS, UserError, make_config
from bdam_repro.files import read_tensors, write_tensors
from bdam_repro.fusion import MambaFusion
from bdam_repro.model import (
    ImageFeatures,
    TextFeatures,
    build_model,
    candidates,
    dual,
    fuse,
    invalid_pair_scores,
    match_score,
    rescore,
)
from bdam_repro.objective import batch_losses, forward
from bdam_repro.pretrained import from_pretrained, save_pretrained
from bdam_repro.threads import SecondThread

CLIP = dict(vision={'type': 'clip', 'hidden': 32, 'layers': 2, 'heads': 2, 'patch': 16},
            text={'type': 'clip', 'hidden': 32, 'layers': 2, 'heads': 2})
READINGS = {'pooled': {}, 'tokens': dict(fusion_input='tokens'), 'cosine': dict(fusion_loss='infonce'),
            'transformer': dict(fusion_input='tokens', fusion_kind='transformer'),
            'cross': dict(fusion_input='tokens', fusion_kind='cross'), 'product': dict(fusion_kind='product'),
            'both ways': dict(fusion_input='tokens', fusion_order='text', fusion_scan='both',
                              fusion_read='second'),
            'encoder': dict(image_feature='encoder'), 'before the gate': dict(image_feature='pooled'),
            'mean': dict(text_pool='mean'), 'clip': CLIP}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make(seed: int = 0, **kw):
    "A smoke model in evaluation mode, with noise on every weight, so that no zero bias hides a path."
    torch.manual_seed(seed)
    model = build_model(make_config(preset='smoke', **kw)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    return model


def pixels(n: int): return torch.randint(0, 256, (n, 3, 64, 32), dtype=torch.uint8)

def words(n: int, length: int = 11):
    "Texts of several lengths, padded on the right with zeros."
    mask = torch.arange(length) < torch.tensor([length - i % 5 for i in range(n)])[:, None]
    return torch.randint(5, 600, (n, length))*mask, mask

def encode(model, n: int = 6):
    with torch.no_grad(): return model.encode_text(*words(n)), model.encode_image(pixels(n))

def pairs(n: int): return torch.arange(n), torch.arange(n).flip(0)

def fuse_all(model, q, g, n: int = 6):
    "n texts, each with another image."
    i, j = pairs(n)
    return fuse(model, q, i, g, j)

def same(a: torch.Tensor, b: torch.Tensor) -> bool: return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


# --- who may see whom ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('reading', READINGS)
def test_no_gradient_from_a_text_to_a_pixel_or_from_an_image_to_a_word(reading):
    model = make(**READINGS[reading])
    images = pixels(4).float().div(255).requires_grad_()
    table = next(m for m in model.text.modules() if isinstance(m, torch.nn.Embedding)).weight
    g, q = model.encode_image(images), model.encode_text(*words(4))
    text, image = q.t.sum() + q.words.sum(), sum(getattr(g, f.name).sum() for f in fields(g))
    grad = lambda y, x: torch.autograd.grad(y, x, retain_graph=True, allow_unused=True)[0]
    assert grad(text, images) is None and grad(image, table) is None
    assert grad(image, images).abs().sum() > 0 and grad(text, table).abs().sum() > 0   # the probe itself sees
    of_text, of_image = ({id(p) for p in m.parameters()} for m in (model.text, model.vision))
    assert not of_text & of_image
    assert all(grad(text, p) is None for p in model.vision.parameters())
    assert all(grad(image, p) is None for p in model.text.parameters())


@pytest.mark.parametrize('reading', READINGS)
def test_queries_stay_when_images_are_permuted_and_the_other_way_round(reading):
    "Through the training forward, where both sides are in one call."
    model = make(**READINGS[reading])
    images, (ids, mask), pids = pixels(6), words(6), torch.tensor([0, 0, 1, 1, 2, 2])
    perm = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        a = model(images, pids, (ids, mask), clothing=(ids, mask))
        b = model(images[perm], pids, (ids, mask), clothing=(ids, mask))
        c = model(images, pids, (ids[perm], mask[perm]))
    assert torch.equal(a.caption.t, b.caption.t) and torch.equal(a.clothing.t, b.clothing.t)
    assert torch.equal(a.image.f_id, c.image.f_id) and torch.equal(a.image.patches, c.image.patches)
    assert same(a.image.f_id[perm], b.image.f_id) and same(a.caption.t[perm], c.caption.t)
    assert not same(a.image.f_id, b.image.f_id) and not same(a.caption.t, c.caption.t)


def test_scores_take_a_text_and_an_image_and_nothing_else():
    model = make()
    q, g = encode(model)
    for a, b in ((q, q), (g, g), (g, q), (q.t, g.f_id), (q, g.f_id), (vars(q), vars(g))):
        for score in (dual, lambda a, b: fuse_all(model, a, b)):
            with pytest.raises(TypeError, match='a query is TextFeatures and a gallery ImageFeatures'):
                score(a, b)

    class Sneaky(TextFeatures): "A subclass could carry an image along."
    with pytest.raises(TypeError, match='Sneaky'): dual(Sneaky(q.t, q.words, q.mask), g)
    assert {f.name for f in fields(TextFeatures)} == {'t', 'words', 'mask'}
    assert {f.name for f in fields(ImageFeatures)} == {'f_id', 'f_clo', 'hat_clo', 'g', 'patches', 'v'}


@pytest.mark.parametrize('reading', READINGS)
def test_a_fused_score_depends_on_its_image_and_its_query_alone(reading):
    model = make(**READINGS[reading])
    q, g = encode(model)
    scores = dual(q, g)
    top = scores.topk(4).indices
    fused = rescore(model, q, g, top, scores.gather(1, top), chunk=5)
    for i in range(len(q)):
        for r in range(4):
            j = top[i, r:r + 1]
            first = torch.zeros(1, 1, dtype=torch.long)
            alone = rescore(model, q[[i]], g[j], first, scores[i:i + 1, j])   # no other query or image exists
            assert same(alone[0, 0], fused[i, r])
    other_q, other_g = encode(model)
    mixed = TextFeatures.cat([q[:1], other_q[1:]])
    keep = set(top[0].tolist())
    pick = lambda name: torch.stack([getattr(g if k in keep else other_g, name)[k] for k in range(6)])
    swapped = ImageFeatures(*(pick(f.name) for f in fields(g)))
    again = rescore(model, mixed, swapped, top, scores.gather(1, top))
    assert same(again[0], fused[0]) and not same(again[1:], fused[1:])


@pytest.mark.parametrize('reading', READINGS)
def test_the_order_of_candidates_moves_scores_with_them(reading):
    model = make(**READINGS[reading])
    q, g = encode(model)
    scores = dual(q, g)
    top = scores.topk(5).indices
    fused = rescore(model, q, g, top, scores.gather(1, top))
    order = torch.stack([torch.randperm(5) for _ in range(6)])
    moved = top.gather(1, order)
    assert same(rescore(model, q, g, moved, scores.gather(1, moved)), fused.gather(1, order))


def test_the_fused_score_is_dual_over_tau_plus_lambda_times_the_match():
    for kw in ({}, dict(rerank_weight=.25), dict(rerank_weight=0.), dict(fusion_loss='infonce', tau=.1)):
        model = make(**kw)
        q, g = encode(model)
        i, j = pairs(6)
        m = match_score(model, q.t[i], fuse(model, q, i, g, j))
        got = rescore(model, q, g, j[:, None], dual(q, g)[i, j][:, None])[:, 0]
        assert same(got, F.cosine_similarity(q.t, g.f_id[j])/model.config.tau + model.config.rerank_weight*m)


def test_the_clothing_feature_never_enters_a_score():
    model = make()
    q, g = encode(model)
    noise = {k: torch.randn_like(getattr(g, k)) for k in ('f_clo', 'hat_clo', 'g')}
    other = replace(g, **noise)
    assert torch.equal(dual(q, g), dual(q, other))
    assert torch.equal(fuse_all(model, q, g).f_final, fuse_all(model, q, other).f_final)


def test_the_invalid_reading_leaks_and_cannot_be_scored():
    "Even an untrained fusion answers from the image that it was shown. So the reading is invalid."
    model = make(fusion_align=False, fusion_kind='none')
    with torch.no_grad(): model.fusion.gate.proj.bias[0] = 6.                              # listens to images
    q, g = encode(model, 12)
    own = invalid_pair_scores(model, q, g, g, q)
    assert own.shape == (12, 12) and (own.argmax(1) == torch.arange(12)).all()
    honest = dual(q, g).argmax(1) == torch.arange(12)
    assert honest.float().mean() < .5
    with pytest.raises(TypeError, match='a query is TextFeatures'): dual(q, own)


# --- evaluation is a function -------------------------------------------------------------------------------

@pytest.mark.parametrize('reading', READINGS)
def test_evaluation_mode_is_deterministic_and_rows_do_not_meet(reading):
    model = make(**READINGS[reading])
    images, (ids, mask) = pixels(5), words(5)
    with torch.no_grad():
        a, b = model.encode_image(images), model.encode_image(images)
        q, r = model.encode_text(ids, mask), model.encode_text(ids, mask)
        assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
        assert torch.equal(q.t, r.t)
        one = model.encode_image(images[2:3])
        assert all(same(getattr(one, f.name)[0], getattr(a, f.name)[2]) for f in fields(a))
        assert same(model.encode_text(ids[2:3], mask[2:3]).t[0], q.t[2])
        assert same(model.encode_image(images/255).f_id, a.f_id)       # bytes and floats are the same picture


@pytest.mark.parametrize('reading', READINGS)
def test_padding_is_no_evidence_from_end_to_end(reading):
    "A caption alone, and the same caption in a batch with a long one, whatever stands behind its mask."
    model = make(**READINGS[reading])
    ids = torch.randint(5, 600, (1, 7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    _, g = encode(model)
    with torch.no_grad():
        short = model.encode_text(ids, mask)
        for fill in (0, 77):
            long_ids = torch.full((3, 40), fill)
            long_mask = torch.zeros(3, 40, dtype=torch.bool)
            long_ids[0, :7], long_mask[0, :7] = ids[0], True
            long_ids[1:], long_mask[1:] = torch.randint(5, 600, (2, 40)), True
            long = model.encode_text(long_ids, long_mask)
            assert same(long.t[0], short.t[0]) and same(long.words[0, :7], short.words[0])
            i, j = torch.zeros(6, dtype=torch.long), torch.arange(6)
            a, b = (match_score(model, q.t[i], fuse(model, q, i, g, j)) for q in (long, short))
            assert same(a, b)


def test_training_mode_drops_out_and_evaluation_does_not():
    model, images = make(dropout=.1).train(), pixels(3)
    with torch.no_grad():
        assert not torch.equal(model.encode_image(images).f_id, model.encode_image(images).f_id)
        still = make(dropout=0.).train()
        assert torch.equal(still.encode_image(images).f_id, still.encode_image(images).f_id)


# --- the switches -------------------------------------------------------------------------------------------

def decouple(f, **kw):
    torch.manual_seed(1)
    return (m := BDAM(16, kw.pop('depth', 3), 4, in_dim=12, **kw).eval()), m(f)

def reaches(y, module) -> bool:
    parameters = list(module.parameters())
    grads = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize('order', ['after', 'between'])
def test_cross_attention_is_the_only_way_between_the_branches(order):
    f = torch.randn(3, 9, 12)
    m, out = decouple(f, order=order)
    # both directions
    assert reaches(out.hat_id, m.branches.proj_clo)
    assert reaches(out.hat_clo, m.branches.proj_id)
    assert len(m.branches.cross_id) == len(m.branches.cross_clo) == (3 if order == 'between' else 1)
    m, out = decouple(f, order=order, cross=False)
    assert not reaches(out.hat_id, m.branches.proj_clo) and not reaches(out.hat_clo, m.branches.proj_id)
    assert reaches(out.hat_id, m.branches.proj_id) and not len(m.branches.cross_id)


def test_gate_depth_cls_and_mlp_switches():
    f = torch.randn(3, 9, 12)
    m, out = decouple(f)
    assert ((out.g > 0) & (out.g < 1)).all() and out.g.std(0).sum() > 0                # a gate of each sample
    assert same(out.f_id, out.g*out.hat_id)
    assert same(out.f_clo, (1 - out.g)*out.hat_clo)
    assert same(out.tokens.mean(1), out.f_id)
    m, out = decouple(f, gate=False)
    assert torch.equal(out.f_id, out.hat_id)
    assert torch.equal(out.f_clo, out.hat_clo)
    assert (out.g == 1).all()
    assert m.gate is None
    assert [len(decouple(f, depth=d)[0].branches.self_clo) for d in (1, 3, 5)] == [1, 3, 5]
    assert decouple(f)[1].tokens.shape[1] == 8 and decouple(f, keep_cls=True)[1].tokens.shape[1] == 9
    count = lambda **kw: sum(p.numel() for p in decouple(f, **kw)[0].parameters())
    assert count(mlp=2.) - count() == 8*(16*32 + 32 + 32*16 + 16 + 32)                   # 2·(3 + 1) layers
    g = f.clone()
    g[:, 0] += 1
    assert torch.equal(decouple(f)[1].f_id, decouple(g)[1].f_id)
    assert not same(decouple(f, keep_cls=True)[1].f_id, decouple(g, keep_cls=True)[1].f_id)


def test_the_branches_are_of_one_shape_with_weights_of_their_own():
    m, _ = decouple(torch.randn(2, 9, 12))
    shapes = lambda part: [tuple(p.shape) for n, p in m.branches.named_parameters() if f'_{part}' in n]
    assert shapes('id') == shapes('clo')
    assert not torch.equal(m.branches.proj_id.weight, m.branches.proj_clo.weight)


def test_fusion_switches():
    f, t = torch.randn(5, 12), torch.randn(5, 10)
    def run(**kw):
        torch.manual_seed(1)
        m = MambaFusion(12, 10, 16, 14, **kw).eval()
        return m, m(f, t)
    m, out = run()
    assert out.f_final.shape == (5, 14)
    assert out.logit.shape == (5,)
    assert len(m.layers) == 2
    assert out.w[:, 0].std() > 0
    assert same(out.w.sum(1), torch.ones(5)) and (out.w > 0).all()
    m, out = run(gate=False)
    assert (out.w == .5).all() and m.gate is None
    assert isinstance(run(mlp=False)[0].align_img, torch.nn.Linear)
    assert not isinstance(run()[0].align_img, torch.nn.Linear)
    assert run(match=False)[1].logit is None and len(run(kind='none')[0].layers) == 0
    assert [len(run(kind='transformer', layers=n)[0].layers) for n in (1, 2, 4)] == [1, 2, 4]
    results = [run(kind=k)[1].f_final for k in ('mamba', 'transformer', 'simple', 'none')]
    assert not any(same(a, b) for i, a in enumerate(results) for b in results[:i])
    with pytest.raises(ValueError, match='no fusion layer'): run(kind='gru')


@pytest.mark.parametrize('kind', ['mamba', 'transformer', 'simple', 'none'])
def test_both_modalities_move_the_fusion_through_gate_and_sum(kind):
    m = MambaFusion(12, 10, 16, kind=kind).eval()
    f, t, mask = torch.randn(4, 12), torch.randn(4, 10), torch.ones(4, 3, dtype=torch.bool)
    base, seq = m(f, t), m.forward_tokens(f[:, None].repeat(1, 5, 1), t[:, None].repeat(1, 3, 1), mask)
    for a, b in ((torch.randn_like(f), t), (f, torch.randn_like(t))):
        assert not same(m(a, b).f_final, base.f_final) and not same(m(a, b).w, base.w)
        patches, words = a[:, None].repeat(1, 5, 1), b[:, None].repeat(1, 3, 1)
        assert not same(m.forward_tokens(patches, words, mask).f_final, seq.f_final)


def test_variants_build_what_they_say():
    built = {v: build_model(make_config(preset='smoke', variant=v)) for v in VARIANTS}
    for m in built.values():
        c = m.config
        assert (m.fusion is not None) == c.fusion
        assert (m.proj_clo is not None) == (c.bdam and c.c_clothing > 0)
        assert isinstance(m.bdam, BDAM) == c.bdam
        if c.fusion:
            assert (m.fusion.gate is not None) == c.fusion_gate
            assert len(m.fusion.layers) == (0 if c.fusion_kind == 'none' else c.fusion_layers)
    kind = lambda v: type(getattr(built[v].fusion.layers[0], 'mixer', built[v].fusion.layers[0])).__name__
    assert kind('full') == 'Mamba'
    assert kind('fusion_simple') == 'Sequential'
    assert kind('fusion_transformer4') == 'Attention'
    size = lambda v: sum(p.numel() for p in built[v].parameters())
    assert size('baseline') == size('sdm') == size('tal') < size('bdam_shallow') < size('bdam')
    assert size('bdam') < size('full') == size('no_infonce')
    assert size('bdam_no_cross') < size('bdam') and size('bdam_no_gate') < size('bdam')


# --- candidates ---------------------------------------------------------------------------------------------

def test_candidates_are_the_hardest_wrong_images_and_never_the_same_person():
    sim, pids = torch.randn(12, 12), torch.randint(0, 4, (12,))
    pids[0] = 9
    rows, ok = candidates(sim, pids, 5)
    for i in range(12):
        wrong = [j for j in sim[i].argsort(descending=True).tolist() if pids[j] != pids[i]][:5]
        assert rows[i, 0] == i and ok[i, 0]
        assert rows[i, 1:][ok[i, 1:]].tolist() == wrong and ok[i, 1:].sum() == len(wrong)
    assert candidates(sim, pids, 99)[0].shape == (12, 12)
    assert not candidates(sim, torch.zeros(12), 3)[1][:, 1:].any()              # one person: nothing is wrong


def test_no_gradient_runs_through_the_choice_of_candidates():
    sim = torch.randn(6, 6, requires_grad=True)
    assert not candidates(sim, torch.arange(6), 2)[0].requires_grad


# --- every parameter is used --------------------------------------------------------------------------------

# At a sequence of one, softmax over one key is 1 whatever the query, and a recurrence has nothing to
# remember. These parameters get a gradient of zero: processes stay in step, nothing is learned.
ZERO_AT_LENGTH_ONE = ('mixer.A_log', 'layers.0.q.', 'layers.1.q.', 'layers.2.q.', 'layers.3.q.')


def training_batch(n: int = 8):
    (ids, mask), (a, am), (b, bm) = words(n), words(n, 13), words(n, 15)
    return Batch(torch.arange(n), torch.arange(n)//2, pixels(n), ids, mask, a, am, b, bm)


def gradients(**kw) -> tuple[set, set]:
    "Names of the parameters without a gradient, and of those whose gradient is zero."
    model = make(**kw).train()
    losses = batch_losses(forward(model, batch := training_batch(), model.config), batch, model.config)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    named = list(model.named_parameters())
    none = {n for n, p in named if p.grad is None}
    return none, {n for n, p in named if n not in none and not p.grad.any()}


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_parameter_of_every_variant_gets_a_gradient(variant):
    none, zero = gradients(variant=variant)
    assert not none                                             # else data-parallel training stops
    assert all(n.startswith('fusion.') and any(k in n for k in ZERO_AT_LENGTH_ONE) for n in zero), zero


@pytest.mark.parametrize('kw', [
    dict(fusion_input='tokens'), dict(fusion_input='tokens', fusion_kind='transformer'),
    dict(fusion_loss='triplet', margin=9.), dict(fusion_loss='infonce'), dict(id_text='generated'),
    dict(id_text='both'), dict(clothing='literal'), dict(clothing='both'),
    dict(clothing='matching_grl'), dict(keep_cls=True), dict(bdam_order='between'), dict(bdam_mlp=2.),
    dict(fusion_text='identity'),
    dict(fusion_text='clothing'), dict(grad_checkpoint=True), dict(hsic_kernel='rbf'),
    dict(gate_reg='entropy'), CLIP],
    ids=lambda kw: '-'.join(map(str, kw.values()))[:40])
def test_every_parameter_of_every_reading_gets_a_gradient(kw):
    none, zero = gradients(**kw)
    assert not none
    allowed = () if kw.get('fusion_input') == 'tokens' else ZERO_AT_LENGTH_ONE
    assert all(any(k in n for k in allowed) for n in zero), zero


def test_the_shared_layer_is_reached_by_every_loss_of_the_image():
    for fusion_grad in (True, False):                         # off: the fusion's loss trains the fusion alone
        model = make(fusion_grad=fusion_grad).train()
        losses = batch_losses(forward(model, batch := training_batch(), model.config), batch, model.config)
        assert set(losses) == {'align', 'triplet', 'clothing', 'decouple', 'gate', 'fusion'}
        for name, loss in losses.items():
            grads = torch.autograd.grad(loss, model.shared_parameters(), retain_graph=True, allow_unused=True)
            reached = sum(g.abs().sum() for g in grads if g is not None) > 0
            assert reached == (name != 'fusion' or fusion_grad), name
    for variant in VARIANTS:
        m = make(variant=variant)
        assert {id(p) for p in m.shared_parameters()} <= {id(p) for p in m.vision.parameters()}


# --- saved and loaded ---------------------------------------------------------------------------------------

SAVED_VARIANTS = 'full', 'baseline', 'bdam_no_gate', 'fusion_transformer2', 'fusion_no_align'
SAVED = [*({'variant': v} for v in SAVED_VARIANTS),
         *(READINGS[r] for r in ('tokens', 'cosine', 'clip')), dict(warmup=1.5, keep_cls=True, dropout=.3)]

@pytest.mark.parametrize('kw', SAVED, ids=lambda kw: '-'.join(map(str, kw))[:30])
def test_saved_and_loaded_it_is_the_same(tmp_path, kw):
    model = make(**kw)
    path = save_pretrained(model, tmp_path/'m.safetensors')
    first = path.read_bytes()
    again = from_pretrained(path)
    assert again.config == model.config and not again.training
    assert again.vision.config == model.vision.config and again.text.config == model.text.config
    state = again.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    images, text = pixels(4), words(4)
    with torch.no_grad():
        q, g = model.encode_text(*text), model.encode_image(images)
        r, h = again.encode_text(*text), again.encode_image(images)
        assert torch.equal(dual(q, g), dual(r, h))
        if model.fusion is not None:
            assert torch.equal(fuse_all(model, q, g, 4).f_final, fuse_all(again, r, h, 4).f_final)
    assert save_pretrained(again, tmp_path/'n.safetensors').read_bytes() == first       # the same bytes again


def test_a_loaded_model_can_be_trained_further(tmp_path):
    model = from_pretrained(save_pretrained(make(dropout=.3), tmp_path/'m.safetensors')).train()
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert not torch.equal(model.encode_image(x := pixels(2)).f_id, model.encode_image(x).f_id)


def refuse(path, words: str):
    with pytest.raises(UserError, match=words) as e: from_pretrained(path)
    assert '\n' not in str(e.value) and path.name in str(e.value)


@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save_pretrained(make(), tmp_path_factory.mktemp('saved')/'m.safetensors')


def test_cut_and_damaged_files(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path/'m.safetensors'
    for n in (0, 3, 8, 100, len(whole)//2, len(whole) - 1):
        path.write_bytes(whole[:n])
        refuse(path, 'not a whole safetensors file')
    for damaged in (b'\x00'*len(whole), whole[::-1], b'PK\x03\x04' + whole, b'\x80\x04\x95' + whole,
                    b'<html>' + whole,
                    whole[:8] + b'x' + whole[9:], (2**62).to_bytes(8, 'little') + whole[8:]):
        path.write_bytes(damaged)
        refuse(path, 'not a whole safetensors file')
    refuse(tmp_path/'nowhere.safetensors', 'no file')
    refuse(tmp_path, 'no file')


HEADERS = [None, {'format': 'pt'}, *({'bdam_repro': x} for x in (
    'no json', '[]', '3', 'null', '{}', '{"config_hash": "0"}', '{"config": {}, "vision": {}, "text": {}}',
    '{"config": 3, "vision": {}, "text": {}}', '{"config": null, "vision": null, "text": null}'))]

@pytest.mark.parametrize('header', HEADERS, ids=str)
def test_foreign_files(tmp_path, header):
    save_file({'a': torch.zeros(2)}, path := tmp_path/'m.safetensors', header)
    refuse(path, '.')


CHANGES = {
    'an option of a later version': lambda meta, state: meta['config'].update(newer=1),
    'an option of a wrong type': lambda meta, state: meta['config'].update(tau='a'),
    'no architecture': lambda meta, state: meta['vision'].pop('network'),
    'an unknown architecture': lambda meta, state: meta['vision'].update(type='resnet'),
    'architecture of nothing': lambda meta, state: meta.update(text=None),
    'a tensor gone': lambda meta, state: state.pop('proj_t.weight'),
    'a tensor more': lambda meta, state: state.update(more=torch.zeros(1)),
    'a tensor of another shape': lambda meta, state: state.update({'proj_t.weight': torch.zeros(3, 3)}),
    'options of another model': lambda meta, state: meta['config'].update(bdam_depth=3),
}


@pytest.mark.parametrize('change', CHANGES)
def test_files_of_another_version(saved, tmp_path, change):
    state, meta = read_tensors(saved)
    CHANGES[change](meta, state)
    save_file(state, path := tmp_path/'m.safetensors', {'bdam_repro': json.dumps(meta)})
    refuse(path, '.')


def test_tensors_and_their_header(tmp_path):
    t = {'b': torch.arange(6).view(2, 3).T, 'a': torch.tensor(1.5), 'empty': torch.zeros(3, 0),
         'bool': torch.tensor([True])}
    path = write_tensors(tmp_path/'new'/'x.safetensors', t, {'k': [1, 'ü']})
    back, meta = read_tensors(path)
    assert meta == {'k': [1, 'ü']} and set(back) == set(t)
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in t.items())
    first = path.read_bytes()
    assert write_tensors(path, t, {'k': [1, 'ü']}).read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ['x.safetensors']
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cannot make the folder'): write_tensors(tmp_path/'file'/'x', t, {})


# --- texts by length, towers on two cores -------------------------------------------------------------------

@pytest.mark.parametrize('parts', [1, 3, 4, 50])
def test_texts_sorted_by_length_come_back_in_order(parts):
    model, g = make(), torch.Generator().manual_seed(0)
    def ragged(n, M):
        mask = torch.arange(M) < torch.randint(1, M + 1, (n, 1), generator=g)
        return torch.randint(5, 600, (n, M), generator=g)*mask, mask
    texts = [ragged(5, 9), ragged(7, 14), ragged(1, 3)]
    for (ids, mask), f in zip(texts, model.encode_texts(texts, parts)):
        want = model.encode_text(ids, mask)
        assert same(f.t, want.t) and f.mask.equal(mask) and same(f.words[mask], want.words[mask])
    full, wordless = model.encode_texts(texts, parts), model.encode_texts(texts, parts, words=False)
    for (ids, _), f, short in zip(texts, full, wordless):
        assert torch.equal(short.t, f.t) and short.words.shape == (len(ids), 0, f.words.shape[2])
        assert short.mask.shape == (len(ids), 0)
    sum(f.t.sum() for f in model.encode_texts(texts, parts)).backward()
    one = [p.grad.clone() for p in model.text.parameters()]
    model.zero_grad()
    sum(model.encode_text(*t).t.sum() for t in texts).backward()
    assert all(torch.allclose(p.grad, w, atol=1e-4, rtol=1e-3) for p, w in zip(model.text.parameters(), one))


@pytest.mark.parametrize('reading', READINGS)
def test_a_second_thread_changes_no_bit(reading):
    model = make(**READINGS[reading]).train()
    batch = pixels(6), torch.tensor([0, 0, 1, 1, 2, 2]), words(6)
    def gradients(second):
        model.zero_grad()
        model.second = second
        out = model(*batch, identity=words(6), clothing=words(6))
        loss = dual(out.caption, out.image).diagonal().sum()
        (loss + sum(x.float().square().mean() for x in (out.match, out.clo) if x is not None)).backward()
        if second: second.join()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(0)
    alone = gradients(None)
    torch.manual_seed(0)
    shared = gradients(SecondThread())
    assert alone.keys() == shared.keys() and all(torch.equal(g, shared[n]) for n, g in alone.items())


def test_what_fails_in_the_second_thread_is_heard():
    second, x = SecondThread(), torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ZeroDivisionError): second.bring(second.start(lambda: 1/0))
    def refuse(grad): raise ValueError('no way back')
    x.register_hook(refuse)
    mask = torch.ones(3, 1, dtype=torch.bool)
    q, = second.bring(second.start(lambda: [TextFeatures(x*2, x[:, None].detach(), mask)]))
    q.t.sum().backward()
    with pytest.raises(ValueError, match='no way back'): second.join()
    second.join()                                                                   # and it can be used again


def test_the_second_thread_has_the_precision_of_the_first():
    second, linear, x = SecondThread(), torch.nn.Linear(4, 4), torch.randn(3, 4)
    for on in (True, False):
        with torch.autocast('cpu', torch.bfloat16, enabled=on), torch.no_grad():
            y = second.start(lambda: linear(x)).result()
            assert y.dtype == (torch.bfloat16 if on else torch.float32) and not y.requires_grad
