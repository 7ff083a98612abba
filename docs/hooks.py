"""Hooks of MkDocs for the site: pages from other folders, and formulas as MathML.

The browser itself draws MathML, so a page fetches no script and no font.
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
    """Add the page of every sample to the navigation."""
    section = next(entry for entry in config.nav if "Samples" in entry)
    section["Samples"] = SAMPLES


def on_files(files, config):
    """Add the pages from other folders, and the files that a page shows or links to."""
    linked = set()
    for page in [*OTHERS, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        for link in _LINK.findall((ROOT / page).read_text()):
            path = Path(os.path.normpath(ROOT / page / ".." / link))
            # Other pages are added already, and MkDocs writes a README as index.html.
            if path.suffix == ".md" or path.name == "index.html":
                continue
            if path.is_file() and ROOT / "docs" not in path.parents:
                linked.add(str(path.relative_to(ROOT)))
    for path in [*OTHERS, *sorted(linked)]:
        # Explicitly, because exclude_docs leaves out Python files.
        included = InclusionLevel.INCLUDED
        files.append(
            File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=included)
        )


def on_page_markdown(markdown, page, config, files):
    """Adapt links to the site, whose root holds the pages of the repository's docs/."""
    if page.file.src_uri in OTHERS:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")


def on_page_content(content, page, config, files):
    def formula(match):
        display = "block" if match[1] == "div" else "inline"
        mathml = convert(html.unescape(match[2]), display=display)
        # No space between the bars of an absolute value and its operand.
        return mathml.replace("<mo>&#x0007C;</mo>", '<mo lspace="0" rspace="0">&#x0007C;</mo>')

    # mkdocstrings writes "name - description", but our docstrings do not name the returned value.
    return _FORMULA.sub(formula, _NAMELESS.sub(r"\1", content))
