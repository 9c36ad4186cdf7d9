"""Every option by name, type and range; the hash that names a run; files that are whole or absent."""
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdam_repro.config import (
    PRESETS,
    VARIANTS,
    Config,
    UserError,
    atomic_path,
    config_hash,
    make_config,
    options,
    run_dir,
)
from bdam_repro.parameters import from_globals

INF, NAN = float('inf'), float('nan')
CANNOT_CHANGE_A_RESULT = {'data_root', 'device', 'workers', 'cache_gb', 'grad_checkpoint', 'log_test', 'tag',
                          'graph', 'compiled', 'processes', 'accumulate', 'save_minutes', 'save_steps', 'log'}


def refused(**kw) -> str:
    "The one line with which these options are refused."
    with pytest.raises(UserError) as e: make_config(**kw)
    assert '\n' not in str(e.value) and 'pydantic' not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


# --- presets and variants -----------------------------------------------------------------------------------

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('dataset', ['cuhk', 'icfg', 'rstp', 'synth'])
def test_every_variant_of_every_preset_makes_a_config(dataset, preset):
    made = {v: make_config(dataset, preset, v) for v in VARIANTS}
    assert all((c.dataset, c.preset, c.variant) == (dataset, preset, v) for v, c in made.items())
    assert len({config_hash(c) for c in made.values()}) == len(VARIANTS)
    assert len({run_dir(c, 'runs') for c in made.values()}) == len(VARIANTS)
    assert made['bdam_shallow'].bdam_depth == made['bdam'].bdam_depth // 2 >= 1
    assert {made['full'].folder} == ({PRESETS[preset].get('folder', '')} if dataset == 'synth' else {''})


def test_the_names_of_the_variants_are_those_of_the_tables():
    assert set(VARIANTS) == {
        'full', 'baseline', 'baseline_described', 'baseline_all_texts',
        'bdam', 'bdam_no_cross', 'bdam_no_gate', 'bdam_shallow', 'fusion', 'fusion_no_mamba',
        'fusion_no_gate', 'fusion_no_align', 'no_infonce', 'no_triplet', 'no_adversarial', 'no_decoupling',
        'no_gate_reg',
        'style_none', 'style_random',
        'style_kmeans', 'style_gmm', 'style_agglomerative', 'style_hdbscan', 'fusion_simple',
        'fusion_transformer1',
        'fusion_transformer2', 'fusion_transformer4', 'sdm', 'tal'}


def test_an_ablation_changes_what_its_name_says_and_nothing_else():
    def differs(a, b):
        a, b = (make_config(variant=v).model_dump() for v in (a, b))
        return {k for k in a if a[k] != b[k]} - {'variant'}
    assert differs('full', 'baseline') == {'bdam', 'fusion', 'id_text'}
    assert differs('full', 'baseline_described') == {'bdam', 'fusion'}
    assert differs('baseline', 'bdam') == {'bdam', 'id_text'} and differs(
        'baseline', 'baseline_described') == {'id_text'}
    assert differs('baseline_described', 'baseline_all_texts') == {'id_text'}
    assert differs('baseline', 'fusion') == {'fusion'} and differs('fusion', 'full') == {'bdam', 'id_text'}
    assert differs('bdam', 'bdam_no_cross') == {'bdam_cross'} and differs(
        'bdam', 'bdam_no_gate') == {'bdam_gate'}
    assert differs('bdam', 'bdam_shallow') == {'bdam_depth'}
    assert differs('fusion', 'fusion_no_mamba') == {'fusion_kind'} and differs(
        'fusion', 'fusion_no_gate') == {'fusion_gate'}
    assert differs('fusion', 'fusion_no_align') == {'fusion_align'}
    loss = dict(infonce='c_align', triplet='c_triplet', adversarial='c_clothing', decoupling='c_decouple',
                gate_reg='c_gate')
    for v, field in loss.items():
        assert differs('full', f'no_{v}') == {field}
    for v in ('none', 'random', 'kmeans', 'gmm', 'agglomerative', 'hdbscan'):
        assert differs('full', f'style_{v}') == {'descriptions'}


