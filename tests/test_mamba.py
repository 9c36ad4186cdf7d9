"The Mamba block against references, peers and a stand-in for the CUDA package."
import math
import sys
import types
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bdam_repro import mamba
from bdam_repro.config import UserError
from bdam_repro.mamba import (
    Mamba,
    mamba_flops,
    selective_scan,
    selective_scan_c,
    selective_scan_cuda,
    selective_scan_ref,
)
from bdam_repro.scan_kernel import scan_library

needs_compiler = pytest.mark.skipif(scan_library(torch.float32) is None, reason='needs a C compiler')
SCANS = [selective_scan, pytest.param(selective_scan_c, marks=needs_compiler)]


def inputs(b, L, D, N, dtype=torch.float32, seed=0, shift=-2.):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    leaves = r(b, L, D), r(b, L, D) + shift, -r(D, N).exp(), r(b, L, N), r(b, L, N), r(D), r(b, L, D), r(D)
    return [v.requires_grad_() for v in leaves]


def worst_error(scan, args):
    "Worst relative error of output and gradients against the float64 loop."
    wide = [v.detach().double().requires_grad_() for v in args]
    y, want = scan(*args), selective_scan_ref(*wide)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, right = torch.autograd.grad(y, args, dy.to(y.dtype)), torch.autograd.grad(want, wide, dy)
    pairs = zip((y, *found), (want, *right), strict=True)
    return max(((p - q).norm() / q.norm().clamp_min(1e-9)).item() for p, q in pairs)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the scan

@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 3), L=st.integers(1, 70), D=st.integers(1, 9), N=st.integers(1, 17),
       seed=st.integers(0, 9),
       shift=st.sampled_from([-6., -2., 1., 4.]))
@example(b=3, L=3, D=1, N=15, seed=1, shift=-6.)
def test_any_shape_agrees_with_the_loop(b, L, D, N, seed, shift):
    """A handful of terms can cancel, and then float32 itself is far off.

    How far is measured at the worst of the next inputs, since one of them may be lucky."""
    args = inputs(b, L, D, N, seed=seed, shift=shift)
    beside = lambda k: [(v.detach()*(1 + k*2**-22)).requires_grad_() for v in args]
    own = max(worst_error(selective_scan_ref, beside(k)) for k in range(5))
    for scan in (selective_scan, selective_scan_c)[:1 + bool(scan_library(torch.float32))]:
        assert worst_error(scan, args) < max(1e-5, 4 * own)


