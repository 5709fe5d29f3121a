from __future__ import annotations

import pytest

from nestling.profile import Address, DeviceError, parse_address
from nestling.profile.address import AdbPlace, PoolAddress, SshPlace, parse_addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ort:cpu", Address("cpu")),
        ("ort:cpu?threads=2", Address("cpu", threads=2)),
        ("ort:cpu?memory=4G&threads=3", Address("cpu", threads=3, memory_mb=4096)),
        ("ort:cpu?memory=900M", Address("cpu", memory_mb=900)),
        ("ort:cuda", Address("cuda")),
        ("ssh://board/ort:cpu", Address("cpu", place=SshPlace("board"))),
        (
            "ssh://pi@board.lan:2222/ort:cpu?python=/opt/py%2C3/bin/python&threads=2",
            Address("cpu", threads=2, place=SshPlace("board.lan", "pi", 2222, "/opt/py,3/bin/python")),
        ),
        ("ssh://[fe80::1]:22/ort:cpu", Address("cpu", place=SshPlace("fe80::1", None, 22))),
        ("ssh://[::1]/ort:cpu", Address("cpu", place=SshPlace("::1"))),
        ("adb://emulator-5554/ort:cpu", Address("cpu", place=AdbPlace("emulator-5554"))),
        ("adb://10.0.0.7:5555/ort:cpu?python=py", Address("cpu", place=AdbPlace("10.0.0.7:5555", "py"))),
        ("openvino:cpu?dtype=bf16", Address("cpu", engine="openvino", options=(("dtype", "bf16"),))),
        ("ort:xnnpack?allow_fallback=1", Address("xnnpack", options=(("allow_fallback", "1"),))),
    ],
)
def test_an_address_is_read_whole(text: str, address: Address) -> None:
    assert parse_address(text) == address


def test_two_spellings_of_one_device_have_one_name() -> None:
    assert parse_address("ort:cpu").name == parse_address("ort:cpu?memory=9G&threads=1").name
    far = "ssh://pi@[::1]:22/ort:cpu"
    assert parse_address(far).name == parse_address(f"{far}?python=python").name == f"{far}?threads=1"
    assert parse_address(parse_address(far).name).name == f"{far}?threads=1"
    assert parse_address("openvino:cpu").name == parse_address("openvino:cpu?dtype=f32").name


def test_what_changes_latency_is_in_the_name() -> None:
    spelt = ("ort:cpu", "ort:cpu?threads=2", "openvino:cpu", "openvino:cpu?dtype=bf16", "ort:qnn")
    names = {parse_address(text).name for text in (*spelt, "ort:qnn?allow_fallback=1")}
    assert len(names) == len(spelt) + 1
    assert {parse_address(name).name for name in names} == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ort:cpuu", "unknown runtime 'ort:cpuu'; did you mean 'ort:cpu'"),
        ("", "unknown runtime ''; known: ort:cpu, ort:cuda"),
        ("telnet://pi@board/ort:cpu", "unknown kind of place 'telnet'; known: ssh, adb"),
        ("ssh://board", "it names no runtime; write ssh://board/ort:cpu"),
        ("ssh:///ort:cpu", "'' is no name of a host"),
        ("ssh://-oProxyCommand=x/ort:cpu", "is no name of a host"),
        ("ssh://::1/ort:cpu", "is no name of a host; an IPv6 address stands in brackets"),
        ("ssh://-l@board/ort:cpu", "'-l' is no name of a user"),
        ("ssh://board:/ort:cpu", "port '' must be a number from 1 to 65535"),
        ("ssh://board:99999/ort:cpu", "port '99999' must be"),
        ("ssh://board/ort:cpu?python=-c", "python='-c' must be a path or a command"),
        ("ssh://board/ort:cpu?pyton=x", "unknown option 'pyton'; did you mean 'python'"),
        ("adb://-s/ort:cpu", "'-s' is no serial; `adb devices` lists them"),
        ("ort:cpu?python=python3", "unknown option 'python'"),
        ("ort:cpu?memory=4096", "memory='4096' must be a number above zero and M or G, such as 2G"),
        ("ort:cpu?memory=0G", "memory='0G' must be"),
        ("pool:ort:cpu", "a pool cannot be used here; name one device"),
        ("ort:cpu?thread=2", "unknown option 'thread'; did you mean 'threads'"),
        ("ort:cpu?", "unknown option ''"),
        ("ort:cpu?allow_fallback=1", "unknown option 'allow_fallback'"),
        ("ort:cuda?allow_fallback=yes", "allow_fallback='yes' must be one of: 0, 1"),
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


def test_a_pool_is_one_address_of_several_members() -> None:
    pool = parse_addresses(
        "pool:ssh://a/ort:cpu?threads=2, ssh://b:23/ort:cpu?threads=2&python=/usr/bin/python3"
    )
    assert isinstance(pool, PoolAddress)
    assert [member.place for member in pool.members] == [
        SshPlace("a"),
        SshPlace("b", port=23, python="/usr/bin/python3"),
    ]
    assert pool.name == "pool:ssh://a/ort:cpu?threads=2,ssh://b:23/ort:cpu?threads=2"
    assert pool.device == "ort:cpu?threads=2"
    assert parse_addresses("ort:cpu") == parse_address("ort:cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pool:", "unknown runtime ''"),
        ("pool:ort:cpu,", "unknown runtime ''"),
        ("pool:pool:ort:cpu", "a pool cannot be used here"),
        ("pool:ssh://a/ort:cpu,ssh://a/ort:cpu?threads=1", "ssh://a/ort:cpu?threads=1 is there twice"),
        ("pool:ssh://a/ort:cpu,ssh://b/ort:cpu?threads=2", "are not of one class"),
        ("pool:ssh://a/ort:cpu,ssh://b/ort:cpu?memory=2G", "are not of one class"),
    ],
)
def test_what_is_wrong_with_a_pool_is_named(text: str, said: str) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_addresses(text)
    assert said in str(caught.value)