def test_what_the_paper_prints_is_the_paper_preset():
    c = make_config('cuhk')
    printed = dict(image_height=224, image_width=224, dim=768, lr=1e-4, weight_decay=1e-3, dropout=.1,
                   fusion_dim=256, fusion_layers=2, d_state=16, d_conv=4, gradnorm_alpha=1.5,
                   gradnorm_lr=.025, log_reg=1e-3,
                   optimizer='adam', keep_cls=False, preset='paper')
    assert {k: getattr(c, k) for k in printed} == printed


def test_the_user_comes_last_and_none_is_silence():
    assert make_config(variant='no_triplet', c_triplet=.5).c_triplet == .5
    assert make_config(preset='smoke', epochs=7).epochs == 7
    assert make_config(epochs=None, tau=None) == make_config()
    assert make_config(dim=64, bdam_heads=2).dim == 64


def test_the_table_of_options_has_all_of_them():
    t = options()
    assert list(t.index) == list(Config.model_fields) and (t['what'].str.len() > 4).all()


# --- wrong names, types, ranges, combinations ---------------------------------------------------------------

@pytest.mark.parametrize('kw, words', [
    (dict(epoch=3), "did you mean 'epochs'"), (dict(qwertyuiop=3), "unknown option 'qwertyuiop'"),
    (dict(Seed=1), "did you mean 'seed'"),
    (dict(variant='ful'), "unknown variant 'ful'"), (dict(preset='big'), "unknown preset 'big'"),
    (dict(dataset='cuhk-pedes'), 'dataset='),
    (dict(variant=['full']), 'unknown variant'), (dict(preset=['tiny']), 'unknown preset'),
    (dict(dataset=['cuhk']), 'dataset='),
    (dict(variant=''), 'unknown variant'),
    (dict(epochs='many'), 'epochs='), (dict(epochs=True), 'epochs='), (dict(epochs=2.5), 'epochs='),
    (dict(epochs=0), 'epochs='),
    (dict(lr='1e-4'), 'lr='),
    (dict(bdam=1), 'bdam='), (dict(bdam='yes'), 'bdam='), (dict(seed=-1), 'seed='),
    (dict(dropout=1.), 'dropout='),
    (dict(dropout=-.1), 'dropout='),
    (dict(flip=1.5), 'flip='), (dict(tau=0), 'tau='), (dict(max_length=600), 'max_length='),
    (dict(image_height=8), 'image_height='), (dict(val_fraction=1), 'val_fraction='),
    (dict(clothing='soft'), 'clothing='), (dict(fusion_kind='gru'), 'fusion_kind='),
    (dict(id_text='none'), 'id_text='),
    (dict(amp='fp8'), 'amp='),
    (dict(vision=5), 'vision='), (dict(text={'type': 'bert', 'hidden': [3]}), 'text='),
    (dict(data_root=3), 'data_root='),
    (dict(tag='../up'), 'tag='), (dict(tag='a/b'), 'tag='), (dict(tag='a\n'), 'tag='),
    (dict(tag='a b'), 'tag='),
    (dict(lr=NAN), 'lr='), (dict(margin=NAN), 'margin='), (dict(warmup=NAN), 'warmup='),
    (dict(tau=INF), 'tau='),
    (dict(lr=INF), 'lr='), (dict(c_align=INF), 'c_align='),
    (dict(cache_gb=INF), 'cache_gb='), (dict(seed=2**64), 'seed='),
])
def test_a_wrong_option_is_one_line_that_names_it(kw, words): assert words in refused(**kw)


