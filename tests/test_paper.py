"The printed numbers against an independent transcript, and the lists of open points and claims."
import json
import math
from pathlib import Path

import pytest

from bdam_repro.config import VARIANTS, Config, UserError
from bdam_repro.paper import (
    CLAIMS,
    FIGURE5,
    OPEN_POINTS,
    TITLES,
    claims,
    datasets,
    figure3,
    hyperparameters,
    open_points,
    table,
)

PRINTED = json.loads(Path(__file__).with_name('paper_numbers.json').read_text())
METRICS = ['mAP', 'R1', 'R5', 'R10']


def plain(x):
    "NaN and missing as None, numpy as Python."
    return None if x is None or x != x else getattr(x, 'item', lambda: x)()


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_ablations_to_the_digit_and_in_printed_order(n):
    t = table(n)
    assert [{'method': m, **row} for m,
            row in zip(t.index, t[METRICS].to_dict('records'))] == PRINTED[f'table{n}']['rows']
    assert TITLES[n] == PRINTED[f'table{n}']['title']
    assert t.variant.is_unique and set(t.variant) <= set(VARIANTS)


def test_comparison_to_the_digit_and_in_printed_order():
    ours = [{'method': m, 'backbone': b,
             **{d: {k: plain(v) for k, v in row[d].items()} for d in ('cuhk', 'icfg', 'rstp')}}
            for (m, b), row in table(5).iterrows()]
    assert ours == PRINTED['table5']['rows']


def test_figures_datasets_and_settings():
    cells = lambda row: {c: plain(v) for c, v in row.dropna().items() if plain(v) != ''}
    said = lambda t: {k: cells(row) for k, row in t.astype(object).iterrows()}
    assert said(figure3()) == {k: v for k, v in PRINTED['figure3'].items() if k != 'title'}
    assert said(datasets()) == PRINTED['datasets']
    assert hyperparameters().value.to_dict() == PRINTED['hyperparameters']
    assert FIGURE5['axes'] == PRINTED['figure5']['axes']
    assert FIGURE5['models'] == PRINTED['figure5']['models_named_in_text']


def test_a_table_is_a_copy():
    t = table(1)
    t.loc['+ BDAM', 'R1'], t.iloc[0, 0] = 0., math.nan
    assert table(1).R1['+ BDAM'] == 76.27 and table(1).mAP.iloc[0] == 59.81


@pytest.mark.parametrize('n', [0, 6, '1', None])
def test_there_is_no_other_table(n):
    with pytest.raises(UserError, match='tables 1 to 5'): table(n)


def test_open_points_are_complete_records():
    assert [p.n for p in OPEN_POINTS] == list(range(1, len(OPEN_POINTS) + 1)) and len(OPEN_POINTS) > 21
    for p in OPEN_POINTS:
        assert p.where and p.point and p.default and p.why and p.readings, p.n
        # a tuple of texts, not one text
        assert all(isinstance(r, str) and len(r) > 1 for r in p.readings), p.n
        assert set(p.options) <= set(Config.model_fields), p.n
    assert list(open_points().index) == [p.n for p in OPEN_POINTS]


def test_every_claim_says_what_would_contradict_it():
    assert claims().index.is_unique and len(claims()) == len(CLAIMS)
    assert all(c.where and c.claim and c.test and c.fails for c in CLAIMS)
