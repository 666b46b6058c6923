"""The page of a plan, in a real browser: what it shows is what `simulate` says, and names in a plan are inert."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from fxckpt.core.graph import Graph, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.report import rows, table
from fxckpt.core.report.page import page
from fxckpt.core.report.palette import KIND_COLOURS
from fxckpt.core.report.prose import closing_text
from fxckpt.core.report.sampling import columns
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import PEAK_KINDS
from fxckpt.errors import FxckptError
from fxckpt.units import format_bytes, format_us
from tests.support.strategies import chain

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)
HOSTILE = (
    "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">{{plan}}\u2028"
)


def make_plan() -> Plan:
    graph = chain()
    ops = tuple(replace(op, module=f"layers.{i % 4}", source=f"model.py:{i}") for i, op in enumerate(graph.ops))
    return Plan(replace(graph, ops=ops), Schedule((0, 1, 2, 3, 4, 0, 1, 5, 6, 7), 4), "dp", "reference", 130)


class Page:
    """A page in a browser."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, plan: Plan, file: Path) -> None:
        plan.save_html(file)
        self.browser.get(file.as_uri())
        assert self.browser.get_log("browser") == []

    def find(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector)[0].text

    def script(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def press(self, key: str) -> None:
        self.find("#chart")[0].send_keys(key)

    def step(self) -> int:
        return int(self.find("#chart")[0].get_attribute("aria-valuenow") or 0) - 1

    def alive(self) -> list[int]:
        return sorted(int(row.get_attribute("data-life") or -1) for row in self.find("#alive tbody tr"))

    def legend(self) -> dict[str, str]:
        texts = [entry.text.split("\n") for entry in self.find("#legend > div")]
        return dict(texts)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    flags = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in (*flags, profile, "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield Page(browser)
    browser.quit()


@needs_chromium
def test_the_peak_is_shown_first_as_simulated(shown: Page, tmp_path: Path) -> None:
    plan = make_plan()
    shown.open(plan, tmp_path / "plan.html")
    assert shown.step() == plan.timeline.peak_step == 7
    assert "the peak" in shown.text("#now h2")
    assert shown.script("return performance.getEntriesByType('resource').length") == 0
    assert shown.find("#total")[0].get_attribute("data-bytes") == str(plan.timeline.peak_bytes)
    figures = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in shown.find("#figures tr")
    ]
    headers, body = table.figures(plan)
    assert figures == [headers, *body]


@needs_chromium
def test_at_every_step_the_page_shows_what_is_alive(shown: Page, tmp_path: Path) -> None:
    plan, timeline = make_plan(), make_plan().timeline
    shown.open(plan, tmp_path / "plan.html")
    shown.press(Keys.HOME)
    for step, index in enumerate(plan.schedule.order):
        op = plan.graph.ops[index]
        assert shown.step() == step
        assert shown.alive() == [timeline.lifetimes.index(life) for life in timeline.alive_at(step)]
        breakdown = {kind: format_bytes(size) for kind, size in timeline.breakdown(step).items()}
        legend = shown.legend()
        assert {kind: size for kind, size in legend.items() if kind in PEAK_KINDS}.items() <= breakdown.items()
        assert legend["in use"] == format_bytes(int(timeline.live_bytes[step]))
        facts = shown.text("#now dl")
        assert f"{op.target} ({op.name})" in facts
        assert op.module in facts
        assert op.source in facts
        assert ("run 2 of 2: steps" in facts) == ("runs again" in shown.text("#now h2")) == (step in (5, 6))
        shown.press(Keys.ARROW_RIGHT)
    assert shown.step() == 9


@needs_chromium
def test_long_steps_are_drawn_in_the_columns_of_the_other_pictures(shown: Page, tmp_path: Path) -> None:
    graph = chain(tuple(range(1, 600)))
    plan = Plan(graph, plain(graph), "save_all", "reference", 1)
    shown.open(plan, tmp_path / "plan.html")
    assert shown.script("return steps") == 1200
    for most in (7, 250, 1199, 1200):
        code = "return columns([...plan.live_bytes.keys(), steps], plan.live_bytes, steps, arguments[0])"
        edges, steps = columns(plan.timeline, "steps", most)
        drawn = shown.script(code, most)
        assert [step for _, step in drawn] == steps.tolist()
        assert [edge for edge, _ in drawn] == pytest.approx(edges[:-1].tolist())


@needs_chromium
def test_the_keyboard_moves_the_cursor_and_keeps_it_inside(shown: Page, tmp_path: Path) -> None:
    shown.open(make_plan(), tmp_path / "plan.html")
    for key, step in (
        (Keys.HOME, 0),
        (Keys.ARROW_LEFT, 0),
        (Keys.PAGE_UP, 1),
        (Keys.ARROW_RIGHT, 2),
        (Keys.END, 9),
        (Keys.ARROW_RIGHT, 9),
        (Keys.PAGE_DOWN, 8),
        ("p", 7),
    ):
        shown.press(key)
        assert shown.step() == step


@needs_chromium
def test_pointing_at_the_timeline_and_at_runs(shown: Page, tmp_path: Path) -> None:
    shown.open(make_plan(), tmp_path / "plan.html")
    shown.find("input[value=steps]")[0].click()
    chart = shown.find("#chart")[0]
    across = shown.script("return [scale.x(5.5), chart.clientWidth / 2]")
    action = webdriver.ActionChains(shown.browser)
    action.move_to_element_with_offset(chart, across[0] - across[1], 0).perform()
    assert shown.step() == 5
    first, second = shown.find("#now dl button")
    assert (first.text, second.text) == ("1", "6")
    first.click()
    assert shown.step() == 0
    shown.script("document.querySelector('#alive button').focus()")
    assert shown.script("return document.querySelector('.tensor').getAttribute('d').split('M').length - 1") == 2


@needs_chromium
def test_the_table_is_that_of_print_plan_and_sorts(shown: Page, tmp_path: Path) -> None:
    plan = make_plan()
    shown.open(plan, tmp_path / "plan.html")

    def cells() -> list[list[str]]:
        found = shown.find("#tensors tbody tr")
        return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td[data-of]")] for row in found]

    assert cells() == [table.cells(plan.graph, row) for row in rows.rows(plan, fold=True)]
    column = table.COLUMNS.index("bytes")
    for _, order in ((0, [40, 20, 10, 1]), (1, [1, 10, 20, 40])):
        shown.find("#tensors th button")[column].send_keys(Keys.ENTER)
        assert [row[column] for row in cells()] == [format_bytes(size) for size in order]
    assert shown.find("#tensors th[aria-sort]")[column].get_attribute("aria-sort") == "ascending"


@needs_chromium
def test_strips_show_when_tensors_are_in_memory(shown: Page, tmp_path: Path) -> None:
    plan, timeline = make_plan(), make_plan().timeline
    shown.open(plan, tmp_path / "plan.html")
    shown.find("input[value=steps]")[0].click()
    for row, strip in zip(rows.rows(plan, fold=True), shown.find("#tensors .lane svg"), strict=True):
        lives = [(life, kind) for life, kind in zip(timeline.lifetimes, timeline.kinds, strict=True)]
        wanted = {
            (KIND_COLOURS[kind], 100 * life.born, 100 * (life.dies + 1))
            for life, kind in lives
            if life.storage in row.storages
        }
        drawn = set()
        for path in strip.find_elements(By.CSS_SELECTOR, "path"):
            bars = re.findall(r"M([\d.]+) 0H([\d.]+)", path.get_attribute("d") or "")
            drawn |= {(path.get_attribute("fill"), float(left), float(right)) for left, right in bars}
        assert drawn == wanted
    shown.press(Keys.HOME)
    assert shown.script("return document.body.style.getPropertyValue('--cursor')") == "5%"


@needs_chromium
def test_the_page_begins_with_the_advice_that_ends_the_text(shown: Page, tmp_path: Path) -> None:
    shown.open(make_plan(), tmp_path / "plan.html")
    assert shown.text("#advice") == closing_text(make_plan())
    assert shown.text("#advice") in " ".join(table.plan_text(make_plan()).split())


@needs_chromium
def test_sizes_and_times_are_written_as_in_the_text(shown: Page, tmp_path: Path) -> None:
    shown.open(make_plan(), tmp_path / "plan.html")
    sizes = [0, 1, 1023, 1024, 1152, 1536, 1048063, 1048064, 1047552, 2**20 + 2**17, 10 * 2**20, 3**30, 7**16, 2**45]
    times = [0.0, 0.004, 0.125, 0.5, 1.0, 9.995, 12.345, 999.4, 999.6, 1e3, 12_340.0, 2.5e6, 1e9]
    assert shown.script("return arguments[0].map(formatBytes)", sizes) == [format_bytes(size) for size in sizes]
    assert shown.script("return arguments[0].map(formatTime)", times) == [format_us(time) for time in times]


@needs_chromium
def test_names_in_a_plan_are_inert(shown: Page, tmp_path: Path) -> None:
    plan = make_plan()
    fields: dict[str, Any] = {"name": HOSTILE, "target": HOSTILE, "module": HOSTILE, "source": f"{HOSTILE}:1"}
    ops = tuple(replace(op, pinned="" if i < 2 else HOSTILE, **fields) for i, op in enumerate(plan.graph.ops))
    storages = tuple(Storage(HOSTILE, s.size_bytes, s.kind) for s in plan.graph.storages)
    graph = replace(plan.graph, ops=ops, storages=storages)
    shown.open(Plan(graph, plan.schedule, HOSTILE, HOSTILE, 130), tmp_path / "plan.html")
    assert shown.browser.title == "fxckpt plan"
    assert not shown.find("img")
    assert len(shown.find("script")) == 2
    assert HOSTILE.rstrip("\u2028") in shown.text("#now dl")
    assert shown.script("return plan.ops.name[0]") == HOSTILE


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(scheme: str, shown: Page, tmp_path: Path) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    shown.open(make_plan(), tmp_path / "plan.html")
    paper = luminance(shown.script("return getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for selector in ("body", ".muted", "th", "#chart text"):
        name = "fill" if "text" in selector else "color"
        ink = luminance(shown.script(f"return getComputedStyle(document.querySelector('{selector}')).{name}"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_chromium
def test_nothing_is_wider_than_a_phone(shown: Page, tmp_path: Path) -> None:
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    shown.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    shown.open(make_plan(), tmp_path / "plan.html")
    assert shown.script("return document.documentElement.scrollWidth") == 390
    shown.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_equal_plans_have_equal_pages_that_load_nothing() -> None:
    text = page(make_plan())
    assert text == page(Plan.from_json(make_plan().to_json()))
    assert "default-src 'none'" in text
    for sign in ("src=", "@import", "url(", "fetch(", "XMLHttpRequest"):
        assert sign not in text
    data = text.split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["peak_bytes"] == make_plan().predicted.peak_bytes


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxckptError, match="can't write"):
        make_plan().save_html(tmp_path / "nowhere" / "plan.html")
    with pytest.raises(FxckptError, match="no ops"):
        Plan(Graph((), (), 0), Schedule((), 0), "dp", "reference", 1).save_html(tmp_path / "plan.html")
