"""Products with frozen weights equal torch's, whichever kernel computes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from spin_lightning import frozen_linear as kernels
from spin_lightning.frozen_linear import (
    FrozenLinear,
    freeze_linear,
    frozen_linear,
    is_linear,
    product,
)

onednn = pytest.mark.skipif(
    not (kernels._HAS_AVX512 and torch.backends.mkldnn.is_available()),
    reason="oneDNN is taken where there is AVX-512",
)


@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (4, 24), (70, 24), (2, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_value_and_gradient_of_x(shape, bias, turned):
    weight = torch.randn(24, 40).t() if turned else torch.randn(40, 24)
    b = torch.randn(40) if bias else None
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 40)

    y = frozen_linear(x, weight, b)
    y.backward(upstream)

    # In float64, whose rounding is out of sight.
    exact = functional.linear(
        x.detach().double(), weight.double(), None if b is None else b.double()
    )
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad.double(), upstream.double() @ weight.double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(product(x.detach(), weight, b), y.detach(), rtol=0, atol=0)


@onednn
def test_onednn_takes_float32_of_several_rows_alone_and_can_be_switched_off(monkeypatch):
    taken = []
    kernel = torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        taken.append(len(args[0]))
        return kernel(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    x, weight = torch.randn(8, 16), torch.randn(12, 16)
    for refused in (x[:1], x.double(), x.bfloat16()):
        product(refused, weight.to(refused.dtype))
    assert taken == []
    product(x, weight)
    assert taken == [8]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(product(x, weight), functional.linear(x, weight))
    assert taken == [8]


def test_an_empty_batch_is_one():
    assert product(torch.empty(0, 16), torch.randn(12, 16)).shape == (0, 12)


class Quantized(nn.Linear):
    """Stands for linear layers that are not held as they are."""


def test_freezing_changes_plain_linear_layers_and_no_others():
    model = nn.Sequential(nn.Linear(6, 6), Quantized(6, 6), nn.Embedding(6, 6))
    freeze_linear(model)
    assert [type(module) for module in model] == [FrozenLinear, Quantized, nn.Embedding]
    assert [is_linear(module) for module in model] == [True, False, False]
    assert is_linear(nn.Linear(2, 2))


def test_a_frozen_layer_computes_as_before_and_gives_its_weight_no_gradient():
    plain = nn.Linear(24, 40).requires_grad_(False)
    x = torch.randn(7, 24, requires_grad=True)
    expected = plain(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    frozen = nn.Sequential(plain)
    freeze_linear(frozen)
    y = frozen(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert plain.weight.grad is None


def test_a_layer_that_is_trained_after_all_gets_its_gradient():
    layer = nn.Sequential(nn.Linear(4, 3))
    freeze_linear(layer)
    layer(torch.ones(8, 4)).sum().backward()
    # d/dW_ij of the sum over eight rows of ones.
    assert torch.equal(layer[0].weight.grad, torch.full((3, 4), 8.0))


def test_autocast_is_obeyed():
    layer = nn.Linear(16, 16).requires_grad_(False)
    freeze_linear(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(8, 16)).dtype == torch.bfloat16
