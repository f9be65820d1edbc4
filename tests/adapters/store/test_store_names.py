import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_serve.adapters.names import check_name, file_stem, is_name, name_of_stem, parse_ref, shown
from peft_serve.errors import InvalidParameter, UnknownAdapter

HEX = "0123456789abcdef" * 4

HOSTILE = [
    "", ".", "..", "../x", "..\\x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "a\n", "\na", " a", "a ", "a b",
    "-a", "_a", ".a", "~a", "a" * 65, "é", "ａ", "a\u202eb", "аdmin", "a%2fb", "a:b", "a;b", "a|b", "a'b", 'a"b',
    "$HOME", "a*", "a?", "<a>", "a\r\nx: y", "\ud800", "%00", "a=b", "a+b", "C:", "😀", "a\x7f",
]  # fmt: skip

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_everywhere(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(InvalidParameter) as refusal:
        check_name(name, base_name="demo")
    assert refusal.value.message.isascii()
    assert refusal.value.message.isprintable()
    with pytest.raises(UnknownAdapter) as missing:
        parse_ref(name)
    assert missing.value.message.isprintable()


def test_hundreds_of_mutated_names_are_refused_or_stay_in_one_folder() -> None:
    rng = random.Random(7)
    alphabet = string.printable + "é\0\u2028"
    for _ in range(400):
        name = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 12)))
        if is_name(name):
            assert "/" not in file_stem(name)
            assert not file_stem(name).startswith(".")
        else:
            with pytest.raises(UnknownAdapter):
                parse_ref(name)


@pytest.mark.parametrize("name", ["base", "dummy", "tgi", "Base", "TGI", "demo-llama", "Demo-Llama"])
def test_a_name_that_means_the_base_is_reserved(name: str) -> None:
    with pytest.raises(InvalidParameter, match="reserved"):
        check_name(name, base_name="demo-llama")


def test_a_good_name_comes_back() -> None:
    assert check_name("Tweets_2.v-1", base_name="x") == "Tweets_2.v-1"


@given(NAMES)
def test_a_name_is_spelled_in_small_letters_and_read_back(name: str) -> None:
    stem = file_stem(name)
    assert stem == stem.lower()
    assert len(stem) <= 128
    assert name_of_stem(stem) == name


@given(NAMES, NAMES)
def test_two_names_never_share_a_file(one: str, other: str) -> None:
    assert (file_stem(one).lower() == file_stem(other).lower()) == (one == other)


@given(st.text())
def test_what_is_no_stem_has_no_name(text: str) -> None:
    name = name_of_stem(text)
    assert name is None or file_stem(name) == text


def test_references() -> None:
    plain, numbered, pinned = parse_ref("a"), parse_ref("a@12"), parse_ref(f"a@sha256:{HEX}")
    assert (plain.name, plain.number, plain.id) == ("a", None, None)
    assert (numbered.number, numbered.id) == (12, None)
    assert (pinned.number, pinned.id) == (None, f"sha256:{HEX}")


@pytest.mark.parametrize(
    "ref",
    ["a@", "@1", "a@-1", "a@01", "a@1@2", "a@x", "a@１", "a@9999999999", "a@sha256:", f"a@sha256:{HEX[:-1]}",
     f"a@sha256:{HEX.upper()}", f"a@sha256:{HEX}\n", "a@sha512:00", "a@../x"],
)  # fmt: skip
def test_a_pin_that_is_none_is_unknown(ref: str) -> None:
    with pytest.raises(UnknownAdapter, match="GET /adapters"):
        parse_ref(ref)


def test_a_long_name_is_cut_in_messages() -> None:
    assert len(shown("x" * 10_000)) < 100
