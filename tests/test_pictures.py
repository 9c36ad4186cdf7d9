"Figures 1 and 2: the queries that are counted, the maps, a drawing that follows the model, files to print."
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from bdam_repro import anatomy, architecture, figure_style, pictures, pipeline, testing
from bdam_repro.archive import keep_runs, restore_runs
from bdam_repro.config import VARIANTS, UserError, config_hash, make_config
from bdam_repro.figure_style import save_figure, small_texts
from bdam_repro.model import build_model
from bdam_repro.ranked import HIT, MISS, load_run
from bdam_repro.results import collect_runs


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two smoke runs."
    return testing.smoke_runs(tmp_path_factory.mktemp('made'))


@pytest.fixture(scope='module')
def pair(made):
    runs = [load_run(f, made.data_root, progress=False) for f in pictures.run_pairs(made)[0]]
    return runs, [pictures.kept_answers(r.folder) for r in runs]


@pytest.fixture
def copied(made, tmp_path):
    "The runs, to be spoiled."
    shutil.copytree(made.runs_path, tmp_path/'runs')
    return made.model_copy(update=dict(runs=str(tmp_path/'runs')))


def smoke(variant='full', **options): return build_model(make_config('synth', 'smoke', variant, **options))


def answers(*right, rows=None):
    "A run that has queries right to this degree."
    rows = np.arange(len(right)) if rows is None else rows
    return dict(q_rows=rows, results=dict(dual=SimpleNamespace(R1=np.array(right))))


def figure1(runs, kept, maps):
    examples = pictures.find_examples(runs, kept, maps)
    return pictures.plot_examples(examples, runs[0], pictures.caption1(runs, maps[1]))


# ---- which runs

def test_bdam_stands_in_for_full(copied):
    folder = copied.runs_path/'synth'/'smoke'
    (folder/'full').rename(folder/'bdam')
    assert [f.parent.name for f in pictures.run_pairs(copied)[0]] == ['baseline', 'bdam']


def test_seeds_that_only_one_has_are_left_out(copied):
    folder = copied.runs_path/'synth'/'smoke'
    for variant, seeds in (('baseline', (2, 10)), ('full', (3, 10))):
        for s in seeds: shutil.copytree(folder/variant/'seed0', folder/variant/f'seed{s}')
    assert list(pictures.run_pairs(copied)) == [0, 10]
    (folder/'full'/'seed0'/'metrics.json').unlink()                     # unfinished
    assert list(pictures.run_pairs(copied)) == [10]
    (folder/'full'/'seed10'/'best.safetensors').unlink()                # kept without its weights
    with pytest.raises(UserError, match='no seed has finished runs'): pictures.run_pairs(copied)


def test_the_figure_is_drawn_again_without_the_models(made, copied):
    runs = pictures.open_pair(pictures.run_pairs(copied), made.data_root)
    kept = tuple(pictures.kept_answers(r.folder) for r in runs)
    maps = pictures.pair_maps(runs, kept)
    before = [f.read_bytes() for f in save_figure(figure1(runs, kept, maps), 'fig1', copied)]
    archive = copied.runs_path.parent/'tables'
    keep_runs(copied.runs_path, collect_runs(copied.runs_path), archive)
    shutil.rmtree(copied.runs_path)
    assert len(restore_runs(copied.runs_path, archive, [r.config for r in runs])) == 2
    again = pictures.open_pair(pictures.run_pairs(copied), made.data_root)
    assert [r.model for r in again] == [None, None] and pictures.keep_first_maps(copied) == 0
    kept = tuple(pictures.kept_answers(r.folder) for r in again)
    maps = pictures.pair_maps(again, kept)
    assert [f.read_bytes() for f in save_figure(figure1(again, kept, maps), 'fig1', copied)] == before
    with pytest.raises(UserError, match='another run'): pictures.measure_maps(again[0], [0, 1, 2], [])


