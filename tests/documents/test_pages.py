"""Every command and snippet of the tutorials and the how-to pages runs, page by page, against one server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.serving import serving
from tests.conftest import REPOSITORY
from tests.documents.blocks import LANGUAGES, blocks_of
from tests.documents.reader import Reader

DOCS = REPOSITORY / "docs"
SOON = ("--watch-interval-s", "0.2", "--watch-settle-s", "1")  # looks at its folder more often than a server by default
PAGES = sorted([DOCS / "tutorial.md", *DOCS.glob("tutorials/*.md"), *DOCS.glob("how-to/*.md")])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a server of the demo base, and the folder that it watches."""
    folder = tmp_path_factory.mktemp("pages")
    watched = folder / "incoming"
    watched.mkdir()
    with serving("demo-llama", folder, "--watch", str(watched), *SOON) as url:
        yield url, watched


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="pages are typed in bash, with curl")
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_what_the_page_says_can_be_done(page: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "server").symlink_to(REPOSITORY / "server")  # the tutorial trains on the base of the checkout
    url, watched = server
    reader = Reader(folder=tmp_path, url=url, watched=watched)
    for block in blocks_of(page):
        if block.language in LANGUAGES and not block.reason:
            reader.does(block)


def test_every_block_of_a_page_is_run_or_says_why_not() -> None:
    assert len(PAGES) >= 10
    for block in (each for page in PAGES for each in blocks_of(page)):
        known = block.language in LANGUAGES or block.language in ("text", "json")
        assert known, f"{block}: a block is bash, python or yaml, or an answer (text, json)"
        assert not block.mark or block.reason or block.refusal, f"{block}: <!-- {block.mark} --> means nothing"


def slugs_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each).lower() for each in headings)
    return {re.sub(r"[^\w\- ]", "", each).replace(" ", "-") for each in plain}


def test_the_links_of_the_pages_lead_somewhere() -> None:
    for page in DOCS.glob("**/*.md"):
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
        for target, _, anchor in (each.partition("#") for each in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.relative_to(DOCS)}: {target}"
            if anchor and to.suffix == ".md":
                assert anchor in slugs_of(to), f"{page.relative_to(DOCS)}: {target}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    for page in DOCS.glob("**/*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert f"({name})" in index or name == "README.md" or name.startswith("decisions/0"), name
