"""Results of kernels are described in the layout that the kernels give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from fxckpt.upstream.strides import LAID_OUT_LIKE, OF_OTHER_FORM, right_strides

aten = torch.ops.aten
Result = Tensor | tuple[Tensor, ...]

FIRST, ALL = [True, False, False], [True, True, True]


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers a channel."""
    return x.new_zeros(4), x.new_zeros(4)


CALLS: dict[OpOverload, Callable[[Any, Tensor, Tensor], Result]] = {
    aten.copysign.Tensor: lambda op, g, x: op(g, x),
    aten.heaviside.default: lambda op, g, x: op(g, x[:, :1]),
    aten.logaddexp.default: lambda op, g, x: op(g, x[:, :1]),
    aten.logical_and.default: lambda op, g, x: op(g, x[:, :1]),
    aten.logical_or.default: lambda op, g, x: op(g, x[:, :1]),
    aten.logical_xor.default: lambda op, g, x: op(g, x[:, :1]),
    aten.div.Tensor_mode: lambda op, g, x: op(g, x, rounding_mode="floor"),
    aten.floor_divide.default: lambda op, g, x: op(g, x),
    aten.xlogy.Tensor: lambda op, g, x: op(g, x),
    aten.pow.Scalar: lambda op, _, x: op(2.0, x),
    aten.log_sigmoid_forward.default: lambda op, _, x: op(x),
    aten.normal.Tensor_Tensor: lambda op, g, x: op(g, x),
    aten.binary_cross_entropy_backward.default: lambda op, g, x: op(g, x, x, None, 0),
    aten.native_dropout_backward.default: lambda op, g, x: op(g, x > 0, 2.0),
    aten.elu_backward.default: lambda op, g, x: op(g, 1.0, 1.0, 1.0, False, x),
    aten.hardsigmoid_backward.default: lambda op, g, x: op(g, x),
    aten.hardswish_backward.default: lambda op, g, x: op(g, x),
    aten.hardtanh_backward.default: lambda op, g, x: op(g, x, -1, 1),
    aten.logit_backward.default: lambda op, g, x: op(g, x),
    aten.softplus_backward.default: lambda op, g, x: op(g, x, 1, 20),
    aten.rrelu_with_noise_backward.default: lambda op, g, x: op(g, x, x.contiguous(), 0.1, 0.3, True, False),
    aten.huber_loss_backward.default: lambda op, g, x: op(g, x, x, 0, 1.0),
    aten.mse_loss_backward.default: lambda op, g, x: op(g, x, x, 0),
    aten.smooth_l1_loss_backward.default: lambda op, g, x: op(g, x, x, 0, 1.0),
    aten._log_softmax_backward_data.default: lambda op, g, x: op(g, x, -1, torch.float32),
    aten.native_layer_norm_backward.default: lambda op, g, x: op(
        g, x, [8, 8], *(x.new_zeros(16, 4, 1, 1),) * 2, *(x.new_zeros(8, 8),) * 2, ALL
    ),
    aten.glu_backward.default: lambda op, g, x: op(g[:, :2], x, 1),
    aten.channel_shuffle.default: lambda op, _, x: op(x, 2),
    aten.roll.default: lambda op, _, x: op(x, [1, -2], [0, 3]),
    aten.max_unpool2d.default: lambda op, _, x: op(x, torch.ones_like(x, dtype=torch.int64), [16, 16]),
    aten.reflection_pad3d.default: lambda op, _, x: op(x, [1, 0, 0, 2, 1, 1]),
    aten.replication_pad3d.default: lambda op, _, x: op(x, [1, 0, 0, 2, 1, 1]),
    aten.reflection_pad2d_backward.default: lambda op, g, x: op(g, x[..., 1:], [1, 0, 0, 0]),
    aten.reflection_pad3d_backward.default: lambda op, g, x: op(g, x[..., 1:], [1, 0, 0, 0, 0, 0]),
    aten.replication_pad2d_backward.default: lambda op, g, x: op(g, x[..., 1:], [1, 0, 0, 0]),
    aten.replication_pad3d_backward.default: lambda op, g, x: op(g, x[..., 1:], [1, 0, 0, 0, 0, 0]),
    aten.native_batch_norm.default: lambda op, _, x: op(x, *stats(x), *stats(x), True, 0.1, 1e-5),
    aten._native_batch_norm_legit.default: lambda op, _, x: op(x, *stats(x), *stats(x), True, 0.1, 1e-5),
    aten._native_batch_norm_legit.no_stats: lambda op, _, x: op(x, *stats(x), True, 0.1, 1e-5),
    aten._native_batch_norm_legit_functional.default: lambda op, _, x: op(x, *stats(x), *stats(x), True, 0.1, 1e-5),
    aten._native_batch_norm_legit_no_training.default: lambda op, _, x: op(x, *stats(x), *stats(x), 0.1, 1e-5),
    aten.native_batch_norm_backward.default: lambda op, g, x: op(
        g, x, None, None, None, x.new_zeros(4), x.new_zeros(4), True, 1e-5, FIRST
    ),
    aten.batch_norm_backward.default: lambda op, g, x: op(
        g, x, x.new_zeros(4), *stats(x), *stats(x), True, 1e-5, FIRST, x.new_zeros(0)
    ),
    aten.native_group_norm_backward.default: lambda op, g, x: op(
        g.contiguous(),
        x.contiguous(memory_format=torch.channels_last),
        *(x.new_zeros(16, 2),) * 2,
        None,
        16,
        4,
        64,
        2,
        FIRST,
    ),
}