@pytest.mark.parametrize('scan', SCANS)
@pytest.mark.parametrize('L', [1, 2, 3, 7, 8, 9, 66, 197, 261, 1024])
def test_lengths_of_the_bar(L, scan):
    assert worst_error(scan, inputs(2, L, 12, 16)) < 1e-5
    assert worst_error(scan, inputs(1, L, 5, 4, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize('threads', [1, 2])
def test_ragged_blocks(threads, monkeypatch):
    "Rows and channels that do not divide by the block's size: 3 + 2 rows, 64 + 64 + 2 channels."
    torch.set_num_threads(threads)
    monkeypatch.setattr(mamba, '_plan', lambda b, L, D, N, device: (4, 3, 64))
    assert worst_error(selective_scan, inputs(5, 10, 130, 3)) < 1e-5


def test_long_sequences_are_cut_by_channels():
    T, rows, w = mamba._plan(64, 4096, 512, 16, torch.device('cpu'))
    assert rows == 1 and w < 512 and T <= 23


@pytest.mark.parametrize('scan', SCANS)
def test_gradcheck_and_second_derivative(scan):
    assert gradcheck(scan, inputs(2, 5, 3, 2, dtype=torch.float64))
    assert gradgradcheck(scan, inputs(1, 4, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize('scan', SCANS)
def test_second_derivative_with_frozen_inputs(scan):
    args = inputs(1, 4, 2, 2, dtype=torch.float64)
    frozen = [v.detach() for v in args[2:]]
    assert gradgradcheck(lambda x, d: scan(x, d, *frozen), args[:2])


@pytest.mark.parametrize('scan', SCANS)
def test_strided_inputs(scan):
    "z as one half of a wider tensor, B and C as slices of another: what the block hands over."
    x, delta, A, B, C, D, z, bias = (v.detach() for v in inputs(2, 20, 6, 4))
    wide, bc = torch.cat([x, z], -1), torch.cat([B, C], -1)
    y = scan(wide[..., :6], delta, A, bc[..., :4], bc[..., 4:], D, wide[..., 6:], bias)
    torch.testing.assert_close(y, selective_scan(x, delta, A, B, C, D, z, bias), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_compiled_scan_takes_gradients_and_channels_in_any_layout():
    "An expanded gradient (of a sum), and inputs whose last axis is not contiguous."
    args = inputs(2, 20, 6, 4)
    across = [v.detach().mT.contiguous().mT.requires_grad_() if v.dim() == 3 else v for v in args]
    assert across[0].stride(-1) != 1
    for p, q in zip(torch.autograd.grad(selective_scan_c(*across).sum(), across),
                    torch.autograd.grad(selective_scan(*args).sum(), args), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scan', SCANS)
@pytest.mark.parametrize('shift,rate', [(1e4, 1.), (60., 1e5), (-80., 1e-6), (0., 1e8)])
def test_extremes_stay_finite(shift, rate, scan):
    args = inputs(2, 50, 4, 8, shift=shift)
    with torch.no_grad(): args[2] *= rate
    y = scan(*args)
    assert all(v.isfinite().all() for v in (y, *torch.autograd.grad(y.square().mean(), args)))
    assert worst_error(scan, args) < 1e-5


@pytest.mark.parametrize('scan', SCANS)
def test_nan_is_not_hidden(scan):
    args = [v.detach() for v in inputs(1, 20, 3, 4)]
    args[0][0, 5, 1] = math.nan
    y = scan(*args)[0]
    assert y[5:, 1].isnan().all() and y[:, [0, 2]].isfinite().all() and y[:5].isfinite().all()


def test_one_token_needs_no_decay():
    args = inputs(3, 1, 5, 4)
    other = [*args[:2], args[2] * 7, *args[3:]]
    y = selective_scan(*args)
    assert torch.equal(y, selective_scan(*other))
    dA = torch.autograd.grad(y.sum(), args[2])[0]
    assert dA.shape == (5, 4) and not dA.any()


@pytest.mark.parametrize('scan', SCANS)
def test_deterministic(scan):
    first, second = inputs(3, 40, 20, 16), inputs(3, 40, 20, 16)
    a, b = (torch.autograd.grad(scan(*args).sum(), args) for args in (first, second))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@needs_compiler
def test_threads_change_no_bit_of_the_compiled_scan():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        args = inputs(5, 33, 40, 16)
        y = selective_scan_c(*args)
        found.append([y, *torch.autograd.grad(y.sum(), args)])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize('scan', SCANS)
def test_memory_kept_for_backward(scan):
    "Far below the b·L·D·N numbers of a single copy of all states."
    b, L, D, N, seen = 4, 261, 32, 16, {}
    args = inputs(b, L, D, N)
    note = lambda v: seen.__setitem__(v.untyped_storage().data_ptr(), v.untyped_storage().nbytes()) or v
    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v): scan(*args)
    own = {v.untyped_storage().data_ptr() for v in args}
    assert sum(n for p, n in seen.items() if p not in own) < 4 * b * L * D * N / 7
    assert sum(seen.values()) < 4 * b * L * D * N / 2


# ---------------------------------------------------------------- the block and its peers

SHAPES = {  # the parameters of mamba_ssm.Mamba(256)
    'A_log': (512, 16), 'D': (512,), 'in_proj.weight': (1024, 256), 'conv1d.weight': (512, 1, 4),
    'conv1d.bias': (512,), 'x_proj.weight': (48, 512), 'dt_proj.weight': (512, 16), 'dt_proj.bias': (512,),
    'out_proj.weight': (256, 512)}


def test_state_dict_of_mamba_ssm():
    assert {k: tuple(v.shape) for k, v in Mamba(256).state_dict().items()} == SHAPES
    keys = set(Mamba(256, bias=True, conv_bias=False).state_dict())
    assert keys == set(SHAPES) - {'conv1d.bias'} | {'in_proj.bias', 'out_proj.bias'}
    odd = Mamba(20, d_state=5, d_conv=3, expand=3, dt_rank=7).state_dict()
    assert odd['x_proj.weight'].shape == (17, 60)
    assert odd['conv1d.weight'].shape == (60, 1, 3)
    assert odd['A_log'].shape == (60, 5)
    assert Mamba(17).dt_rank == 2


def test_initialization():
    m = Mamba(256, dt_min=.01, dt_max=.05)
    delta = F.softplus(m.dt_proj.bias)
    assert .0099 < delta.min() < .011 and .045 < delta.max() < .0501
    torch.testing.assert_close(m.A_log.exp(), torch.arange(1., 17).expand(512, 16))
    assert (m.D == 1).all() and m.dt_proj.weight.abs().max() <= 16 ** -.5
    assert {n for n, p in m.named_parameters() if getattr(p, '_no_weight_decay', False)} == {'A_log', 'D'}
    assert (Mamba(32, dt_init='constant', dt_scale=3.).dt_proj.weight == 3 * 2 ** -.5).all()
    assert F.softplus(Mamba(32, dt_min=1e-9, dt_max=1e-8).dt_proj.bias).min() > .99e-4      # the floor


@pytest.mark.parametrize('bias', [False, True])
def test_mambapy_starts_and_computes_the_same(bias):
    from mambapy.mamba import MambaBlock, MambaConfig
    torch.manual_seed(0); ours = Mamba(48, bias=bias)
    torch.manual_seed(0); peer = MambaBlock(MambaConfig(d_model=48, n_layers=1, bias=bias))
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in peer.state_dict().items())
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 33, 48)
    got, want = ours(x), peer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.square().sum().backward(), want.square().sum().backward()
    for (n, p), q in zip(ours.named_parameters(), dict(peer.named_parameters()).values(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=n)


def test_transformers_mixer_computes_the_same():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    config = MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, use_mambapy=False)
    peer, ours = MambaMixer(config, layer_idx=0).eval(), Mamba(32, d_state=8)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 19, 32)
    with torch.no_grad(): torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-6)


def test_block_is_causal_and_rows_are_apart():
    m, x = Mamba(24).double(), torch.randn(3, 30, 24, dtype=torch.float64, requires_grad=True)
    g = torch.autograd.grad(m(x)[1, 11].sum(), x)[0].abs().sum(-1)
    assert g[1, :12].all() and not g[1, 12:].any() and not g[0].any() and not g[2].any()


@pytest.mark.parametrize('L', [1, 2, 30])
def test_autocast_runs_the_scan_in_float32(L):
    torch.manual_seed(0)
    m, x = Mamba(64), torch.randn(2, L, 64)
    want, got = m(x), None
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = m(x)
        got.float().square().sum().backward()         # backward inside autocast too
    assert got.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in m.parameters())
    assert ((got.float() - want).norm() / want.norm()) < .02
    low = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad(); want.square().sum().backward()
    for n, p in m.named_parameters(): assert (low[n] - p.grad).norm() <= .05 * p.grad.norm() + 1e-6, n


