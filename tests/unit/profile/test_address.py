from __future__ import annotations

import pytest

from nestling.profile import Address, DeviceError, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ort:cpu", Address("cpu")),
        ("ort:cpu?threads=2", Address("cpu", threads=2)),
        ("ort:cpu?memory_mb=4096&threads=3", Address("cpu", threads=3, memory_mb=4096)),
        ("ort:cuda", Address("cuda")),
    ],
)
def test_an_address_is_read_whole(text: str, address: Address) -> None:
    assert parse_address(text) == address


def test_two_spellings_of_one_device_have_one_name() -> None:
    assert parse_address("ort:cpu").name == parse_address("ort:cpu?memory_mb=9&threads=1").name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ort:cpuu", "unknown runtime 'ort:cpuu'; did you mean 'ort:cpu'"),
        ("", "unknown runtime ''; known: ort:cpu, ort:cuda"),
        ("ssh://pi@board/ort:cpu", "unknown runtime"),
        ("ort:cpu?thread=2", "unknown option 'thread'; did you mean 'threads'"),
        ("ort:cpu?", "unknown option ''"),
        ("ort:cpu?threads=0", "threads='0' must be a whole number above zero"),
        ("ort:cpu?threads=two", "threads='two' must be"),
        ("ort:cpu?threads=-1", "threads='-1' must be"),
        ("ort:cpu?threads=²", "must be"),
        ("ort:cpu?threads=1&threads=2", "'threads' is there twice"),
    ],
)
def test_what_is_wrong_with_an_address_is_named(text: str, said: str) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_address(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)