BATCH_NORMS = [
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part, channels last": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, :4],
}


def forms(result: Result) -> list[Any]:
    """Types, shapes and strides."""
    return [
        y if y is None else (y.dtype, y.shape, y.stride()) for y in (result if isinstance(result, tuple) else (result,))
    ]


@pytest.mark.parametrize("values", LAYOUTS)
@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.parametrize("op", CALLS, ids=str)
def test_strides_are_those_of_the_kernel(op: OpOverload, gradients: str, values: str) -> None:
    g, x = LAYOUTS[gradients](torch.rand(16, 4, 8, 8)), LAYOUTS[values](torch.rand(16, 4, 8, 8))
    mode = FakeTensorMode()
    with right_strides(), enable_python_dispatcher(), mode:
        told = forms(CALLS[op](op, mode.from_tensor(g), mode.from_tensor(x)))
    assert told == forms(CALLS[op](op, g, x))


def test_every_correction_is_tested() -> None:
    assert CALLS.keys() == LAID_OUT_LIKE.keys() | OF_OTHER_FORM.keys()


def test_results_that_are_not_wanted() -> None:
    x, mean = torch.rand(16, 4, 8, 8), torch.rand(16, 2)
    mode = FakeTensorMode()
    fake, few = mode.from_tensor(x), mode.from_tensor(mean)
    with right_strides(), enable_python_dispatcher(), mode:
        told = aten.native_group_norm_backward.default(fake, fake, few, few, None, 16, 4, 64, 2, [False, True, False])
    assert [y is not None for y in told] == [False, True, False]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("of_statistics", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_values", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", LAYOUTS)
@pytest.mark.parametrize("op", BATCH_NORMS, ids=str)
def test_statistics_of_batches(
    op: OpOverload, values: str, of_values: torch.dtype, of_statistics: torch.dtype, training: bool
) -> None:
    """In evaluation there are none."""
    if (of_values, of_statistics) == (torch.float32, torch.bfloat16):
        pytest.skip("torch has no kernel")
    x, mean = LAYOUTS[values](torch.rand(16, 4, 8, 8)).to(of_values), torch.rand(4).to(of_statistics)
    mode = FakeTensorMode()
    fake, few = mode.from_tensor(x), mode.from_tensor(mean)
    with right_strides(), enable_python_dispatcher(), mode:
        told = op(fake, few, few, few, few, training, 0.1, 1e-5)
    assert forms(told) == forms(op(x, mean, mean, mean.clone(), mean.clone(), training, 0.1, 1e-5))


def test_a_number_may_take_the_place_of_a_tensor() -> None:
    x = torch.rand(3, 4).T
    with right_strides(), enable_python_dispatcher(), FakeTensorMode() as mode:
        told = [aten.floor_divide.default(mode.from_tensor(x), 2), aten.pow.Scalar(2.0, mode.from_tensor(x))]
    assert [y.stride() for y in told] == [aten.floor_divide.default(x, 2).stride(), aten.pow.Scalar(2.0, x).stride()]


def test_what_was_told_before_and_what_is_told_after() -> None:
    """Torch remembers descriptions for the whole process."""
    g, x = torch.rand(2, 3).T, torch.rand(3, 2)

    def told() -> tuple[int, ...]:
        with enable_python_dispatcher(), FakeTensorMode() as mode:
            fake: Tensor = aten.copysign.Tensor(mode.from_tensor(g), mode.from_tensor(x))
            return fake.stride()

    before = told()
    with right_strides():
        right = told()
    assert right == aten.copysign.Tensor(g, x).stride() != before
    assert told() == before


def test_what_torch_tells_otherwise_is_left_as_it_was() -> None:
    before = [op.py_kernels.copy() for op in CALLS]
    with pytest.raises(KeyboardInterrupt), right_strides():
        raise KeyboardInterrupt
    assert [op.py_kernels for op in CALLS] == before


@pytest.mark.parametrize("columns", [1, 3, 8, 10])
@pytest.mark.parametrize("dims", ["2 2", "2 3", "3 2", "3 3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_groups_are_described_for_all_types_and_lengths(
    dims: str, columns: int, dtype: torch.dtype
) -> None:
    def padded(*shape: int) -> Tensor:
        """Rows of a multiple of 16 bytes, as the kernel wants them."""
        return torch.ones(*shape[:-1], 16, dtype=dtype)[..., : shape[-1]]

    x = padded(16, 8) if dims[0] == "2" else padded(2, 16, 8)
    y = padded(8, columns) if dims[-1] == "2" else padded(2, 8, columns)
    ends = torch.tensor([3, 8] if dims == "2 2" else [3, 16] if dims == "2 3" else [1, columns], dtype=torch.int32)
    offs = None if dims == "3 3" else ends
    expected = torch._grouped_mm(x, y, offs=offs)
    with right_strides(), FakeTensorMode() as mode, enable_python_dispatcher():
        given = None if offs is None else mode.from_tensor(offs)
        described = torch._grouped_mm(mode.from_tensor(x), mode.from_tensor(y), offs=given)
    assert (described.shape, described.stride(), described.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
