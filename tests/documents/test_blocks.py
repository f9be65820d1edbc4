"""How the blocks of a page are read, and that a reader notices what does not work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.documents.blocks import Block, blocks_of
from tests.documents.reader import Reader

PAGE = """# A page

```bash
echo one
# => one
```

<!-- not run: it never ends -->
```bash
sleep inf
```

- in a list:

  <!-- fails: no such -->
  ```bash
  cat nothing
  ```

```python
# train.py
print(1)
```

```text
shown only
```
"""


@pytest.fixture
def blocks(tmp_path: Path) -> list[Block]:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    return list(blocks_of(page))


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(folder=tmp_path, url="http://127.0.0.1:9", watched=tmp_path / "watched")


def block(text: str, *, language: str = "bash", mark: str = "") -> Block:
    return Block(page="page.md", line=1, language=language, text=text, mark=mark)


def test_a_page_is_read_into_its_blocks(blocks: list[Block]) -> None:
    assert [(each.language, str(each)) for each in blocks] == [
        ("bash", "page.md:3"), ("bash", "page.md:9"), ("bash", "page.md:16"), ("python", "page.md:20"),
        ("text", "page.md:25"),
    ]  # fmt: skip
    shown, endless, refused, file, _ = blocks
    assert shown.printed == ["one"]
    assert (endless.reason, endless.refusal) == ("it never ends", "")
    assert (refused.reason, refused.refusal, refused.text) == ("", "no such", "cat nothing\n")
    assert (file.file, shown.file) == ("train.py", "")


def test_addresses_and_folders_become_those_of_the_test(reader: Reader) -> None:
    told = reader.told("curl 'localhost:8000/info' http://127.0.0.1:8000/v1; ls /srv/incoming/a")
    assert told == f"curl 'http://127.0.0.1:9/info' http://127.0.0.1:9/v1; ls {reader.watched}/a"


def test_what_is_said_to_be_printed_has_to_be(reader: Reader) -> None:
    reader.does(block("echo one\n# => one\n"))
    with pytest.raises(AssertionError, match="'two' is not in"):
        reader.does(block("echo one\n# => two\n"))


@pytest.mark.parametrize("text", ["false\n", "false | true\n", "false\ntrue\n"])
def test_a_command_that_fails_is_noticed(reader: Reader, text: str) -> None:
    with pytest.raises(AssertionError, match="ended with 1"):
        reader.does(block(text))


@pytest.mark.skipif(not shutil.which("curl"), reason="requests of pages are made with curl")
def test_a_request_without_an_answer_is_noticed(reader: Reader) -> None:
    with pytest.raises(AssertionError, match="ended with 7"):
        reader.does(block("curl localhost:8000/info\n"))


def test_what_should_fail_and_does_not_is_noticed(reader: Reader) -> None:
    reader.does(block("cat nothing\n", mark="fails: No such file"))
    with pytest.raises(AssertionError, match="ended with 0"):
        reader.does(block("true\n", mark="fails: anything"))


def test_a_file_is_written_and_the_steps_of_a_workflow_are_run(reader: Reader) -> None:
    reader.does(block("# hello.sh NAME: greets\necho hello $1\n"))
    reader.does(block("bash hello.sh you\n# => hello you\n"))
    steps = "jobs:\n  greet:\n    steps:\n      - uses: a/b\n      - run: bash hello.sh ci\n"
    workflow = f"# ci/greet.yaml\n{steps}# => hello ci\n"
    reader.does(block(workflow, language="yaml"))
    assert (reader.folder / "ci" / "greet.yaml").read_text() == workflow


def test_a_snippet_of_python_is_run(reader: Reader) -> None:
    reader.does(block("print(6 * 7)\n# => 42\n", language="python"))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        reader.does(block("1 / 0\n", language="python"))
