"""Initialisers: torch.nn.init's distributions, on a function of the place."""

import math
from functools import partial

import pytest
import scipy.stats
import torch
from test_noise import LAYOUTS, cut, mesh_of, same, sharded

from kdkernels import init, randn_like

SHAPE = (40, 30, 7)
KINDS = {
    "normal": (partial(init.normal_, mean=2.0, std=0.5), torch.nn.init.normal_, (2.0, 0.5)),
    "uniform": (partial(init.uniform_, a=-1.0, b=3.0), torch.nn.init.uniform_, (-1.0, 3.0)),
    "trunc_normal": (
        partial(init.trunc_normal_, mean=1.0, std=0.5),
        torch.nn.init.trunc_normal_,
        (1.0, 0.5, 0.0, 2.0),
    ),
    "kaiming_normal": (init.kaiming_normal_, torch.nn.init.kaiming_normal_, ()),
    "kaiming_uniform": (
        partial(init.kaiming_uniform_, a=0.2, mode="fan_out"),
        torch.nn.init.kaiming_uniform_,
        (0.2, "fan_out"),
    ),
    "xavier_normal": (partial(init.xavier_normal_, gain=2.0), torch.nn.init.xavier_normal_, (2.0,)),
    "xavier_uniform": (init.xavier_uniform_, torch.nn.init.xavier_uniform_, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_are_those_of_torch(kind):
    ours, theirs, arguments = KINDS[kind]
    parameter = torch.nn.Parameter(torch.full(SHAPE, math.nan))
    assert ours(parameter, seed=3) is parameter
    torch.manual_seed(0)
    want = theirs(torch.empty(SHAPE), *arguments)
    found = scipy.stats.ks_2samp(parameter.detach().flatten().numpy(), want.flatten().numpy())
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_rounded_once(kind):
    ours, *_ = KINDS[kind]
    wide, low = (ours(torch.empty(SHAPE, dtype=d), seed=3) for d in (torch.float32, torch.bfloat16))
    # But for a mean that 16 bits do not hold.
    assert same(low, wide.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS[::3])
def test_a_shard_has_its_slice_of_the_whole(kind, layout):
    ours, *_ = KINDS[kind]
    place = {"seed": 1, "stream": 5}
    whole = ours(torch.empty(SHAPE), **place)
    for rank in (0, 3):
        with mesh_of(rank, layout) as mesh:
            part = ours(sharded(torch.zeros(SHAPE), mesh, layout), **place)
            want = cut(whole, layout, mesh.shape, mesh.get_coordinate())
            assert same(part.to_local(), want.contiguous())


def test_normals_are_those_of_the_noise():
    assert same(init.normal_(torch.empty(99), seed=1), randn_like(torch.empty(99), seed=1))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: init.normal_(x, std=-1.0, seed=0), ValueError, "std is -1"),
        (lambda x: init.normal_(x, mean="0", seed=0), TypeError, "mean is a str"),
        (lambda x: init.normal_([1.0], seed=0), TypeError, "tensor is a list"),
        (lambda x: init.uniform_(x, 2.0, 1.0, seed=0), ValueError, "a is 2.0 and b 1.0"),
        (lambda x: init.xavier_normal_(x[0], seed=0), ValueError, "tensor has shape"),
        (lambda x: init.kaiming_normal_(x, mode="fan", seed=0), ValueError, 'mode is "fan"'),
        (lambda x: init.normal_(x, seed="one"), TypeError, "seed is a str"),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(3, 4))
