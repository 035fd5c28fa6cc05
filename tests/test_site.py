"""The pages of the documentation enter; the site that is made of them is whole, and asks no network for anything."""

import re
import subprocess
import sys

import pytest

from tests.tools.processes import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # a link or an anchor that leads nowhere is an error
    return folder


def test_every_page_is_there(site):
    names = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in PAGES]
    for name in [*names, "index.html", "CONTRIBUTING.html", "CHANGELOG.html"]:
        assert (site / name).exists(), name


def test_links_between_the_root_and_docs_lead_to_pages(site):
    home = (site / "index.html").read_text()
    assert 'href="ppo.html"' in home and "docs/ppo.md" not in re.sub(r"<code>.*?</code>|<a[^>]*>[^<]*</a>", "", home)
    assert 'href="CONTRIBUTING.html"' in (site / "architecture.html").read_text()


def test_formulas_are_drawn_by_the_browser_itself(site):
    page = (site / "method.html").read_text()
    assert page.count('display="block"') >= 8 and page.count('display="inline"') > 20
    assert "$`" not in page and "math\n" not in page


def test_nothing_is_loaded_from_a_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert not loaded, f"{page.name}: {loaded}"
