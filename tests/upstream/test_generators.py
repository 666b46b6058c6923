"""What one thread does to random-number generators is undone without undoing what others do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxckpt.capture.joint import capture
from fxckpt.errors import CaptureError
from fxckpt.upstream.generators import DrawsRefused, RandomDraw, generators_kept

X = torch.linspace(0.1, 0.9, 2 * 4 * 8).reshape(2, 4, 8)


def refuse(seed: int) -> None:
    raise ValueError(f"seeds with {seed}")


def fork() -> None:
    with torch.random.fork_rng([]):
        torch.seed()


MOVES: dict[str, Callable[[], object]] = {
    "seed": torch.seed,
    "state": lambda: torch.set_rng_state(torch.Generator().manual_seed(9).get_state()),
    "fork": fork,
    "twice": lambda: (torch.seed(), torch.seed()),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_a_thread_moves_is_put_back(move: str) -> None:
    before = torch.get_rng_state()
    with generators_kept(refuse):
        MOVES[move]()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_puts_back_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="seeds with 3"), generators_kept(refuse):  # noqa: PT012
        torch.seed()
        torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_other_threads_move_stays() -> None:
    with ThreadPoolExecutor(1) as other:
        with generators_kept(refuse):
            other.submit(torch.manual_seed, 5).result()
            other.submit(torch.rand, 3).result()
        found = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(found, torch.rand(3))


class Moves(nn.Module):
    def __init__(self, move: Callable[[], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        self.move()
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_moves_a_generator_is_captured_without_a_trace(move: str) -> None:
    model = Moves(MOVES[move])
    before = torch.get_rng_state()
    capture(model, (X,))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_seeds_is_refused_wherever_it_has_the_function_from() -> None:
    from torch import manual_seed

    for seeds in (manual_seed, torch.random.manual_seed):
        with pytest.raises(CaptureError, match="seeds the random-number generator"):
            capture(Moves(lambda seeds=seeds: seeds(0)), (X,))  # type: ignore[misc]


DRAWS: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(3, (2,)),
    "randperm": lambda: torch.randperm(5),
    "normal": lambda: torch.normal(X, X),
    "bernoulli": lambda: torch.bernoulli(X),
    "multinomial": lambda: torch.multinomial(X[0], 2),
    "poisson": lambda: torch.poisson(X),
    "in place": lambda: X.clone().uniform_(),
    "exponential": lambda: X.clone().exponential_(),
    "dropout": lambda: F.dropout(X, 0.5),
    "feature dropout": lambda: F.dropout1d(X, 0.5),
    "alpha dropout": lambda: F.alpha_dropout(X, 0.5, training=True),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "gumbel": lambda: F.gumbel_softmax(X),
    "distribution": lambda: torch.distributions.Gamma(X, X).sample(),
    "generator": lambda: torch.rand(3, generator=torch.Generator()),
    "initialisation": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_refused_before_anything_is_drawn(draw: str) -> None:
    before = torch.get_rng_state()
    with torch.no_grad(), DrawsRefused(), pytest.raises(RandomDraw, match="draws random numbers"):
        DRAWS[draw]()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_draws_nothing_is_computed() -> None:
    with DrawsRefused():
        assert F.dropout(X, 0.5, training=False).sum() == X.sum()