def test_a_described_baseline_keeps_its_row(made, copied):
    c = make_config('synth', 'smoke', 'baseline_described', data_root=made.data_root)
    folder, archive = copied.runs_path/'synth'/'smoke', copied.runs_path.parent/'tables'
    described = folder/'baseline_described'/'seed0'
    shutil.copytree(folder/'baseline'/'seed0', described)
    own = dict(config_hash=config_hash(c))
    metrics = json.loads((described/'metrics.json').read_text())
    for name, content in (('config', c.model_dump()), ('metrics', metrics)):
        (described/f'{name}.json').write_text(json.dumps(content | own))
    keep_runs(copied.runs_path, collect_runs(copied.runs_path), archive)
    shutil.rmtree(described)
    assert restore_runs(copied.runs_path, archive, [c]) == [described]
    rival = pictures.find_described(copied, 0)
    runs = pictures.open_pair(pictures.run_pairs(copied), made.data_root)
    kept = tuple(pictures.kept_answers(r.folder) for r in runs)
    examples = pictures.find_examples(runs, kept, pictures.pair_maps(runs, kept), described=rival)
    assert [x.described.rows.tolist() for x in examples] == [x.ranked[0].rows.tolist() for x in examples]
    assert [x.described_right for x in examples] == [x.count*pictures.OUTCOMES[x.kind][0] for x in examples]
    assert small_texts(pictures.plot_examples(examples, runs[0], 'words')) == []
    table = pictures.rival_table(copied, 'full')
    assert (table.loc['baseline'] == table.loc['baseline_described']).all(axis=None)


# ---- which queries

def test_a_tie_at_the_top_is_not_right():
    rows = pictures.outcomes(answers(1, 1, 0, .5, 0), answers(1, .5, 1, 1, 0))
    assert [list(rows[k]) for k in pictures.OUTCOMES] == [[2, 3], [1], [0], [4]]


def test_other_queries_are_refused():
    other = answers(1, 0, rows=np.array([0, 2]))
    with pytest.raises(UserError, match='tested on different queries'):
        pictures.outcomes(answers(1, 0), other)


def test_examples_are_the_first_of_their_kind(pair):
    runs, kept = pair
    rows = pictures.outcomes(*kept)
    examples = pictures.find_examples(runs, kept, pictures.pair_maps(runs, kept))
    assert [x.kind for x in examples] == [k for k in pictures.OUTCOMES if len(rows[k])][:2]
    for x in examples:
        q = rows[x.kind][0]
        assert x.own == kept[0]['q_rows'][q]
        assert (x.count, x.of) == (len(rows[x.kind]), len(kept[0]['q_rows']))
        assert [r.place for r in x.ranked] == [float(e['results']['dual'].rank[q]) for e in kept]


def test_models_that_agree_are_shown_agreeing(pair):
    runs, kept = pair
    same = [kept[0], kept[0] | dict(top=kept[1]['top'])]
    examples = pictures.find_examples(runs, same, pictures.pair_maps(runs, same))
    assert [x.kind for x in examples] == ['Both are right', 'Neither is right']


# ---- maps

GRIDS = [((8, 4), 32), ((24, 8), 24), ((14, 14), 49), ((9, 3), 10), ((1, 1), 1)]


@pytest.mark.parametrize('grid, count', GRIDS)
def test_windows_tile_the_grid(grid, count):
    n, corners = pictures.windows(grid)
    seen = np.zeros(grid, int)
    for y, x in corners: seen[y:y + n, x:x + n] += 1
    assert (seen == 1).all() and len(corners) == count <= 64


