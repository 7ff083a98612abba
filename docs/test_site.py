"""Tests of the built site: `nox -s docs` runs them after `mkdocs build --strict`.

They read the HTML in build/site, and need only beautifulsoup4, click and pytest.
"""

import ast
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

import ctonnx
from ctonnx.cli import main as cli

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
PAGES = {path: BeautifulSoup(path.read_text(), "html.parser") for path in SITE.rglob("*.html")}

# Page in the repository -> page in the site.
SOURCES = {
    str(path.relative_to(ROOT)): built.format(path.stem, path.parent.name)
    for pattern, built in (
        ("docs/*.md", "{}.html"),
        ("CONTRIBUTING.md", "{}.html"),
        ("CHANGELOG.md", "{}.html"),
        ("samples/*/README.md", "samples/{1}/index.html"),
    )
    for path in ROOT.glob(pattern)
}

# Tag -> attribute with an address that the browser fetches by itself, unlike a link.
FETCHED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "input": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SITE)))


def text_of(name):
    return PAGES[SITE / name].find("article").get_text(" ")


def test_every_page_is_there():
    assert {str(page.relative_to(SITE)) for page in PAGES} == {*SOURCES.values(), "404.html"}


@each_page
def test_links_lead_somewhere(page):
    if page.name == "404.html":
        pytest.skip("its links are absolute, because it is shown at any address")
    for tag in PAGES[page].find_all(["a", "img"]):
        link = urlsplit(tag.get("href") or tag.get("src") or "")
        if link.scheme:
            continue
        target = (page.parent / unquote(link.path)).resolve() if link.path else page
        target = target / "index.html" if target.is_dir() else target
        assert target.is_file(), tag
        if link.fragment:
            assert PAGES[target].find(id=unquote(link.fragment)), tag


@each_page
def test_pages_fetch_nothing_from_other_hosts(page):
    for tag in PAGES[page].find_all(list(FETCHED)):
        for address in (tag.get(FETCHED[tag.name]), tag.get("srcset")):
            assert not urlsplit(address or "").netloc, tag
    styles = [style.get_text() for style in PAGES[page].find_all("style")]
    for text in [*styles, *(tag["style"] for tag in PAGES[page].find_all(style=True))]:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", text)


def test_style_sheets_fetch_nothing_from_other_hosts():
    sheets = list(SITE.rglob("*.css"))
    assert sheets
    for path in sheets:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text()), path


def test_every_public_name_is_documented():
    text = text_of("python.html")
    public = {name: f"ctonnx.{name}" for name in ctonnx.__all__ if not name[0].isupper()}
    public |= {name: name for name in ctonnx.__all__ if name[0].isupper()}
    # Parsed, not imported, because the docs session has no PyTorch.
    tree = ast.parse((ROOT / "ctonnx" / "torch" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    public |= {f"torch.{name}": f"ctonnx.torch.{name}" for name in names}
    public["graphsurgeon"] = "Graph.ctu"
    for name in public.values():
        assert re.search(rf"(?<![\w.]){re.escape(name)}\b", text), name


def test_every_command_and_option_is_documented():
    page = PAGES[SITE / "commands.html"]
    for name, command in cli.cli.commands.items():
        heading = page.find(id=f"ctonnx-{name}")
        assert heading, name
        section = "".join(
            sibling.get_text()
            for sibling in heading.find_next_siblings()
            if sibling.find_previous("h3") is heading
        )
        for param in command.params:
            for option in getattr(param, "opts", ()):
                if option.startswith("-"):
                    assert re.search(rf"(?<![\w-]){option}\b", section), (name, option)


def test_every_option_has_a_help():
    for name, command in cli.cli.commands.items():
        for param in command.params:
            assert param.param_type_name == "argument" or param.help, (name, param.name)


@each_page
def test_formulas_are_rendered(page):
    assert not PAGES[page].find(class_="arithmatex")


@pytest.mark.parametrize("source", SOURCES)
def test_every_block_is_fenced(source):
    """tests/test_docs.py, which runs the blocks of a page, would miss indented ones."""
    if source in ("docs/commands.md", "docs/python.md"):
        pytest.skip("blocks of this page are generated")
    fences = re.findall(r"^ *```+\w+$", (ROOT / source).read_text(), re.MULTILINE)
    assert len(PAGES[SITE / SOURCES[source]].select("article pre")) == len(fences)


def test_the_method_has_its_formulas_and_picture():
    page = PAGES[SITE / "method.html"]
    assert len(page.find_all("math")) == 5
    assert page.find("img", src="ctu.svg")