@pytest.mark.parametrize('kw, words', [
    (dict(dim=100, bdam_heads=8), 'multiple of bdam_heads'),
    (dict(fusion_dim=66), 'multiple of fusion_heads'),
    (dict(ids_per_batch=1, images_per_id=1), 'ids_per_batch'),
    (dict(warmup=99), 'warmup'), (dict(warmup=make_config().epochs), 'warmup'),
    (dict(variant='no_infonce', fusion=False), 'nothing relates'),
    (dict(variant='baseline', c_align=0.), 'nothing relates'),
    (dict(dataset='cuhk', clothes_change=True), 'synth only'),
    (dict(synth_outfits=0), 'synth_outfits='), (dict(ids_per_batch=1), 'negative'),
])
def test_a_wrong_combination_is_one_line(kw, words): assert words in refused(**kw)


def test_several_mistakes_are_all_named():
    line = refused(epochs=0, tua=.1, flip=2.)
    assert 'epochs=' in line and "did you mean 'tau'" in line and 'flip=' in line


def test_a_config_is_frozen_and_shares_nothing_with_its_preset():
    c = make_config()
    with pytest.raises(ValueError): c.epochs = 3
    small = make_config(preset='smoke')
    small.vision['hidden'] = 7
    assert PRESETS['smoke']['vision']['hidden'] == make_config(preset='smoke').vision['hidden'] == 32


# --- the hash -----------------------------------------------------------------------------------------------

def another(name: str, value):
    "A value of the same kind."
    if isinstance(value, bool): return not value
    choices = get_args(Config.model_fields[name].annotation)
    if choices and isinstance(choices[0], str): return next(v for v in choices if v != value)
    if isinstance(value, dict): return value | {'layers': 9}
    return value + 'x' if isinstance(value, str) else value + 1


@pytest.mark.parametrize('name', Config.model_fields)
def test_the_hash_sees_every_option_that_can_change_a_result(name):
    for c in (make_config('cuhk'), make_config()):
        changed = c.model_copy(update={name: another(name, getattr(c, name))})
        assert (config_hash(c) == config_hash(changed)) == (name in CANNOT_CHANGE_A_RESULT)


@pytest.mark.parametrize('preset', PRESETS)
def test_the_hash_survives_a_file_and_spelled_out_defaults(preset):
    for variant in VARIANTS:
        c = make_config('cuhk', preset, variant)
        assert config_hash(Config(**json.loads(json.dumps(c.model_dump())))) == config_hash(c)
        assert config_hash(make_config(**c.model_dump())) == config_hash(c)
    assert config_hash(make_config('cuhk', preset, warmup=0)) == config_hash(make_config(
        'cuhk', preset, warmup=0.))


def any_value(annotation):
    "A strategy for an option of this type; None for one that is drawn in no simple way."
    if get_args(annotation) and isinstance(get_args(annotation)[0], str):
        return st.sampled_from(get_args(annotation))
    simple = {bool: st.booleans(), int: st.integers(1, 64), float: st.floats(0, 1), str: st.text(max_size=8)}
    return simple.get(annotation)


ANY = {name: any_value(field.annotation) for name, field in Config.model_fields.items()}
ANY = {name: values for name, values in ANY.items() if values is not None}


@given(st.sets(st.sampled_from(sorted(ANY)), max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: ANY[name] for name in names})))
def test_any_config_is_the_same_after_a_file(kw):
    try: c = make_config(**kw)
    except UserError as e:
        assert '\n' not in str(e)          # a combination that makes no sense
        return
    again = Config(**json.loads(json.dumps(c.model_dump())))
    assert again == c and config_hash(again) == config_hash(c)


def test_the_hash_is_the_same_in_another_process_and_blind_to_the_order_of_keys():
    code = 'from bdam_repro.config import *; print(config_hash(make_config()))'
    env = os.environ | {'PYTHONHASHSEED': '7'}
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env,
                          check=True).stdout
    assert said.strip() == config_hash(make_config())
    vision = PRESETS['smoke']['vision']
    turned = make_config(preset='smoke', vision=dict(reversed(vision.items())))
    assert config_hash(turned) == config_hash(make_config(preset='smoke'))


