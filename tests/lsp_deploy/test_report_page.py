"""report.html: one file that loads nothing, escapes what it is given, and shows what the report says."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from report_samples import sample_attention, sample_engine, sample_plan, sample_pruning, sample_report

from lsp_deploy.plan import AttentionDecision, Plan
from lsp_deploy.reporting.execution_rows import attention_execution
from lsp_deploy.reporting.figures import accuracy_axis, drop_axis, latency_groups, wilson
from lsp_deploy.reporting.page import render_page
from lsp_deploy.reporting.report import Report
from lsp_deploy.reporting.sections import LayerStructure

VOID = {"meta", "br", "img", "input", "wbr", "link", "hr"}
EVIL = "<script>alert(1)</script>\"' onload=x javascript:alert(2)"


class Page(HTMLParser):
    """Reads a page: its tags, its text, and whether every tag is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan(blocks=5, width=64, pattern="block")


@pytest.fixture(scope="module")
def report(plan: Plan) -> Report:
    engine = sample_engine(plan, other_precision=[plan.layers[2].name])
    return sample_report(plan, engine=engine, pruning=sample_pruning(plan), attention=sample_attention(5))


@pytest.fixture(scope="module")
def html(plan: Plan, report: Report) -> str:
    return render_page(report, plan)


def test_the_page_is_well_formed(html: str) -> None:
    assert not Page(html).open
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in Page(html).all("a")} <= {f"#{name}" for name in ids}


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"url\(|@import|//[a-z]+\.", html.replace("// Sorts", ""))
    for tag in ("link", "iframe", "object", "embed", "base", "form"):
        assert not page.all(tag)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert all((image["href"] or "").startswith("data:image/png;base64,") for image in page.all("image"))
    assert page.all("img") and page.all("image")
    assert all("src" not in script for script in page.all("script"))


def test_the_content_security_policy_allows_the_page_itself_and_nothing_else(html: str) -> None:
    policy = next(meta["content"] for meta in Page(html).all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in Page(html).tags)
    assert not any(name.startswith("on") for _, attributes in Page(html).tags for name in attributes)


def test_names_from_the_model_are_escaped(plan: Plan) -> None:
    hostile = plan.branch()
    hostile.layers[1].name = hostile.layers[1].role = EVIL
    hostile.layers[1].sparsity.reason = hostile.layers[1].precision.reason = EVIL
    hostile.masks[EVIL] = plan.masks[plan.layers[1].name]
    fields = sample_report(plan).model_dump()
    report = sample_report(
        hostile,
        command=EVIL,
        notes=[EVIL],
        warnings=[EVIL],
        model=fields["model"] | {"file": EVIL},
        outputs=[{"name": EVIL, "what": EVIL}],
    )
    html = render_page(report, hostile)
    page = Page(html)
    assert html.count("<script>") == 1
    assert "<script>alert" not in html
    assert not page.open
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert not [link for link in page.all("a") if "javascript" in (link["href"] or "")]


def test_everything_that_a_reader_looks_for_is_there(html: str, report: Report) -> None:
    text = Page(html).text
    for expected in (
        *report.notes,
        *report.warnings,
        report.command,
        "--plan plan.json",
        "23.0 MB",
        "6.21 MB",
        "76.88 %",
        "0.78 points",
        "the patch embedding is not pruned",
        "asked int8, the engine ran fp16 gemm",
        "not the speed of a100",
        "Power not measured",
        "Time of each layer on a100: not measured",
        "Loss: predicted 0.0312 nats of cross-entropy against the dense model's own answer (estimated)",
        "found 0.78 points of top-1 (expectation over measured outputs)",
        "exact allocator, one-shot search, down to 65 % of the dense model's FLOPs of linear layers",
        "the predicted damage is small: one-shot",
        "asked block, got block: asked for",
        "refitted to the residual stream: relative error",
        "masked weights kept: the error on held-out samples rose",
        "removed (counted), δ",
        "removed: nothing attends here any more",
        "1 inactive head: 2",
    ):
        assert expected in text
    for layer in report.layers:
        assert layer.name in text.replace(" ", "")


def test_every_layer_has_a_row_with_headers_and_sort_keys(html: str, report: Report) -> None:
    page = Page(html)
    rows = [row for row in page.all("tr") if "data-role" in row]
    assert len(rows) == len(report.layers)
    assert sum(header.get("scope") == "row" for header in page.all("th")) == len(report.layers)
    assert sum(header.get("scope") == "col" for header in page.all("th")) == 10
    assert sum(row.get("class") == "differs" for row in rows) == 1
    assert all(image["alt"] for image in page.all("img"))
    keys = [cell["data-sort"] for cell in page.all("td") + page.all("th") if "data-sort" in cell]
    assert len(keys) == 9 * len(rows)
    assert all(keys)


def test_filters_name_groups_that_rows_belong_to(html: str) -> None:
    page = Page(html)
    rows = [row for row in page.all("tr") if "data-role" in row]
    values = [option["value"] for option in page.all("option") if ":" in (option.get("value") or "")]
    assert values
    for value in values:
        topic, group = str(value).split(":")
        assert any(row[f"data-{topic}"] == group for row in rows), value


