"""What is made of the results of `benchmarks.frontier`: on results made up here, and on those that are committed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.frontier_report import Point, Result, Rival, read, write
from benchmarks.frontier_summary import BEGIN, details, found_in, overview, page
from benchmarks.marked import END, placed
from fxckpt.core.simulate import Figures
from fxckpt.steps.comparison import Ratio

ROOT = Path(__file__).parents[2]
MIB = 2**20


def ratio(median: float) -> Ratio:
    return Ratio(median, median - 0.01, median + 0.01)


def ours(budget_mib: int, time: float | None, *, over_bytes: int = 0, difference: float = 0.0) -> Point:
    budget_bytes = budget_mib * MIB
    predicted = Figures(budget_bytes, 110.0, 10.0, 5)
    taken = None if time is None else ratio(time)
    return Point("fxckpt", "fxckpt", budget_bytes + over_bytes, 1.1, difference, budget_bytes, predicted, taken)


def rival(name: str, mib: int, theirs: float, mine: float) -> Rival:
    peer = Point(name, name.split()[0], mib * MIB, 1.2, 0.0, time=ratio(theirs))
    return Rival(peer, ours(mib, mine), ratio(mine / theirs))


def result(model: str, *rivals: Rival) -> Result:
    plain = Point("plain", "plain", 200 * MIB, 1.0, 0.0)
    return Result(model, plain, 1000.0, Figures(200 * MIB, 100.0, 0, 0), 50 * MIB, (ours(100, 1.1),), rivals)


GPT = result("gpt12", rival("checkpoint every 1", 80, 1.30, 1.17), rival("selective", 120, 1.05, 1.05))
UNET = result("unet4", rival("checkpoint every 1", 60, 1.00, 1.25))


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    unreached = replace(GPT, rivals=(Rival(GPT.rivals[0].peer, None), *GPT.rivals[1:]))
    untimed = replace(UNET, plain_step_us=None, fxckpt=(ours(100, None),), rivals=())
    for written in (GPT, unreached, untimed):
        write(tmp_path, written, runs=3)
        assert read(tmp_path / f"frontier_{written.model}.json") == written


def test_the_overview_has_a_row_a_model_and_says_where_fxckpt_is_slower() -> None:
    text = overview([GPT, UNET], "Measured here.")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[1:] == [
        ["GPT, 12 layers", "200.0", "80.0", "1.300", "1.170", "2", "0.950", "1.000", "nothing"],
        ["U-Net, 4 levels", "200.0", "60.0", "1.000", "1.250", "1", "1.250", "1.250", "checkpoint every 1: 1.250"],
    ]
    assert "(3 comparisons on 2 models)" in text
    assert "1.000 of the other's time in the median, 1.250 in the worst case; in 1 of them" in text
    assert "Of its 5 steps, 5 kept their budget and 5 gave the plain model's gradients" in text
    assert "can't reach" not in text
    assert "Other gradients" not in text
    assert "\n\nMeasured here. " in text


def test_many_that_are_faster_are_counted() -> None:
    many = result("gpt12", *(rival(f"peer {number}", 80, 1.0, 1.1 + number / 100) for number in range(6)))
    assert "peer 5: 1.150, peer 4: 1.140, peer 3: 1.130, 3 more" in overview([many], "")


def test_what_failed_is_told() -> None:
    peer = replace(GPT.rivals[0].peer, gradient_difference=0.5)
    broken = replace(
        GPT,
        fxckpt=(ours(100, 1.1, over_bytes=1), ours(100, 1.1, difference=0.25)),
        rivals=(Rival(peer, None), GPT.rivals[1]),
    )
    text = overview([broken], "")
    assert "can't reach the other's peak in 1 of the comparisons" in text
    assert "Of its 3 steps, 2 kept their budget and 2 gave" in text
    assert "Other gradients than the plain model's come from 1 of the others' steps (`checkpoint`)" in text
    assert "**can't be reached**" in details(broken)
    wrong = replace(GPT, rivals=(replace(GPT.rivals[0], fxckpt=ours(80, 1.0, over_bytes=1, difference=0.25)),))
    assert "| **no**" in details(wrong)
    assert "**off by 0.2**" in details(wrong)
    assert "**1.250" in details(UNET)
    assert "**" not in details(GPT)


def test_results_without_times_say_nothing_about_them() -> None:
    untimed = result("gpt12", *(replace(r, time=None) for r in GPT.rivals))
    text = overview([untimed], "")
    assert "worst case" not in text
    assert "nothing" not in text


def test_models_stand_in_the_usual_order(tmp_path: Path) -> None:
    for one in (result("a_new_one"), UNET, GPT):
        write(tmp_path, one, runs=3)
    results, machine = found_in(tmp_path)
    assert [one.model for one in results] == ["gpt12", "unet4", "a_new_one"]
    assert machine.count("Measured with") == 1
    file = tmp_path / "frontier_unet4.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": {"processor": "another"}}))
    assert found_in(tmp_path)[1].endswith("Measured with processor another.")


def test_the_readme_keeps_all_but_what_is_between_the_marks() -> None:
    text = f"a\n{BEGIN}\nold\n{END}\nb"
    assert placed(text, BEGIN, "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    assert placed(placed(text, BEGIN, "new"), BEGIN, "new") == placed(text, BEGIN, "new")
    with pytest.raises(SystemExit, match="no place"):
        placed("a", BEGIN, "new")


def test_readme_and_page_are_those_of_the_committed_results() -> None:
    folder = ROOT / "benchmarks" / "results"
    results, machine = found_in(folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert placed(readme, BEGIN, overview(results, machine) if results else "") == readme
    assert not results or (folder / "frontier.md").read_text(encoding="utf-8") == page(results, machine)