@pytest.mark.parametrize('scan', SCANS)
def test_scan_itself_ignores_autocast(scan):
    args = inputs(2, 40, 8, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert worst_error(scan, args) < 1e-5


@pytest.mark.parametrize('scan', SCANS)
def test_bfloat16_inputs_are_computed_in_float32(scan):
    args = inputs(2, 60, 8, 16, dtype=torch.bfloat16)
    y = scan(*args)
    want = selective_scan_ref(*(v.detach().float() for v in args))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want.bfloat16(), rtol=2 ** -7, atol=1e-6)     # no further than one rounding
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.sum(), args))


def test_learns_to_remember():
    "The sign of the first six tokens' sum, asked at the twelfth: only the state can carry it so far."
    torch.manual_seed(0)
    m = torch.nn.Sequential(torch.nn.Linear(1, 16), Mamba(16), torch.nn.Linear(16, 1))
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    for _ in range(100):
        x = torch.randn(64, 12, 1)
        x[:, 6:] = 0
        loss = F.soft_margin_loss(m(x)[:, -1, 0], x.sum((1, 2)).sign())
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < .3


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize('options,words', [
    ({'backend': 'triton'}, 'auto, torch, c, cuda'), ({'backend': 'cuda'}, 'mamba-ssm package'),
    ({'backend': 'c'}, 'C compiler'), ({'dt_init': 'zeros'}, 'dt_init')])
