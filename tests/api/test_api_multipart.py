"""Forms as nobody's client sends them: refused by name, or read as they stand; never in parts."""

from __future__ import annotations

import httpx
import pytest

from tests.api.api_fakes import checkpoint

BOUNDARY = "xYz"
FILES = {**checkpoint("x"), "peft_serve.json": b'{"template": "Label: {text}"}'}


def part(name: str, content: bytes, *, is_file: bool = True) -> bytes:
    filename = f'; filename="{name}"' if is_file else ""
    return (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + content + b"\r\n"
    )


WHOLE = b"".join(part(name, content) for name, content in FILES.items())
END = f"--{BOUNDARY}--\r\n".encode()


async def send(client: httpx.AsyncClient, body: bytes, options: str = f"boundary={BOUNDARY}") -> httpx.Response:
    headers = {"content-type": f"multipart/form-data; {options}".encode("latin-1")}
    return await client.put("/adapters/odd", content=body, headers=headers)  # type: ignore[arg-type]


@pytest.mark.parametrize("epilogue", [b"", b"what stands behind the end is no part\r\n"])
async def test_a_form_is_read_to_its_last_boundary(client: httpx.AsyncClient, epilogue: bytes) -> None:
    answer = await send(client, WHOLE + END + epilogue)
    assert answer.status_code == 201, answer.text
    assert answer.json()["num_tensors"] == 4


@pytest.mark.parametrize("num_bytes_less", [len(END), len(END) + 2, len(END) + 9, 3])
async def test_a_form_that_is_cut_off_is_no_smaller_checkpoint(client: httpx.AsyncClient, num_bytes_less: int) -> None:
    """Without its last part it would be another, whole one."""
    body = WHOLE + END
    answer = await send(client, body[: len(body) - num_bytes_less])
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_upload")
    assert "before its last boundary" in answer.json()["detail"]
    assert (await client.get("/adapters/odd")).status_code == 404


@pytest.mark.parametrize("charset", ["punycode", "utf-16", "zip", "no-such", "\u00e9", ""])
async def test_forms_are_utf_8(client: httpx.AsyncClient, charset: str) -> None:
    """A codec of the sender's choice would run over each field; that of domain names takes the square of its length."""
    body = part("note", b"a" * 1000 + b"-" + b"a" * 1000, is_file=False) + WHOLE + END
    answer = await send(client, body, f"boundary={BOUNDARY}; charset={charset}")
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_upload")
    assert "forms are read as utf-8" in answer.json()["detail"]
    assert (await send(client, body, f"boundary={BOUNDARY}; charset=UTF-8")).status_code == 201


async def test_a_name_that_is_said_twice_is_refused(client: httpx.AsyncClient) -> None:
    names = part("name", b"odd", is_file=False) + part("name", b"two", is_file=False)
    answer = await client.post(
        "/adapters", content=names + WHOLE + END, headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    )
    assert answer.status_code == 400
    assert "name twice" in answer.json()["detail"]