def test_run_folders():
    assert run_dir(make_config('cuhk', seed=2, tag='lr=3e-4'),
                   'r').as_posix() == 'r/cuhk/paper/full-lr=3e-4/seed2'
    assert run_dir(make_config(tag='..'), 'r').parts == ('r', 'synth', 'tiny', 'full-..', 'seed0')


# --- a notebook's globals -----------------------------------------------------------------------------------

def test_globals_of_a_notebook(monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    shell = dict(In=['x'], Out={}, get_ipython=print, exit=0, quit=0, _i='x', __name__='__main__',
                 from_globals=from_globals)
    assert from_globals(shell | dict(dataset='icfg', preset=None, seed=3)) == make_config('icfg', seed=3)
    with pytest.raises(UserError, match="did you mean 'seed'"): from_globals(shell | dict(sed=3))
    with pytest.raises(UserError, match="unknown option 'gallery'"): from_globals(shell | dict(gallery='x'))
    assert from_globals(shell | dict(gallery='x'), extra=('gallery',)) == make_config()
    # what later cells leave is no parameter
    later = dict(own=dict(tau=1), configs=[1], usual=make_config(), result=1.5j)
    assert from_globals(shell | later | dict(seed=3)) == make_config(seed=3)
    with pytest.raises(UserError, match='dataset is now a PosixPath, no parameter: run the cell of the '
                       'parameters again'):
        from_globals(dict(dataset=Path()))
    monkeypatch.setenv('IN_TEST', '1')
    assert from_globals(shell | dict(preset=None)).preset == 'smoke'
    assert from_globals(shell | dict(preset='tiny')).preset == 'tiny'


# --- whole or absent ----------------------------------------------------------------------------------------

def names(folder): return sorted(p.name for p in folder.iterdir())


def test_atomic_path_writes_all_or_nothing(tmp_path):
    path = tmp_path/'a'/'b'/'x.json'
    with atomic_path(path) as tmp: tmp.write_text('old')
    for error in (RuntimeError('boom'), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_path(path) as tmp:
            tmp.write_text('half')
            raise error
    assert path.read_text() == 'old' and names(path.parent) == ['x.json']
    with atomic_path(path) as tmp:
        tmp.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and names(path.parent) == ['x.json']


def test_nothing_written_is_said(tmp_path):
    with pytest.raises(UserError, match='cannot write'), atomic_path(tmp_path/'x'): pass
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path/'runs').write_text('I am a file')
    refused = pytest.raises(UserError, match='cannot make the folder')
    with refused as e, atomic_path(tmp_path/'runs'/'x') as tmp:
        tmp.write_text('x')
    assert '\n' not in str(e.value)
    (tmp_path/'x').mkdir()
    with pytest.raises(UserError, match='cannot write'), atomic_path(tmp_path/'x') as tmp: tmp.write_text('x')
    assert names(tmp_path) == ['runs', 'x']


WRITE = """
import sys
from bdam_repro.config import UserError, atomic_path
try:
    with atomic_path(sys.argv[1]) as tmp: tmp.write_text('x'*10_000)
except UserError as e: print(e)
else: print('written')
"""


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    (tmp_path/'x').write_text('old')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    call = [sys.executable, '-c', WRITE, tmp_path/'x']
    said = subprocess.run(call, capture_output=True, text=True, check=True, preexec_fn=limit).stdout
    assert said.startswith(f'cannot write {tmp_path}/x: File too large; free some space')
    assert said.count('\n') == 1
    assert (tmp_path/'x').read_text() == 'old' and names(tmp_path) == ['x']


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes to read-only folders')
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match='cannot write'), atomic_path(tmp_path/'x') as tmp:
            tmp.write_text('x')
        with pytest.raises(UserError, match='cannot make the folder'), atomic_path(tmp_path/'y'/'x') as tmp:
            tmp.write_text('x')
    finally: tmp_path.chmod(0o700)