def test_unknown_options(options, words, monkeypatch):
    monkeypatch.setattr(mamba, 'mamba_ssm_kernels', lambda: None)
    monkeypatch.setattr(mamba, 'scan_library', lambda dtype: None)
    with pytest.raises(UserError, match=words) as e: Mamba(16, **options)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('shape', [(2, 16), (2, 0, 16), (2, 5, 15)])
def test_wrong_shapes(shape):
    with pytest.raises(UserError, match='expected'): Mamba(16)(torch.zeros(shape))


# --- mamba-ssm, by a stand-in with its documented interface

@pytest.fixture
def fake_mamba_ssm(monkeypatch):
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):
        b, d, L = u.shape
        assert delta.shape == z.shape == (b, d, L)
        assert A.shape[0] == d
        assert B.shape == C.shape == (b, A.shape[1], L)
        assert D.shape == delta_bias.shape == (d,) and delta_softplus and not return_last_state
        assert {v.dtype for v in (A, D, delta_bias)} == {torch.float32}
        assert {v.dtype for v in (delta, B, C, z)} == {u.dtype}
        assert L == 1 or all(v.stride(-1) == 1 for v in (u, delta, B, C, z))
        calls.append('scan')
        rows = [v.float().transpose(1, 2) for v in (u, delta, B, C, z)]
        y = selective_scan_ref(rows[0], rows[1], A, rows[2], rows[3], D, rows[4], delta_bias)
        return y.transpose(1, 2).to(u.dtype)

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                         final_states_out=None, activation=None):
        d, (d_, W) = x.shape[1], weight.shape
        assert x.is_contiguous() and d == d_ and (bias is None or bias.shape == (d,))
        assert activation == 'silu' and 2 <= W <= 4
        calls.append('conv')
        return F.silu(F.conv1d(F.pad(x, (W - 1, 0)), weight[:, None], bias, groups=d))

    names = 'mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.selective_scan_interface', 'causal_conv1d'
    modules = {n: types.ModuleType(n) for n in names}
    modules['mamba_ssm.ops.selective_scan_interface'].selective_scan_fn = selective_scan_fn
    modules['causal_conv1d'].causal_conv1d_fn = causal_conv1d_fn
    for name, module in modules.items(): monkeypatch.setitem(sys.modules, name, module)
    mamba.mamba_ssm_kernels.cache_clear()
    yield calls
    mamba.mamba_ssm_kernels.cache_clear()


def on_gpu(x):
    "What the choice of a backend looks at in a GPU tensor."
    return SimpleNamespace(is_cuda=True, dtype=x.dtype, device='cuda:0')


