"""The documentation is a site: it builds without a warning, needs no other host, and leaves nothing out."""

import html.parser
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import roialign

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
LOADED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """What a page loads, where it links, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get(LOADED.get(tag, "")) and attributes.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(attributes[LOADED[tag]])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        self.anchors.add(attributes.get("id"))


def test_nothing_is_loaded_from_another_host(site):
    for path in site.glob("**/*.html"):
        text = path.read_text()
        loads = Page(path).loads
        assert len(loads) > 3
        for address in loads:
            target = urlsplit(address)
            assert not target.scheme, f"{path.name} loads {address}"
            assert not target.netloc, f"{path.name} loads {address}"
            folder = site if target.path.startswith("/") else path.parent  # 404.html
            assert (folder / unquote(target.path).lstrip("/")).is_file(), f"{path.name} lacks {address}"
        assert not re.search(r"(url\(|@import|import\()\s*[\"']?(https?:)?//", text)
        assert "mermaid" not in text  # for which the theme would ask a CDN
    for path in site.glob("**/*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text())


def test_links_lead_somewhere(site):
    pages = {path: Page(path) for path in site.glob("**/index.html")}
    for path, page in pages.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path} links to {link}"
            if target.fragment and file in pages:
                assert unquote(target.fragment) in pages[file].anchors, f"{path} links to {link}"


def test_every_page_is_in_the_navigation(site):
    links = Page(site / "index.html").links
    for page in (ROOT / "docs").glob("**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or f"{name}/" in links, f"{page.name} is missing in nav of mkdocs.yml"


def test_the_reference_is_complete(site):
    path = site / "api" / "index.html"
    anchors, text = Page(path).anchors, path.read_text()
    for name in roialign.__all__:
        assert f"roialign.{name}" in anchors
    for name in (
        "roialign.MultiScaleRoIAlign.forward",
        "roialign.plot.draw_levels",
        "roialign.testing.pyramid",
    ):
        assert name in anchors
    assert text.count("Raises:") >= 6
    assert "more boxes tensors than images" in re.sub(r"\s+", " ", text)


def test_code_is_highlighted(site):
    assert '<span class="kn">from</span>' in (site / "start" / "index.html").read_text()


def test_pictures_are_those_of_the_script(tmp_path, monkeypatch):
    for package in ("matplotlib", "skimage"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "pictures.py"), run_name="__main__")
    drawn, kept = ({path.name: path for path in folder.glob("*")} for folder in (tmp_path, PICTURES))
    assert drawn.keys() == kept.keys()
    for path in kept.values():
        assert path.stat().st_size < 200_000
        assert any(f"pictures/{path.name}" in page.read_text() for page in (ROOT / "docs").glob("*.md"))
