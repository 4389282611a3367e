"""The page of a comparison in a real browser: it opens, its plots are drawn, its table sorts,
nothing is fetched.
"""

import pytest
from browser import Browser, installed
from made_runs import made_cell

from fedspine.report import drawing
from fedspine.ui.compare.comparison import find
from fedspine.ui.compare.write import write
from fedspine.ui.progress import Silent

pytestmark = pytest.mark.skipif(
    installed() is None, reason="no Chromium is installed; on Debian: apt-get install chromium"
)
METHODS = {"ours": 0.7, "theirs, with a longer name than most": 0.6, "late": 0.4, "Zuletzt": 0.5}


@pytest.fixture(scope="module")
def address(tmp_path_factory, real_drawing):
    """The page of four methods over two seeds in two settings; one of them never reaches the
    target.
    """
    root = tmp_path_factory.mktemp("page")
    for alpha in (0.1, 1.0):
        for place, (label, best) in enumerate(METHODS.items()):
            for seed in (0, 1):
                made = {"method": "fedlora", "seed": seed, "seconds": 10.0 + 5 * place}
                made |= {
                    "curve": (0.3, best - 0.05, best + seed / 100),
                    "settings": (f"fleet.alpha={alpha}",),
                }
                made_cell(root, f"{alpha}-{place}-{seed}", label, {"fleet.alpha": alpha}, **made)
    found = find([root], target="0.45", latency=False, progress=Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_drawn", real_drawing)
        return write(found, root / "out").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


def rows(browser):
    """The first column of the first table, from top to bottom."""
    return browser.run(
        '[...document.querySelector("table.sort").tBodies[0].rows]'
        ".map(row => row.cells[0].innerText)"
    )


def test_it_opens_and_fetches_nothing(browser, address):
    before = len(browser.requests)
    browser.open(address)
    assert "Comparison" in browser.run("document.title")
    # 6 pairs in each of two settings
    assert browser.run('document.querySelectorAll("ul.verdicts li").length') == 12
    browser.run("new Promise(done => setTimeout(done, 500))")  # what would come late comes now
    assert browser.requests[before:] == [address]
    assert browser.run('performance.getEntriesByType("resource").length') == 0
    assert browser.complaints == []


def test_a_request_would_be_seen(browser, address):
    """The check above can fail: a page that fetches is caught."""
    browser.open(address)
    before = len(browser.requests)
    browser.run(
        "new Promise(done => { const i = new Image(); i.onerror = done; "
        'i.src = "http://127.0.0.1:9/x.png" })'
    )
    assert browser.requests[before:] == ["http://127.0.0.1:9/x.png"]
    browser.complaints.clear()


def test_the_plots_are_drawn(browser, address):
    browser.open(address)
    drawn = browser.run(
        '[...document.querySelectorAll("figure svg")].map(svg => ({'
        "width: svg.getBoundingClientRect().width,"
        ' height: svg.getBoundingClientRect().height, paths: svg.querySelectorAll("path").length,'
        ' words: svg.textContent, high: Math.max(...[...svg.querySelectorAll("path")].map('
        "path => path.getBoundingClientRect().height))}))"
    )
    assert len(drawn) == 8  # three costs and the differences, in two settings
    for each in drawn:
        assert each["width"] > 400 and each["height"] > 100
        assert each["paths"] > 10
        assert each["high"] > 60  # of what is drawn, something is as tall as axes are
    assert all(label.split(",")[0] in drawn[0]["words"] for label in METHODS)


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_is_wider_than_the_window(browser, address, width):
    browser.open(address, width)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_table_sorts(browser, address):
    browser.open(address)
    ours, theirs, late, last = METHODS
    assert rows(browser) == [ours, theirs, last, late]  # by final accuracy, the best first
    # time to target, upwards: rounds last 10, 15 and 25 s
    browser.click("table.sort th:nth-child(5) button")
    assert rows(browser) == [ours, theirs, last, late]
    assert (
        browser.run('document.querySelector("table.sort th:nth-child(5)").ariaSort') == "ascending"
    )
    browser.click("table.sort th:nth-child(5) button")
    assert rows(browser) == [last, theirs, ours, late]  # what never reaches it stays last
    browser.click("table.sort th:nth-child(2) button")
    assert rows(browser) == [late, last, theirs, ours]
    browser.click("table.sort th:nth-child(1) button")
    assert rows(browser) == [late, ours, theirs, last]
    assert (
        browser.run(
            'document.querySelectorAll("table.sort")[0].querySelectorAll("th[aria-sort]").length'
        )
        == 1
    )
    other = (
        '[...document.querySelectorAll("table.sort")[2].tBodies[0].rows]'
        ".map(row => row.cells[0].innerText)"
    )
    assert browser.run(other)[0] == ours  # a table of its own is not touched
    assert browser.complaints == []