def test_kernel_is_called_in_its_layout(fake_mamba_ssm):
    assert worst_error(selective_scan_cuda, inputs(2, 9, 6, 4)) < 1e-5
    assert selective_scan_cuda(*inputs(2, 9, 6, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert fake_mamba_ssm == ['scan', 'scan']


@pytest.mark.parametrize('conv', [True, False])
@pytest.mark.parametrize('L', [1, 13])
def test_block_by_the_kernels(fake_mamba_ssm, monkeypatch, conv, L):
    if not conv: monkeypatch.setitem(sys.modules, 'causal_conv1d', None)
    m, x = Mamba(16), torch.randn(2, L, 16)
    want = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
    assert fake_mamba_ssm == []                                          # CPU tensors never reach the kernels
    choose = mamba._kernels
    monkeypatch.setattr(mamba, '_kernels', lambda backend, x: choose(backend, on_gpu(x)))
    got = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
    assert fake_mamba_ssm == ['conv']*(conv and L > 1) + ['scan']       # one token's convolution is a product
    for p, q in zip(got, want, strict=True): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_which_backend(fake_mamba_ssm):
    x = torch.zeros(1)
    assert mamba._kernels('auto', on_gpu(x)) and mamba._kernels('cuda', on_gpu(x))
    assert mamba._kernels('auto', x) is None
    assert mamba._kernels('torch', on_gpu(x)) is None
    assert mamba._kernels('auto', on_gpu(x.double())) is None
    with pytest.raises(UserError, match='move it to a GPU'):
        Mamba(8, backend='cuda')(torch.zeros(1, 2, 8))


@pytest.fixture
def fresh_import(monkeypatch, tmp_path):
    "Packages are looked for in an empty folder first, and nothing of them is remembered."
    for name in [n for n in sys.modules if n.split('.')[0] in ('mamba_ssm', 'causal_conv1d')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    mamba.mamba_ssm_kernels.cache_clear()
    yield tmp_path
    mamba.mamba_ssm_kernels.cache_clear()
    for name in [n for n in sys.modules if n.split('.')[0] in ('mamba_ssm', 'causal_conv1d')]:
        del sys.modules[name]


@pytest.mark.skipif(find_spec('mamba_ssm') is not None, reason='mamba-ssm is installed here')
def test_without_the_package_nothing_is_said(fresh_import, recwarn):
    assert mamba._kernels('auto', on_gpu(torch.zeros(1))) is None
    assert not recwarn.list


@pytest.mark.parametrize('error', ['ImportError("libcudart.so.12: cannot open shared object file")',
                                   'OSError("undefined symbol: _ZN3c104cuda")',
                                   'RuntimeError("Only CUDA is supported\\nsecond line")'])
def test_a_broken_install_says_so_once_and_falls_back(fresh_import, error):
    ops = fresh_import/'mamba_ssm'/'ops'
    ops.mkdir(parents=True)
    for folder in (ops.parent, ops): (folder/'__init__.py').touch()
    (ops/'selective_scan_interface.py').write_text(f'raise {error}')
    with pytest.warns(UserWarning, match='mamba_ssm is installed but does not work here') as caught:
        for _ in range(3): assert mamba._kernels('auto', on_gpu(torch.zeros(1))) is None
    assert len(caught) == 1 and 'second line' not in str(caught[0].message)
    with pytest.raises(UserError, match='mamba-ssm package'): Mamba(8, backend='cuda')


def test_broken_convolution_leaves_the_scan(fresh_import, fake_mamba_ssm, monkeypatch):
    monkeypatch.delitem(sys.modules, 'causal_conv1d')
    (fresh_import/'causal_conv1d.py').write_text('raise OSError("undefined symbol")')
    with pytest.warns(UserWarning, match='causal_conv1d is installed'):
        scan, conv = mamba.mamba_ssm_kernels()
    assert scan is not None and conv is None


# --- C, and what takes its place

@needs_compiler
def test_blocks_of_all_backends_agree():
    torch.manual_seed(0)
    blocks, x = [Mamba(16, backend=name) for name in ('torch', 'c', 'auto')], torch.randn(2, 13, 16)
    for m in blocks[1:]: m.load_state_dict(blocks[0].state_dict())
    outputs = [m(x) for m in blocks]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[1], outputs[2])


def test_without_a_compiler_the_block_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(mamba, 'scan_library', lambda dtype: None)
    auto, plain = Mamba(16), Mamba(16, backend='torch')
    plain.load_state_dict(auto.state_dict())
    x = torch.randn(2, 13, 16)
    assert torch.equal(auto(x), plain(x))


@needs_compiler
def test_c_refuses_a_tensor_elsewhere():
    with pytest.raises(UserError, match="backend='c' got a tensor on meta"):
        Mamba(8, backend='c').to('meta')(torch.zeros(1, 2, 8, device='meta'))


# ---------------------------------------------------------------- operation counts

def test_flops_of_the_linear_part():
    from torch.utils.flop_counter import FlopCounterMode
    m, b, L = Mamba(32, d_state=8), 2, 11
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        h, _ = m.in_proj(torch.zeros(b, L, 32)).chunk(2, -1)
        F.linear(m.x_proj(h)[..., :m.dt_rank], m.dt_proj.weight)
        m.out_proj(h)
    conv, scan = 2 * b * L * 64 * 4, 9 * b * L * 64 * 8
    assert mamba_flops(b, L, 32, d_state=8) == counter.get_total_flops() + conv + scan
    assert math.isclose(mamba_flops(4, 22, 32, d_state=8), 4 * mamba_flops(b, L, 32, d_state=8))
