"""What MkDocs does besides: pages from other folders, and formulas as MathML.

MathML is drawn by the browser itself: no script and no font is fetched.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SAMPLES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("samples/*/README.md"))
OTHERS = [*SAMPLES, "CONTRIBUTING.md", "CHANGELOG.md"]
_LINK = re.compile(r"\]\(([^)\s#:]+)")
_NAMELESS = re.compile(r'(<li class="doc-section-item field-body">\s*)\u2013')
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config):
    """Every sample has its page in the navigation."""
    section = next(entry for entry in config.nav if "Samples" in entry)
    section["Samples"] = SAMPLES


def on_files(files, config):
    """Add the pages of other folders, and what of theirs they show or link to."""
    for page in OTHERS:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
        for link in _LINK.findall((ROOT / page).read_text()):
            path = (ROOT / page).parent / link
            beside = Path(page).parent / link
            if path.suffix != ".md" and path.is_file() and ".." not in beside.parts:
                files.append(File.generated(config, str(beside), abs_src_path=str(path)))


def on_page_markdown(markdown, page, config, files):
    """Make links work in the site that work in the repository, where docs/ is a folder."""
    if page.file.src_uri in OTHERS:
        return markdown.replace("](docs/", "](").replace("/docs/", "/")
    return re.sub(r"\]\(\.\./(samples/|\w+\.md)", r"](\1", markdown)


def on_page_content(content, page, config, files):
    def formula(match):
        display = "block" if match[1] == "div" else "inline"
        made = convert(html.unescape(match[2]), display=display)
        # Bars around something stand close to it.
        return made.replace("<mo>&#x0007C;</mo>", '<mo lspace="0" rspace="0">&#x0007C;</mo>')

    # What is returned has no name in our docstrings, which mkdocstrings puts before a dash.
    return _FORMULA.sub(formula, _NAMELESS.sub(r"\1", content))
