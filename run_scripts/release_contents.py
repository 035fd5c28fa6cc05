"""A wheel and a source archive enter; one line for each leaves, or an error that names a file that may not be in it.

python run_scripts/release_contents.py dist/*.whl dist/*.tar.gz
"""

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ALLOWED = {
    ".whl": re.compile(r"mpo_jax/.*|mpo_jax-[\w.]+\.dist-info/.*"),
    ".gz": re.compile(
        r"(mpo_jax|configs|docs|run_scripts|mpo_jax\.egg-info)/.*"
        r"|[\w.-]+\.(md|toml|txt|py|in|cff|cfg|yml)|LICENSE|PKG-INFO"
    ),
}
"""Suffix of an archive -> names that may lie in it, beneath its first folder where it is a source archive."""
NEEDED = {
    ".whl": ("mpo_jax/mpo.py", "mpo_jax/configs/quickstart.py", "mpo_jax/assets/tiny_stories/model.safetensors",
             "mpo_jax/evaluation/templates/model_card.md"),
    ".gz": ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt",
            "docs/settings.md", "run_scripts/install.sh"),
}  # fmt: skip
FOREIGN = re.compile(r"(^|/)(tests?|\.git|runs|__pycache__)/|\.py[co]$")
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|gh[pousr]_[A-Za-z0-9]{36}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----|/home/[a-z]\w*/|/Users/\w+/"
)
"""Keys of the usual services, and folders of somebody's machine."""
LARGEST = 8 * 2**20  # bytes: the embedded model and the stories with it are below that


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents, without the folder that a source archive begins with."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            yield from ((name, file.read(name)) for name in file.namelist() if not name.endswith("/"))
        return
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            if member.isfile() and (opened := file.extractfile(member)):
                yield member.name.partition("/")[2], opened.read()


def wrong(archive: Path) -> Iterator[str]:
    """What may not be so, one sentence each."""
    found: set[str] = set()
    for name, content in members(archive):
        found.add(name)
        if not ALLOWED[archive.suffix].fullmatch(name) or FOREIGN.search(name):
            yield f"{name}: does not belong there"
        if secret := SECRET.search(content):
            shown = secret[0][:12].decode(errors="replace")
            yield f"{name}: holds what looks like a key or somebody's folder: {shown}..."
        if len(content) > LARGEST:
            yield f"{name}: {len(content):,} bytes; expected at most {LARGEST:,}"
    yield from (f"{name}: is missing" for name in NEEDED[archive.suffix] if name not in found)


def main(archives: list[Path]) -> int:
    bad = [f"error: {archive.name}: {what}" for archive in archives for what in wrong(archive)]
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    for archive in archives if not bad else ():
        sizes = [len(content) for _, content in members(archive)]
        print(f"{archive.name}: {len(sizes)} files, {sum(sizes):,} bytes, the largest {max(sizes):,}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
