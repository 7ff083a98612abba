"""What MkDocs does besides: pages from other folders, and formulas as MathML.

MathML is drawn by the browser itself: no script and no font is fetched.
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel

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
    """Add the pages of other folders, and the files that any page shows or links to."""
    linked = set()
    for page in [*OTHERS, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        for link in _LINK.findall((ROOT / page).read_text()):
            path = Path(os.path.normpath(ROOT / page / ".." / link))
            if path.suffix == ".md" or path.name == "index.html":  # That of a README is there.
                continue
            if path.is_file() and ROOT / "docs" not in path.parents:
                linked.add(str(path.relative_to(ROOT)))
    for path in [*OTHERS, *sorted(linked)]:
        kept = InclusionLevel.INCLUDED  # Python files too.
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=kept))


def on_page_markdown(markdown, page, config, files):
    """Make links work in the site that work in the repository, where docs/ is a folder."""
    if page.file.src_uri in OTHERS:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")


def on_page_content(content, page, config, files):
    def formula(match):
        display = "block" if match[1] == "div" else "inline"
        made = convert(html.unescape(match[2]), display=display)
        # Bars around something stand close to it.
        return made.replace("<mo>&#x0007C;</mo>", '<mo lspace="0" rspace="0">&#x0007C;</mo>')

    # What is returned has no name in our docstrings, which mkdocstrings puts before a dash.
    return _FORMULA.sub(formula, _NAMELESS.sub(r"\1", content))