@pytest.mark.parametrize('size', [(64, 32), (48, 80), (144, 32)])
def test_shares_sum_to_one_and_come_from_the_right_place(size):
    model = smoke(image_height=size[0], image_width=size[1])
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    n, corners = pictures.windows(model.vision.grid)
    gray = pictures.hide_windows(model, image, corners[:2])
    for name, s in pictures.patch_shares(model, gray).items():
        assert s.shape == tuple(-(-g//n) for g in model.vision.grid), name
        assert s.sum() == pytest.approx(1, abs=1e-5), name
        assert (s.ravel()[:2] < 1e-4).all() and (s.ravel()[2:] > 1e-4).all(), name


def test_a_feature_that_nothing_moves_has_an_even_map():
    model = smoke('baseline')
    for q in model.bdam.proj.parameters(): torch.nn.init.ones_(q)       # f_id has one direction
    torch.nn.init.zeros_(model.bdam.norm.weight)
    s = pictures.patch_shares(model, torch.randint(256, (3, 64, 32), dtype=torch.uint8))['f_id']
    assert np.allclose(s, 1/8)


@pytest.mark.parametrize('columns', [1., .5])
def test_a_map_lies_on_what_the_model_reads(columns):
    ax = Figure().add_subplot()
    pictures.draw_map(ax, Image.new('RGB', (40, 80)), np.eye(2), figure_style.IDENTITY_INK, columns)
    assert ax.images[1].get_extent() == [20 - 20*columns, 20 + 20*columns, 80, 0]
    assert ax.get_xlim() == (0, 40) and ax.get_ylim() == (80, 0) and len(ax.lines) == 2*(columns < 1)


def test_the_model_is_shown_the_part_that_it_reads(pair):
    run, rows = pair[0][0], pair[1][0]['g_rows'][:2].tolist()
    part = SimpleNamespace(dataset=run.dataset, config=run.config.model_copy(update=dict(columns=.5)))
    assert pictures.images_of(part, rows).shape == pictures.images_of(run, rows).shape
    assert not torch.equal(pictures.images_of(part, rows), pictures.images_of(run, rows))


# ---- the drawing

@pytest.fixture(scope='module')
def traced():
    models = {v: smoke(v) for v in VARIANTS if not v.startswith('style_')}
    return {v: (m, anatomy.trace(m)) for v, m in models.items()}


def test_each_parameter_stands_in_one_box(traced):
    for v, (m, t) in traced.items():
        assert sum(x.params for x in t.parts.values()) == t.total == sum(q.numel() for q in m.parameters()), v


def test_losses_and_boxes_follow_the_configuration(traced):
    losses = {v: set(t.losses) for v, (_, t) in traced.items()}
    assert losses['full'] == {'align', 'triplet', 'clothing', 'decouple', 'gate', 'fusion'}
    without = dict(no_infonce='align', no_triplet='triplet', no_adversarial='clothing',
                   no_decoupling='decouple', no_gate_reg='gate', bdam='fusion')
    for v, term in without.items():
        assert losses['full'] - losses[v] == {term}, v
    boxes = {v: set(t.parts) for v, (_, t) in traced.items()}
    assert boxes['fusion'] - boxes['fusion_no_gate'] == {'weights'}
    assert boxes['fusion'] - boxes['fusion_no_mamba'] == {'mixer'}
    assert boxes['bdam'] - boxes['bdam_no_gate'] == {'gate'}


def test_inputs_are_those_that_are_read(traced):
    read = lambda **o: set(anatomy.trace(smoke(**o)).inputs) - {'image', 'clothing'}
    assert set(traced['full'][1].inputs) == {'image', 'caption', 'other', 'identity', 'clothing'}
    assert set(traced['baseline'][1].inputs) == {'image', 'caption', 'other'}
    assert read(two_captions=False) == {'caption', 'identity'}
    assert read(id_text='caption') == {'caption', 'other'}


def test_tracing_leaves_no_trace():
    m, c = smoke().train(), make_config('synth', 'smoke')
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in m.state_dict().items()}
    anatomy.trace(m)
    assert m.training and m.config == c and torch.equal(before, torch.get_rng_state())
    assert not any(x._forward_hooks for x in m.modules())
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


READINGS = [dict(fusion_input='tokens', fusion_text='identity', id_text='both'),
            dict(fusion_loss='triplet', clothing='matching_grl', fusion_grad=True),
            dict(id_text='generated', text_pool='cls'),
            dict(two_captions=False, balance='fixed'),
            dict(fusion_text='clothing', bdam_order='between', clothing='both', keep_cls=True),
            dict(align_loss='sdm', fusion_loss='infonce', clothing='literal')]


@pytest.mark.parametrize('options', READINGS, ids=lambda o: '-'.join(map(str, o.values())))
def test_readings_are_drawn_without_collisions(options):
    m = smoke(**options)
    assert architecture.collisions(architecture.plot_model(m, anatomy.trace(m), 'words')) == []


DRAWN = 'full', 'baseline', 'bdam_no_cross', 'bdam_no_gate', 'fusion_no_gate', 'fusion_no_mamba', 'tal'


@pytest.mark.parametrize('variant', DRAWN)
def test_variants_are_drawn_without_collisions(variant, traced):
    m, t = traced[variant]
    fig = architecture.plot_model(m, t, architecture.caption2(t, m.config, 'source'))
    assert architecture.collisions(fig) == [] and fig.get_size_inches()[0] == figure_style.PAGE_WIDTH


def test_a_collision_is_seen(traced):
    m, t = traced['full']
    fig = architecture.plot_model(m, t, 'words')
    fig.axes[0].texts[0].set_text('a name that is too long for any box')
    assert any(where == 'box' for _, where in architecture.collisions(fig))


def test_without_a_run_the_drawing_says_untrained(made):
    model, source = pipeline.running_model(made.model_copy(update=dict(runs='nowhere')))
    assert 'untrained' in source and 'SynthPEDES' in source and model.config.variant == 'full'
    model, source = pipeline.running_model(made)
    assert 'untrained' not in source and 'score fused' in source
    provenance = made.runs_path/'synth'/'smoke'/'full'/'seed0'/'provenance.json'
    assert json.loads(provenance.read_text())['code'] in source


STAGES = dict(synth=pipeline.TextStage('synth', 36000, 56000, 14, 'agglomerative', .05),
              mllm=pipeline.TextStage('a-model-with-a-long-name', 74160, 148320, 120),
              plain=pipeline.TextStage('synth', 36000, 56000, 0, 'none', .05),
              split=pipeline.TextStage('split', 74160, 148320, 0))


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('variant', ['full', 'baseline_described', 'baseline_all_texts', 'fusion'])
def test_what_stands_above_the_model_has_room(stage, variant, traced):
    m, t = traced[variant]
    fig, words = pipeline.plot_pipeline(m, t, STAGES[stage], 'source')
    assert architecture.collisions(fig) == [] and figure_style.small_texts(fig) == []
    assert fig.get_size_inches()[1] < 9
    assert ('offline' in words) == (variant != 'fusion')                # which reads no descriptions


# ---- to print

def figures(made, pair):
    (runs, kept), (model, source) = pair, pipeline.running_model(made)
    t, maps = anatomy.trace(model), pictures.pair_maps(runs, kept)
    stage = pipeline.read_stage(model.config)
    yield 'fig1', 180, figure1(runs, kept, maps)
    yield 'fig2', 200, pipeline.plot_pipeline(model, t, stage, source)[0]


def test_files_are_small_and_the_same_again(made, pair):
    def saved():
        files = [f for name, dpi, fig in figures(made, pair) for f in save_figure(fig, name, made, dpi)]
        return {f.name: f.read_bytes() for f in files}
    first, again = saved(), saved()
    assert first == again and set(first) == {'fig1.pdf', 'fig1.png', 'fig2.pdf', 'fig2.png'}
    assert max(map(len, first.values())) < 10**6
    for n, dpi in ((1, 180), (2, 200)):
        assert Image.open(made.figures_path/f'fig{n}.png').width == dpi*figure_style.PAGE_WIDTH


def test_captions_say_where_it_is_from(pair):
    maps = {'map.f_id': torch.ones(1, 4, 2), 'likeness': torch.tensor([.5, .7])}
    words = pictures.caption1(pair[0], maps)
    said = 'SynthPEDES', 'preset smoke', 'baseline, full', 'seed 0', 'score dual', 'Code '
    for part in said: assert part in words
    for part in ('2 images', '0.60 ± 0.14'): assert part in words


def test_a_hit_is_told_by_more_than_its_color():
    assert HIT['linewidth'] >= 3*MISS['linewidth']
