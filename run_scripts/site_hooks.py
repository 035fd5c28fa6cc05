"""Pages of the documentation enter, as they read on the forge; what MkDocs makes a site of leaves.

README, CONTRIBUTING and CHANGELOG, which lie outside `docs`, become pages beside the others, and links to and from them
are bent accordingly. Formulas, which the forge takes as `$`...`$` and as blocks of ```math, become MathML, which a
browser draws without a script. MkDocs calls the functions by their names.
"""

import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CITATION.cff": "CITATION.cff",
}
"""File at the root -> page, or file, of the site."""
_LINK = re.compile(r"\]\((?!\w+://)([^)#\s]+)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^```math\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"\$`([^`]+)`\$")


def on_files(files, config):
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    text = _BLOCK.sub(lambda found: _mathml(found[1], "block") + "\n", markdown)
    # A line that begins with <math> would be a block of HTML to Markdown, one that begins with <span> is not.
    text = _INLINE.sub(lambda found: f"<span>{_mathml(found[1], 'inline')}</span>", text)
    parts = _CODE.split(text)  # code stands at the odd places, and is left alone
    parts[::2] = [_LINK.sub(lambda found: f"]({_place(found[1], page.file.src_uri)}", part) for part in parts[::2]]
    return "".join(parts)


def _mathml(formula: str, display: str) -> str:
    return latex2mathml.converter.convert(formula.strip().replace("\n", " "), display=display)


def _place(target: str, page: str) -> str:
    """Where a link leads from a page of the site; `target` is as seen from the file that became the page."""
    folder = ROOT if page in OUTSIDE.values() else ROOT / "docs"
    led = (folder / target).resolve()
    if led.parent == ROOT and led.name in OUTSIDE:
        return OUTSIDE[led.name]
    return str(led.relative_to(ROOT / "docs")) if led.is_relative_to(ROOT / "docs") else target
