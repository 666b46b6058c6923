"""The rest of what people train: convolutions, pools, losses, activations, and ops that gather and scatter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.layer_menu import Call, Inputs, LayerCase, attention, laid_out, normal, norms, recurrent, typed

_SHAPES = {1: (2, 8, 16), 2: (2, 8, 12, 12), 3: (2, 8, 6, 6, 6)}


def convolutions() -> Iterator[LayerCase]:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "one": {"kernel_size": 1},
        "strided": {"stride": 2, "padding": 1},
        "dilated": {"dilation": 2},
        "grouped": {"groups": 2},
        "depthwise": {"groups": 8},
        "no bias": {"bias": False},
        "same": {"padding": "same"},
        "reflected": {"padding": 1, "padding_mode": "reflect"},
    }
    for dims, shape in _SHAPES.items():
        layouts = ["contiguous"] if dims == 1 else ["contiguous", "channels last"]
        for layout in layouts:
            given = laid_out(layout, *shape)
            for name, own in options.items():
                if dims == 3 and name in ("reflected", "same"):
                    continue
                asked = {"kernel_size": 3, **own}
                kind: Any = getattr(nn, f"Conv{dims}d")
                build = functools.partial(kind, 8, 8, **asked)
                yield from typed(f"Conv{dims}d/{name}/{layout}", build, given, half=name == "plain")
            kind = getattr(nn, f"ConvTranspose{dims}d")
            for name in ("plain", "strided", "grouped"):
                build = functools.partial(kind, 8, 8, 3, **options[name])
                yield from typed(f"ConvTranspose{dims}d/{name}/{layout}", build, given)
    last = torch.channels_last
    weights = lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(memory_format=last)  # type: ignore[call-overload]  # noqa: E731
    yield from typed("Conv2d/weights channels last", weights, laid_out("channels last", 2, 8, 12, 12))
    yield from typed("Conv2d/only weights channels last", weights, normal(2, 8, 12, 12))
    yield from typed("Unfold", lambda: nn.Unfold(3), normal(2, 8, 12, 12))
    yield from typed("Fold", lambda: nn.Fold((6, 6), 3), normal(2, 72, 16))


def images() -> Iterator[LayerCase]:
    for dims, shape in _SHAPES.items():
        layouts = ["contiguous"] if dims == 1 else ["contiguous", "channels last"]
        for layout in layouts:
            given = laid_out(layout, *shape)
            for name, arguments in {
                "MaxPool": (2,),
                "AvgPool": (2,),
                "AdaptiveAvgPool": (1,),
                "AdaptiveMaxPool": (3,),
            }.items():
                pool: Any = getattr(nn, f"{name}{dims}d")
                build = functools.partial(pool, *arguments)
                yield from typed(f"{name}{dims}d/{layout}", build, given)
            pool = getattr(nn, f"AdaptiveAvgPool{dims}d")
            yield from typed(f"AdaptiveAvgPool{dims}d of 3/{layout}", functools.partial(pool, 3), given)
            for mode in ("nearest", "nearest-exact", {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]):
                build = functools.partial(nn.Upsample, scale_factor=2, mode=mode)
                yield from typed(f"Upsample{dims}d/{mode}/{layout}", build, given)
            for mode in ("Constant", "Reflection", "Replication", "Zero", "Circular"):
                kind: Any = getattr(nn, f"{mode}Pad{dims}d")
                build = (functools.partial(kind, 1, 0.5)) if mode == "Constant" else (functools.partial(kind, 1))
                yield from typed(f"{mode}Pad{dims}d/{layout}", build, given)
    image, last = normal(2, 8, 12, 12), laid_out("channels last", 2, 8, 12, 12)
    for name, given in {"contiguous": image, "channels last": last}.items():
        bicubic = lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True)  # noqa: E731
        yield from typed(f"bicubic/{name}", bicubic, given)
        smooth = lambda x: F.interpolate(x, (7, 7), mode="bilinear", antialias=True)  # noqa: E731
        yield from typed(f"antialiased/{name}", functools.partial(Call, smooth), given)
        yield from typed(f"PixelShuffle/{name}", lambda: nn.PixelShuffle(2), given)
        yield from typed(f"PixelUnshuffle/{name}", lambda: nn.PixelUnshuffle(2), given)
        yield from typed(f"ChannelShuffle/{name}", lambda: nn.ChannelShuffle(2), given)
        yield from typed(f"LPPool2d/{name}", lambda: nn.LPPool2d(2, 2), given)
        yield from typed(f"FractionalMaxPool2d/{name}", lambda: nn.FractionalMaxPool2d(2, output_size=6), given)
        yield from typed(f"Dropout2d/{name}", lambda: nn.Dropout2d(0.2), given, evaluated=True)
        unpool = lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2])  # noqa: E731
        yield from typed(f"MaxUnpool2d/{name}", functools.partial(Call, unpool), given)
        for mode, border in (("bilinear", "zeros"), ("nearest", "border"), ("bicubic", "reflection")):
            sample = functools.partial(_sample, mode=mode, border=border)
            yield from typed(f"grid_sample/{mode}/{name}", functools.partial(Call, sample), given)
        yield from typed(f"roll/{name}", lambda: Call(lambda x: x.roll((1, 2), (2, 3))), given)


def _sample(x: Tensor, mode: str, border: str) -> Tensor:
    return F.grid_sample(x, x[:, :2].movedim(1, -1).tanh(), mode, border, align_corners=False)


def activations() -> Iterator[LayerCase]:
    layers: list[Callable[[], nn.Module]] = [
        nn.ReLU, nn.ReLU6, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Softplus,
        nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.PReLU,
        nn.RReLU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign, lambda: nn.Threshold(0.1, 0.0),
        lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(-1), lambda: nn.Softmin(1), lambda: nn.GLU(1),
        lambda: nn.Dropout(0.2),
        lambda: nn.AlphaDropout(0.2), lambda: nn.FeatureAlphaDropout(0.2), lambda: nn.ReLU(inplace=True),
    ]  # fmt: skip
    for number, build in enumerate(layers):
        for layout in ("contiguous", "channels last"):
            changed = lambda b=build: nn.Sequential(nn.Identity(), nn.Hardtanh(-9, 9), b())  # noqa: E731
            name = f"{number}-{getattr(build, '__name__', '').strip('<>')}"
            yield from typed(f"activation/{name}/{layout}", changed, laid_out(layout, 2, 4, 6, 6))
    yield from typed("Dropout/odd", lambda: nn.Dropout(0.15), normal(3, 5, 7), half=True)
    yield from typed("gumbel_softmax", lambda: Call(lambda x: F.gumbel_softmax(x, hard=True)), normal(4, 8))
    yield from typed("Linear", lambda: nn.Linear(16, 32), normal(4, 5, 16), half=True)
    yield from typed("Linear/no bias", lambda: nn.Linear(16, 32, bias=False), normal(4, 16))
    yield from typed("Linear/transposed", lambda: nn.Linear(16, 32), laid_out("transposed", 4, 5, 16))
    yield from typed("Bilinear", lambda: nn.Bilinear(8, 8, 4), lambda: (torch.randn(4, 8), torch.randn(4, 8)))
    heads: Inputs = lambda: (torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8))  # noqa: E731
    yield from typed("einsum", lambda: Call(lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b)), heads)
    yield from typed("baddbmm", lambda: Call(lambda a: torch.baddbmm(a, a, a)), normal(2, 6, 6))
    yield from typed("addmm", lambda: Call(lambda a: torch.addmm(a, a, a.t(), beta=0.5)), normal(6, 6))


def losses() -> Iterator[LayerCase]:
    pair: Inputs = lambda: (torch.rand(6, 8), torch.rand(6, 8))  # noqa: E731
    classes: Inputs = lambda: (torch.randn(6, 8), torch.arange(6) % 8)  # noqa: E731
    signs: Inputs = lambda: (torch.randn(6, 8), torch.randn(6, 8), torch.ones(6))  # noqa: E731
    images: Inputs = lambda: (torch.randn(2, 5, 6, 6), torch.ones(2, 6, 6, dtype=torch.int64))  # noqa: E731
    spoken: Inputs = lambda: (torch.randn(12, 2, 6).log_softmax(-1), torch.ones(2, 4, dtype=torch.int64))  # noqa: E731
    menu: dict[str, tuple[Callable[..., Any], Inputs]] = {
        "mse": (F.mse_loss, pair),
        "l1": (F.l1_loss, pair),
        "smooth_l1": (F.smooth_l1_loss, pair),
        "huber": (F.huber_loss, pair),
        "kl_div": (F.kl_div, pair),
        "poisson": (F.poisson_nll_loss, pair),
        "soft_margin": (lambda x, y: F.soft_margin_loss(x, y.detach()), pair),
        "bce": (lambda x, y: F.binary_cross_entropy(x, y.detach()), pair),
        "bce logits": (lambda x, y: F.binary_cross_entropy_with_logits(x, y.detach()), pair),
        "cross_entropy": (F.cross_entropy, classes),
        "nll": (lambda x, y: F.nll_loss(x.log_softmax(1), y), classes),
        "cross_entropy smoothed": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1, ignore_index=2), classes),
        "cross_entropy float": (lambda x, y: F.cross_entropy(x.float(), y), classes),
        "cross_entropy images": (F.cross_entropy, images),
        "cross_entropy sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), classes),
        "multi_margin": (F.multi_margin_loss, classes),
        "cosine_embedding": (F.cosine_embedding_loss, signs),
        "triplet": (lambda a, b, _: F.triplet_margin_loss(a, b, a.flip(0)), signs),
        "margin_ranking": (lambda a, b, s: F.margin_ranking_loss(a[:, 0], b[:, 0], s), signs),
        "gaussian_nll": (lambda a, b, _: F.gaussian_nll_loss(a, b, b.abs() + 1), signs),
        "multilabel_soft_margin": (lambda x, y: F.multilabel_soft_margin_loss(x, y.detach()), pair),
        "cosine_similarity": (F.cosine_similarity, pair),
        "pairwise_distance": (F.pairwise_distance, pair),
        "cdist": (torch.cdist, pair),
        "ctc": (_ctc, spoken),
    }
    for name, (function, given) in menu.items():
        yield from typed(f"loss/{name}", functools.partial(Call, function), given)


def _ctc(x: Tensor, targets: Tensor) -> Tensor:
    return F.ctc_loss(x, targets, (12, 12), (4, 3))  # type: ignore[arg-type]


def indexing() -> Iterator[LayerCase]:
    where: Inputs = lambda: (torch.randn(8, 16), torch.tensor([0, 3, 3, 5, 0, 1]))  # noqa: E731
    ids: Inputs = lambda: (torch.tensor([[0, 3, 3], [5, 0, 1]]),)  # noqa: E731
    yield from typed("Embedding", lambda: nn.Embedding(8, 16), ids)
    yield from typed("Embedding/padded", lambda: nn.Embedding(8, 16, padding_idx=0), ids)
    yield from typed("Embedding/by frequency", lambda: nn.Embedding(8, 16, scale_grad_by_freq=True), ids)
    for mode in ("sum", "mean", "max"):
        yield from typed(f"EmbeddingBag/{mode}", functools.partial(nn.EmbeddingBag, 8, 16, mode=mode), ids)
    menu: dict[str, Callable[..., Any]] = {
        "index_select": lambda x, i: x.index_select(0, i),
        "index": lambda x, i: x[i],
        "index of two": lambda x, i: x[i, i],
        "boolean": lambda x, i: torch.where(x > 0, x, x * 2),  # noqa: ARG005
        "gather": lambda x, i: x.gather(0, i[:, None].expand(6, 16)),
        "take_along_dim": lambda x, i: torch.take_along_dim(x, i[:, None], 0),
        "scatter": lambda x, i: x.scatter(0, i[:1, None].expand(1, 16), x[:1] * 2),
        "scatter_add": lambda x, i: torch.zeros_like(x).scatter_add(0, i[:, None].expand(6, 16), x[:6]),
        "scatter_reduce": lambda x, i: torch.zeros_like(x).scatter_reduce(0, i[:, None].expand(6, 16), x[:6], "mean"),
        "scatter_amax": lambda x, i: torch.zeros_like(x).scatter_reduce(0, i[:, None].expand(6, 16), x[:6], "amax"),
        "index_add": lambda x, i: torch.zeros_like(x).index_add(0, i, x[:6]),
        "index_reduce": lambda x, i: torch.ones_like(x).index_reduce(0, i, x[:6], "mean"),
        "index_copy": lambda x, i: x.index_copy(0, i[:2], x[:2] * 2),
        "index_fill": lambda x, i: x.index_fill(0, i[:2], 0.5),
        "index_put": lambda x, i: (x * 1).index_put((i[:2],), x[:2]),
        "index_put accumulate": lambda x, i: (x * 1).index_put((i,), x[:6], accumulate=True),
        "take": lambda x, i: x.take(i),
        "put": lambda x, i: (x * 1).put(i, x.flatten()[:6], accumulate=True),
        "masked_scatter": lambda x, i: (x * 1).masked_scatter(x > 0, x.flatten()),  # noqa: ARG005
        "masked_fill": lambda x, i: x.masked_fill(x > 0, 0.5),  # noqa: ARG005
        "setitem": lambda x, i: _set(x, i),
        "cumsum": lambda x, i: x.cumsum(1),  # noqa: ARG005
        "cumprod": lambda x, i: x.cumprod(1),  # noqa: ARG005
        "logcumsumexp": lambda x, i: x.logcumsumexp(1),  # noqa: ARG005
        "cummax": lambda x, i: x.cummax(1)[0],  # noqa: ARG005
        "sort": lambda x, i: x.sort(1)[0],  # noqa: ARG005
        "topk": lambda x, i: x.topk(3, 1)[0],  # noqa: ARG005
        "median": lambda x, i: x.median(1)[0],  # noqa: ARG005
        "kthvalue": lambda x, i: x.kthvalue(3, 1)[0],  # noqa: ARG005
        "max": lambda x, i: x.max(1)[0],  # noqa: ARG005
        "amax": lambda x, i: x.amax(1),  # noqa: ARG005
        "repeat": lambda x, i: x.repeat(2, 2),  # noqa: ARG005
        "repeat_interleave": lambda x, i: x.repeat_interleave(2, 0),  # noqa: ARG005
        "one_hot": lambda x, i: F.one_hot(i, 8).to(x.dtype) @ x,
        "bincount": lambda x, i: x * i.bincount(minlength=8)[:, None].to(x.dtype),
        "tril": lambda x, i: x.tril(),  # noqa: ARG005
        "cat": lambda x, i: torch.cat((x, x[i]), 0),
        "stack": lambda x, i: torch.stack((x, x * 2), 1),  # noqa: ARG005
        "split": lambda x, i: [y.tanh() for y in x.split(4, 1)],  # noqa: ARG005
        "unbind": lambda x, i: [y.tanh() for y in x.unbind(0)],  # noqa: ARG005
        "flip": lambda x, i: x.flip(0),  # noqa: ARG005
        "norm": lambda x, i: x.norm(dim=1),  # noqa: ARG005
        "normalize": lambda x, i: F.normalize(x),  # noqa: ARG005
        "logsumexp": lambda x, i: x.logsumexp(1),  # noqa: ARG005
        "var": lambda x, i: x.var(1),  # noqa: ARG005
        "std_mean": lambda x, i: torch.std_mean(x, 1),  # noqa: ARG005
        "prod": lambda x, i: (x.abs() + 1).prod(1),  # noqa: ARG005
        "rand_like": lambda x, i: x * torch.rand_like(x),  # noqa: ARG005
        "randn": lambda x, i: x + torch.randn(8, 16, device=x.device, dtype=x.dtype),  # noqa: ARG005
        "bernoulli": lambda x, i: x * x.sigmoid().bernoulli(),  # noqa: ARG005
        "multinomial": lambda x, i: x[x.softmax(1).multinomial(2)[:, 0] % 8],  # noqa: ARG005
        "randperm": lambda x, i: x[torch.randperm(8, device=x.device)],  # noqa: ARG005
        "complex": lambda x, i: torch.fft.rfft(x.float()).abs(),  # noqa: ARG005
        "inverse": lambda x, i: torch.linalg.inv(x.float() @ x.float().t() + 9 * torch.eye(8, device=x.device)),  # noqa: ARG005
    }
    for name, function in menu.items():
        yield from typed(f"index/{name}", functools.partial(Call, function), where)


def _set(x: Tensor, i: Tensor) -> Tensor:
    y = x * 2
    y[i[:2]] = 1.0
    y[:, 2:4] = x[:, :2]
    return y


MENU: dict[str, LayerCase] = {
    case.name: case
    for part in (norms, recurrent, attention, indexing, losses, convolutions, activations, images)
    for case in part()
}
