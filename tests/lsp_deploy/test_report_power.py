"""Power in the report: from profiles to rows, cards, words and the page."""

from __future__ import annotations

import io

import pytest
from report_samples import sample_plan, sample_profile, sample_report
from rich.console import Console

from lsp_deploy.engines.power.recording import PowerFigures
from lsp_deploy.engines.profiler import Profile
from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.cards import cards
from lsp_deploy.reporting.page import render_page
from lsp_deploy.reporting.power_rows import power_section, power_words
from lsp_deploy.reporting.report import Report
from lsp_deploy.reporting.sections import PowerSection
from lsp_deploy.reporting.summary import summary_renderables


def figures(power_w: float, per_s: float) -> PowerFigures:
    return PowerFigures(
        meter="RAPL, powercap",
        covers="CPU package-0",
        caveat="others are in it",
        regime="back-to-back",
        power_w=power_w,
        power_low_w=power_w - 1,
        power_high_w=power_w + 1,
        parts_w={"package-0": power_w},
        idle_before_w=9,
        idle_after_w=11,
        net_power_w=power_w - 10,
        energy_per_inference_j=power_w / per_s,
        net_energy_per_inference_j=(power_w - 10) / per_s,
        inferences_per_s=per_s,
        inferences=600,
        windows=3,
        window_s=2,
        readings=3,
        state={"mode": "quiet"},
    )


def profile(label: str, power: PowerFigures | None, note: str = "") -> Profile:
    return sample_profile(label, power=power, power_note=note)


@pytest.fixture
def measured() -> PowerSection:
    return power_section(
        {"dense": profile("dense", figures(50, 100)), "compressed": profile("compressed", figures(40, 1000))}
    )


def with_power(section: PowerSection) -> Report:
    return sample_report(sample_plan(blocks=1, width=64)).model_copy(update={"power": section})


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    for renderable in summary_renderables(report):
        console.print(renderable, crop=False)
    return " ".join(console.file.getvalue().split())


def test_rows_of_dense_and_compressed(measured):
    assert (measured.basis, measured.note) == ("measured", "")
    assert (measured.meter, measured.regime, measured.caveat) == ("RAPL, powercap", "back-to-back", "others are in it")
    dense, compressed = measured.rows
    assert (dense.label, dense.power_w, dense.energy_per_inference_j, dense.net_energy_per_inference_j) == (
        "dense",
        50,
        0.5,
        0.4,
    )
    assert (compressed.label, compressed.net_power_w, compressed.window_seconds) == ("compressed", 30, 2)
    assert PowerSection.model_validate_json(measured.model_dump_json()) == measured


def test_without_a_meter_the_reason_is_all_there_is():
    note = "not measured: no CPU package has an energy counter"
    section = power_section({label: profile(label, None, note) for label in ("dense", "compressed")})
    assert (section.basis, section.note, section.rows) == ("not measured", note, [])
    assert power_words(section) == [("Power", note)]
    report = with_power(section)
    assert note in printed(report)
    assert note in render_page(report, sample_plan(blocks=1, width=64))
    assert not [card for card in cards(report) if "nergy" in card.title]


def test_one_model_alone_is_no_comparison():
    section = power_section(
        {"dense": profile("dense", figures(50, 100)), "compressed": profile("compressed", None, "it failed")}
    )
    assert (section.basis, section.note, section.rows) == ("not measured", "it failed", [])


def test_the_card(measured):
    (card,) = (card for card in cards(with_power(measured)) if card.title == "Energy of one inference")
    assert (card.value, card.basis) == ("40.0 mJ", "measured")
    assert card.share_percent == pytest.approx(8)
    assert "was 0.500 J, batch 8, back-to-back; above idle 30.0 mJ, was 0.400 J" in card.detail


def test_the_page_and_the_summary(measured):
    report = with_power(measured)
    page = render_page(report, sample_plan(blocks=1, width=64))
    for expected in (
        "50.0 W (49.0 W to 51.0 W over 3 windows), 40.0 W above idle; 0.500 J an inference, 0.400 J above idle",
        "1000.0 inferences/s",
        "it covers CPU package-0; others are in it; idle power 9.00 W and 11.0 W, before and after",
        "mode quiet",
    ):
        assert expected in page
    text = printed(report)
    for expected in ("power 50.0 W 40.0 W", "power above idle 40.0 W 30.0 W", "energy above idle 0.400 J 30.0 mJ"):
        assert expected in text


def test_numbers_below_zero_are_shown_as_they_are():
    assert (formatting.watts(-0.25), formatting.joules(-0.002)) == ("−0.250 W", "−2.00 mJ")
    assert (formatting.watts(0), formatting.joules(0)) == ("0 W", "0 mJ")
