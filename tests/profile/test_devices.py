"""What devices can do: plausible, documented as it is written, found by the names that people and drivers use."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tabulate import tabulate
from torch import nn

import fxckpt
from fxckpt.errors import BudgetError
from fxckpt.profile import calibrate, known, settings
from fxckpt.profile.calibrate import Sizes, profile_from, timed, work
from fxckpt.profile.costs import device_profile
from fxckpt.profile.devices import DEVICES, DeviceProfile, named, of_driver
from fxckpt.profile.estimate import roofline_us

GPUS = [profile for profile in DEVICES.values() if profile.name not in ("reference", "cpu")]
GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")


def tera(rate: float) -> str:
    return f"{rate / 1e12:.4g}"


def table() -> str:
    """The table of the guide."""
    head = ("device", "float32", "TF32", "16 bit", "float64", "memory, GB", "TB/s", "host, GB/s", "links, GB/s")
    rows = [
        (
            p.name,
            *(tera(p.flops_per_s[kind]) for kind in ("float32", "tf32", "bfloat16", "float64")),
            f"{p.memory_bytes / 1e9:.0f}",
            tera(p.bytes_per_s),
            f"{p.host_bytes_per_s / 1e9:.3g}",
            f"{p.link_bytes_per_s / 1e9:.3g}" if p.link_bytes_per_s else "-",
        )
        for p in GPUS
    ]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def test_the_guide_has_the_table_and_names_the_sources() -> None:
    assert table() in GUIDE
    flat = " ".join(GUIDE.split())
    assert [p.name for p in GPUS if p.source not in flat] == []


@pytest.mark.parametrize("profile", GPUS, ids=lambda profile: profile.name)
def test_figures_are_plausible(profile: DeviceProfile) -> None:
    rates = profile.flops_per_s
    assert rates["bfloat16"] == rates["float16"] >= rates["tf32"] >= rates["float32"] >= rates["float64"]
    assert 1.9 < rates["bfloat16"] / rates["tf32"] < 2.1  # tensor cores: half the bits, twice the rate
    assert rates["float32"] > 1e13
    if "float8_e4m3fn" in rates:
        assert 1.9 < rates["float8_e4m3fn"] / rates["bfloat16"] < 2.1
    assert 0.5e12 < profile.bytes_per_s < 1e13
    assert 100 < rates["bfloat16"] / profile.bytes_per_s < 500  # operations for each byte: since 2020 all are there
    assert 5 < profile.memory_bytes / profile.bytes_per_s * 1e3 < 60  # all of it is read in some ten milliseconds
    assert profile.host_bytes_per_s in (31.5e9, 63e9)
    assert profile.link_bytes_per_s == 0 or profile.host_bytes_per_s < profile.link_bytes_per_s < profile.bytes_per_s
    assert profile.allocation_bytes == 512
    assert "data sheet" in profile.source or "white paper" in profile.source


def test_every_name_leads_to_one_device() -> None:
    names = [name for profile in DEVICES.values() for name in (profile.name, *profile.aliases)]
    assert all(sum(p.is_called(name) for p in DEVICES.values()) == 1 for name in names)
    assert {"H100", "H200", "B200", "A100", "L40S", "RTX 4090", "RTX 5090", "MI300X"} <= DEVICES.keys()


@pytest.mark.parametrize(
    ("written", "name"),
    [("rtx4090", "RTX 4090"), ("h100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("A100-SXM4-80GB", "A100")],
)
def test_names_may_be_written_otherwise(written: str, name: str) -> None:
    found = named(written)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090D", None),
        ("Tesla T4", None),
    ],
)
def test_what_drivers_call_them(driver: str, name: str | None) -> None:
    found = of_driver(driver)
    assert (found.name if found else None) == name


def test_float32_counts_as_tf32_only_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4096, 4096, bias=False), torch.empty(4096, 4096, device="meta")

    def step_us() -> float:
        model.to("meta")
        return fxckpt.plan(model, 1.0, example_inputs=(x,), device="H100").predicted.step_us

    plain_us = step_us()
    monkeypatch.setattr("fxckpt.profile.estimate.tf32_in_products", lambda: True)
    assert 3 < plain_us / step_us() < 8  # two products, and the sum of their times is nearly all


def test_tf32_follows_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert not settings.tf32_in_products()
        torch.set_float32_matmul_precision("high")
        assert settings.tf32_in_products()
        assert "TF32 products" in settings.settings()
    finally:
        torch.set_float32_matmul_precision(before)
    assert settings.tf32_in_convolutions()


def test_no_cuda_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BudgetError, match="there is none: name one"):
        device_profile(torch.device("cpu"), "cuda")
    with pytest.raises(BudgetError, match=r"no device 'K80'; choose one of .*H200.*, cuda, or give"):
        device_profile(torch.device("cpu"), "K80")


class FixedClock:
    """Everything takes the times given, when it has run once."""

    def __init__(self, times_us: dict[str, float]) -> None:
        self.times_us, self.ran = times_us, dict[str, object]()

    def time(self, name: str, run: object, expected_us: float) -> None:
        assert callable(run)
        self.ran[name] = run()
        assert expected_us > 0

    def finish(self) -> dict[str, float]:
        assert self.ran.keys() == self.times_us.keys()
        return self.times_us


SIZES = Sizes(side=64, copied_bytes=4096, host_bytes=1024)
TIMES_US = {
    "product in torch.float32": 8.0,
    "product in torch.bfloat16": 1.0,
    "product in torch.float16": 2.0,
    "product in torch.float64": 4.0,
    "copy": 0.5,
    "copy from the host": 2.0,
    "launch": 3.0,
}


def test_rates_follow_from_what_is_timed() -> None:
    before = torch.get_rng_state()
    clock = FixedClock(TIMES_US)
    profile = profile_from("some GPU", timed(torch.device("cpu"), SIZES, clock), SIZES, 10**9, DEVICES["H200"])
    assert torch.equal(torch.get_rng_state(), before)
    product = 2 * 64**3
    assert profile.flops_per_s == pytest.approx(
        {
            "float32": product / 8e-6,
            "bfloat16": product / 1e-6,
            "float16": product / 2e-6,
            "float64": 2 * 16**3 / 4e-6,
            "tf32": product / 2e-6,
        }
    )
    assert (profile.bytes_per_s, profile.host_bytes_per_s) == pytest.approx((8192 / 0.5e-6, 1024 / 2e-6))
    assert (profile.launch_us, profile.memory_bytes, profile.link_bytes_per_s) == (3.0, 10**9, 450e9)
    assert profile.blas_bytes == DEVICES["H200"].blas_bytes > 0
    assert roofline_us(profile, product, 0, "bfloat16") == pytest.approx(1.0 + 3.0)
    assert math.isclose(roofline_us(profile, product, 0, "float8_e5m2"), 8.0 + 3.0)  # not known: as float32


def test_a_device_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the place of a CUDA device."""
    file, clocks = tmp_path / "costs.json", []

    def clock_of(_: torch.device) -> FixedClock:
        clocks.append(FixedClock(TIMES_US))
        return clocks[-1]

    monkeypatch.setattr(calibrate, "Sizes", lambda: SIZES)
    monkeypatch.setattr(calibrate, "clock_of", clock_of)
    for _ in range(3):
        assert calibrate.times_us(torch.device("cpu"), file) == TIMES_US
        known.KNOWN.forget()
    assert len(clocks) == 1
    assert [name for name, _ in work(torch.device("cpu"), SIZES)] == list(TIMES_US)
