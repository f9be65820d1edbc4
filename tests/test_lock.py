"""What is installed: the pins, and the hashes that they are held to."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    """Versions by package."""
    found: list[tuple[str, str]] = PIN.findall((ROOT / name).read_text())
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_every_pin_but_torch_has_a_hash() -> None:
    locked = pins("requirements.lock")
    assert locked.pop("torch") == "2.13.0", "a newer one brings gigabytes of CUDA"
    assert pins("requirements.hashes") == locked


def test_no_package_stands_without_hashes() -> None:
    entries = (ROOT / "requirements.hashes").read_text().replace("\\\n", "").splitlines()
    assert len(entries) > 100
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_what_tests_alone_need_has_hashes_too_and_is_no_pin_of_the_servers() -> None:
    assert pins("requirements.interpreter").keys() == {"triton"}
    assert "--hash=sha256:" in (ROOT / "requirements.interpreter").read_text()
    assert "triton" not in pins("requirements.lock"), "a torch for GPUs needs the very Triton it names"
