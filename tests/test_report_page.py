"""The page in a real browser: it opens alone, sorts, filters, tells values, fits a phone."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import MissingDependencyError
from qexport.report import page as page_module
from qexport.report.content import Comparison, Layers, Measure, Report, Row, Sample
from qexport.report.page import page
from qexport.report.palette import INK, contrast, ramp, styles
from tests.browser import chromium, preferring, resized
from tests.report_content import realistic_report

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'{{7*7}}<!--\u2028\ud800"
MOST_BYTES = 5_000_000
WAIT = 5  # seconds for a chart to be drawn


@pytest.fixture(scope="module")
def html() -> str:
    pytest.importorskip("vl_convert", reason="no vl-convert-python: pip install 'qexport[report]'")
    return page(realistic_report())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as browsing:
        yield browsing


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, file: str) -> Any:
    """The realistic report's page, freshly opened on a desktop in light."""
    return open_page(browser, file)


def open_page(browser: Any, address: str, *, width: int = 1280, scheme: str = "light") -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get_log("browser")
    browser.get_log("performance")
    resized(browser, width)
    # smooth scrolling would move what a click aims at
    preferring(browser, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    browser.get(address)
    drawn = "return document.querySelectorAll('.chart[data-drawn] .points > path').length > 0"
    WebDriverWait(browser, WAIT, poll_frequency=0.05).until(lambda _: browser.execute_script(drawn))
    return browser


def complaints(browser: Any) -> list[str]:
    return [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]


def shown_variants(browser: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#numbers tbody tr')].filter(row => row.offsetHeight > 0)"
        ".map(row => row.cells[0].querySelector('bdi').textContent)"
    )
    return list(browser.execute_script(script))


def heading(browser: Any, text: str) -> Any:
    return browser.find_element("xpath", f"//table[@id='numbers']//th[.//button[normalize-space()='{text}']]")


def tip(browser: Any) -> str:
    script = "const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.innerText"
    return str(browser.execute_script(script))


@pytest.mark.slow
def test_it_opens_from_a_file_without_errors_and_asks_nothing_of_a_network(opened: Any, file: str) -> None:
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    # chrome:// is the empty tab that the browser opens by itself
    assert [url for url in asked if not url.startswith(("data:", "chrome://"))] == [file]
    assert complaints(opened) == []
    assert opened.title == realistic_report().title
    for chart in ("chart-bits", "chart-size"):
        assert len(opened.find_elements("css selector", f"#{chart} .points > path")) == 14


@pytest.mark.slow
def test_a_click_or_a_key_on_a_heading_sorts_and_says_so(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    own = shown_variants(opened)
    size = heading(opened, "Size")
    size.find_element("tag name", "button").click()
    by_size = [row.variant for row in sorted(realistic_report().rows, key=lambda row: row.size_bytes)]
    assert shown_variants(opened) == by_size
    assert size.get_attribute("aria-sort") == "ascending"
    size.find_element("tag name", "button").send_keys(Keys.ENTER)
    assert shown_variants(opened) == by_size[::-1]
    assert size.get_attribute("aria-sort") == "descending"
    size.find_element("tag name", "button").send_keys(Keys.SPACE)
    assert shown_variants(opened) == own
    assert size.get_attribute("aria-sort") is None
    # what was not measured comes last, whichever way
    score = heading(opened, "BLEU vs full").find_element("tag name", "button")
    for best in ("gptq-2", "q8_0"):
        score.click()
        variants = shown_variants(opened)
        assert variants[0] == best
        assert set(variants[-3:]) == {"full", "q4_0", "hqq-2"}


@pytest.mark.slow
def test_it_filters_by_text_by_method_and_by_gates(opened: Any) -> None:
    field = opened.find_element("id", "filter")
    field.send_keys("Q4 GGUF")
    assert shown_variants(opened) == ["q4_k_m", "q4_0"]
    assert opened.find_element("id", "shown").text == "2 of 14 rows"
    field.clear()
    field.send_keys(" ")
    opened.find_element("css selector", "#filters [data-method=gguf]").click()
    assert not {"q8_0", "q4_0"} & set(shown_variants(opened))
    assert len(shown_variants(opened)) == 8
    opened.find_element("id", "passing").click()
    assert shown_variants(opened) == ["full", "bnb-int8", "gptq-4", "awq-4", "bnb-nf4"]
    assert complaints(opened) == []


@pytest.mark.slow
def test_values_show_on_hover_and_by_the_keyboard_alone(opened: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    points = "#chart-bits .points > path"
    find = (
        f"return [...document.querySelectorAll('{points}')].find(p => p.__data__.datum.variant === 'q4_k_m')"
    )
    ActionChains(opened, duration=0).move_to_element(opened.execute_script(find)).perform()
    told = tip(opened)
    assert told.startswith("q4_k_m")
    assert {"1.34 %", "1.01 to 1.67", "4.91", "947 MB"} <= set(told.split("\n"))
    # by keyboard: one stop a chart, then arrows, cheapest first
    opened.execute_script("document.getElementById('measure').focus()")
    keys = ActionChains(opened, duration=0)
    keys.send_keys(Keys.TAB).perform()
    assert tip(opened).startswith("gptq-2")
    keys = ActionChains(opened, duration=0)
    keys.send_keys(Keys.ARROW_RIGHT).perform()
    assert tip(opened).startswith("hqq-2")
    label = str(opened.switch_to.active_element.get_attribute("aria-label"))
    assert "92.3 %" in label
    assert label.startswith("hqq-2")
    ActionChains(opened, duration=0).send_keys(Keys.ESCAPE).perform()
    assert tip(opened) == ""
    # the matrices
    opened.execute_script("document.querySelector('.heat tbody td').focus()")
    ActionChains(opened, duration=0).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN).perform()
    cell = opened.switch_to.active_element
    assert "model.layers.0.self_attn.k_proj.weight" in tip(opened)
    assert f"{cell.text} %" in tip(opened)
    # a pair is told in a sentence of its own
    pair = opened.find_element("css selector", ".pairs td.tie")
    assert "within noise" in str(pair.get_attribute("aria-label"))
    assert complaints(opened) == []


@pytest.mark.slow
def test_another_measure_is_drawn(opened: Any) -> None:
    from selenium.webdriver.support.ui import Select
    from selenium.webdriver.support.wait import WebDriverWait

    Select(opened.find_element("id", "measure")).select_by_value("bleu_full")
    chart = opened.find_element("id", "chart-size")
    WebDriverWait(opened, WAIT, 0.05).until(lambda _: chart.get_attribute("data-drawn") == "bleu_full")
    drawn = "return [...document.querySelectorAll('#chart-size .points > path')].map(p => p.__data__.datum)"
    found = {datum["variant"]: datum for datum in opened.execute_script(drawn)}
    assert set(found) == {row.variant for row in realistic_report().rows} - {"q4_0", "hqq-2"}
    assert found["awq-4"]["value"] == pytest.approx(76.3)
    # more is better: awq-4 costs more than gptq-4 and is better, bnb-nf4 is both worse and larger
    assert found["awq-4"]["onFront"]
    assert not found["bnb-nf4"]["onFront"]
    assert complaints(opened) == []


@pytest.mark.slow
def test_it_follows_the_systems_theme_and_the_readers_choice(browser: Any, file: str) -> None:
    def ground() -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light, dark = (
        "rgb({}, {}, {})".format(*(int(colour[at : at + 2], 16) for at in (1, 3, 5)))
        for colour in INK["ground"]
    )
    open_page(browser, file, scheme="dark")
    assert ground() == dark
    button = browser.find_element("id", "theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert ground() == light
    # the charts' colours come along: they are the page's own
    star = "return getComputedStyle(document.querySelector('.points > path[aria-label^=q8_0]')).fill"
    fill = browser.execute_script(star)
    button.click()
    assert ground() == dark
    assert browser.execute_script(star) != fill
    browser.execute_script("localStorage.clear()")


@pytest.mark.slow
def test_a_phone_needs_no_sideways_scrolling(browser: Any, file: str) -> None:
    open_page(browser, file, width=360, scheme="light")
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    browser.execute_script("document.getElementById('all-columns').click()")
    wide = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = browser.execute_script(wide)
    assert scroll <= client <= 360
    inside = "return document.querySelector('#variants .scroll').scrollWidth > 500"
    assert browser.execute_script(inside)  # the table scrolls in its own box
    chart = "return document.querySelector('#chart-bits svg').getBoundingClientRect().right"
    assert browser.execute_script(chart) <= 360
    assert complaints(browser) == []


def hostile_report() -> Report:
    """A report every text of which wants out."""
    rows = tuple(
        Row(
            variant=f"{HOSTILE}{number}" if number else "full",
            path=HOSTILE,
            method=("none", HOSTILE)[number > 0],
            solver=HOSTILE,
            format=HOSTILE,
            bits=4,
            bits_per_weight=4 + number,
            size_bytes=10**9,
            perplexity=Measure(value=8),
            loss=Measure(value=0.1 * number) if number else None,
            tokens_per_second={HOSTILE: 3.0},
            tasks={HOSTILE: Measure(value=0.5)},
            failures=(HOSTILE,) if number else (),
        )
        for number in range(3)
    )
    names = [row.variant for row in rows]
    return Report(
        qexport=HOSTILE,
        title=HOSTILE,
        verdict=HOSTILE,
        rows=rows,
        comparisons=(
            Comparison(
                first=names[1],
                second=names[2],
                measure=HOSTILE,
                difference=0.1,
                standard_error=0.01,
                more_than_noise=True,
            ),
        ),
        samples=(Sample(prompt=HOSTILE, reference=HOSTILE, answers=dict.fromkeys(names, HOSTILE)),),
        layers=Layers(names=(HOSTILE,), errors={names[1]: (0.1,)}),
        recipes={HOSTILE: {HOSTILE: HOSTILE}},
        recipe_lines=(HOSTILE,),
    )


@pytest.mark.slow
def test_hostile_texts_are_shown_and_do_nothing(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    text = page(hostile_report())
    assert "{{7*7}}" in text
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    open_page(browser, (tmp_path / "report.html").as_uri())
    browser.execute_script("document.querySelector('.points > path').focus()")
    seen = HOSTILE[:-2]  # without the line separator and the half surrogate, which nothing shows as they are
    assert seen in tip(browser)
    assert seen in browser.find_element("tag name", "h1").text
    state = "return [window.hit ?? null, document.images.length, document.querySelectorAll('script').length]"
    assert browser.execute_script(state) == [None, 0, 4]
    assert complaints(browser) == []
    # were the escaping to fail, the policy still would not run it
    put_in = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=1>')"
    browser.execute_script(put_in)
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert browser.execute_script("return window.hit ?? null") is None


class Outline(HTMLParser):
    """What the page names and points to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.outside: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("aria-labelledby", "for"):
                self.references += (value or "").split()
            elif name == "href" and (value or "").startswith("#"):
                self.references.append((value or "")[1:])
            elif name in ("href", "src") and not (value or "").startswith("data:"):
                self.outside.append(value or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


def test_the_page_is_whole_small_and_well_formed(html: str) -> None:
    assert len(html.encode()) < MOST_BYTES
    outline = Outline()
    outline.feed(html)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.references) <= set(outline.ids)
    assert outline.outside == []
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps)
    for words in (
        "<header>",
        "<main",
        "<footer>",
        "<nav aria-label",
        "<caption>",
        'class="skip"',
        'lang="en"',
    ):
        assert words in html


def test_the_same_report_gives_the_same_page(html: str) -> None:
    assert page(realistic_report()) == html


def test_a_report_of_one_row_is_a_page_too(html: str) -> None:
    report = realistic_report()
    text = page(Report(qexport="1", title="one", verdict="none", rows=report.rows[:1]))
    assert "What they answer" not in text
    assert "Where the error sits" not in text


def test_lower_bounds_and_full_precision_candidates_are_told_as_such(html: str) -> None:
    report = realistic_report()
    candidate = report.rows[1].model_copy(update={"method": "none", "kl_at_least": True})
    text = page(report.model_copy(update={"rows": (report.rows[0], candidate, *report.rows[2:])}))
    assert "≥\N{NO-BREAK SPACE}0.0009" in text
    assert "≥ 0.0009 nats a token" in text  # a point's
    assert "KL divergence to full, at least (nats a token)" in text
    assert "≥" not in html.partition("<script")[0]
    assert text.count('class="full"') == 1
    assert f"<option>{candidate.variant}</option>" in text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    drawn = {point["variant"]: point["full"] for point in data["measures"][0]["points"]}
    assert [name for name, full in drawn.items() if full] == ["full"]
    assert candidate.variant in drawn


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page_module._vega.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'qexport\[report\]'"):
        page(realistic_report())


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_enough(dark: bool) -> None:
    ink = {name: pair[dark] for name, pair in INK.items()}
    texts = [
        *itertools.product(("ink", "muted", "accent", "fail_text"), ("ground", "raised")),
        *((f"{name}_text", f"{name}_fill") for name in ("better", "worse", "fail")),
    ]
    assert all(contrast(ink[text], ink[ground]) >= 4.5 for text, ground in texts)
    assert contrast(ink["edge"], ink["ground"]) >= 3
    methods = styles([f"method {number}" for number in range(8)])
    assert all(contrast(style.colours[dark], ink["ground"]) >= 3 for style in methods.values())
    assert all(contrast(ground, text) >= 4.5 for ground, text in ramp(dark))


def test_contrast_is_the_guidelines_own() -> None:
    # WCAG's ends of the scale, and the grey that is known as the lightest to pass on white
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def test_past_eight_methods_no_two_look_alike() -> None:
    looks = styles(["none", *(f"method {number}" for number in range(20))]).values()
    assert len({(look.colours, look.path) for look in looks}) == 21