def test_the_same_report_gives_the_same_page(plan: Plan, report: Report, html: str) -> None:
    assert render_page(report, plan) == html


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("classifier", [True, False])
def test_reports_without_labels_classes_engine_or_masks(labelled: bool, classifier: bool) -> None:
    plan = sample_plan(blocks=1, width=64)
    for layer in plan.layers:
        layer.sparsity.pattern, layer.sparsity.zeros = "dense", 0.0
    plan.masks.clear()
    report = sample_report(
        plan, labelled=labelled, classifier=classifier, profiles=[], speedups=[], notes=[], warnings=[]
    )
    page = Page(render_page(report, plan))
    assert not page.open
    assert "No layer was pruned." in page.text
    assert "not built" in page.text
    assert "trtexec --onnx=model.onnx" in page.text
    assert ("Top-1" in page.text) == (labelled and classifier)
    assert ("Same answer as dense" in page.text) == (classifier and not labelled)
    assert not page.all("img")
    for absent in ("Block patterns", "δ-curves", "Attention before and after", "No attention maps", "2:4 in"):
        assert absent not in page.text


def test_a_report_without_fidelity_says_nothing_of_accuracy(plan: Plan) -> None:
    page = Page(render_page(sample_report(plan, fidelity=None, budget=None), plan))
    assert not page.open
    assert "Top-1" not in page.text


def test_a_large_model_stays_below_two_megabytes() -> None:
    plan = sample_plan(blocks=37, width=256, pattern="block")
    assert len(plan.layers) == 150
    report = sample_report(
        plan, engine=sample_engine(plan), pruning=sample_pruning(plan), attention=sample_attention(37, heads=16)
    )
    assert len(render_page(report, plan).encode()) < 2_000_000


def test_a_plan_that_was_carried_out_shows_its_zeros_but_not_how_they_were_found(plan: Plan) -> None:
    text = Page(render_page(sample_report(plan), plan)).text
    assert "Block patterns" in text
    assert "refitted to the layer output" in text
    for absent in ("How zeros were chosen", "δ-curves", "Attention before and after", "No attention maps"):
        assert absent not in text


def test_what_is_left_of_a_layer_stands_in_a_line_of_its_own(plan: Plan) -> None:
    """Both sizes in one line pushed the reasons out of a page of 1280 pixels."""
    report = sample_report(plan)
    rows = list(report.layers)
    layer = rows[1]
    structure = LayerStructure(K=layer.K, N=layer.N - 32, note="32 columns went")
    rows[1] = layer.model_copy(update={"structure": structure})
    report = report.model_copy(update={"layers": rows})
    assert f"{layer.K} × {layer.N}<br>→ {layer.K} × {layer.N - 32}</td>" in render_page(report, plan)


def test_attention_that_stays_as_exported_is_named_with_its_reason(plan: Plan) -> None:
    decided = AttentionDecision(left={"blocks.3/Softmax": "its heads are mixed"}, reason="1 stays as exported")
    report = sample_report(plan).model_copy(update={"attention_execution": attention_execution(decided)})
    text = Page(render_page(report, plan)).text
    assert "1 stays as exported" in text and "blocks.3/Softmax" in text and "as exported: its heads are mixed" in text


def test_attention_that_cannot_be_compared_is_explained(plan: Plan) -> None:
    text = Page(render_page(sample_report(plan, pruning=sample_pruning(plan)), plan)).text
    assert "No attention maps: they compare Softmax nodes" in text


def test_two_four_layers_are_listed_not_drawn() -> None:
    plan = sample_plan(blocks=2, width=64)
    html = render_page(sample_report(plan), plan)
    page = Page(html)
    assert "2:4 in 8 layers" in page.text
    assert not page.all("img")
    (listed,) = re.findall(r"<details>(.*?)</details>", html, re.DOTALL)
    assert listed.count("<li>") == 8


def test_layers_of_other_blocks_are_shown_on_demand(html: str) -> None:
    inside = re.findall(r"<details>(.*?)</details>", html, re.DOTALL)
    assert [part.count("<img") for part in inside] == [8, 0]
    assert html.count("<img") == 20
    assert "The other 8 layers" in Page(html).text


def test_wilson_interval() -> None:
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((40.38, 59.62), abs=0.01)  # Newcombe, Statistics in Medicine 17, 1998
    low, high = wilson(100, 160)
    assert high == 100
    assert 97 < low < 98


def test_intervals_lie_around_their_values(report: Report) -> None:
    assert report.fidelity is not None
    for axis in (accuracy_axis(report.fidelity), drop_axis(report.fidelity, 1.0)):
        assert axis is not None
        for row in axis.rows:
            assert 0 <= row.low_percent <= row.at_percent <= row.high_percent <= 100
    drop = drop_axis(report.fidelity, 1.0)
    assert drop is not None and drop.limit_percent is not None
    assert all(row.at_percent < drop.limit_percent for row in drop.rows)


def test_latency_bars_share_their_scale(report: Report) -> None:
    (group,) = latency_groups(report.profiles)
    assert [statistic for statistic, _ in group.rows] == ["min", "median", "p90", "p99"]
    lengths = {statistic: [bar.length_percent for bar in bars] for statistic, bars in group.rows}
    assert lengths["p99"][0] == 100
    assert lengths["median"][1] / lengths["median"][0] == pytest.approx(11.9 / 18.4)
