from __future__ import annotations

from pathlib import Path

from nestling.pipeline.members import member_folders


def test_members_beyond_the_hundredth_are_members_and_what_else_was_exported_is_none(tmp_path: Path) -> None:
    members = ["01-0123456789ab", "99-123456789012", "100-0123456789ab", "1000-abcdefabcdef"]
    others = [
        "0123456789ab",
        "123456789012-tuned-0123456789ab",
        "123456789012-qat-0123456789ab",
        "1-0123456789ab",
    ]
    for name in (*members, *others):
        (tmp_path / name).mkdir()
    assert {path.name for path in member_folders(tmp_path)} == set(members)
    assert member_folders(tmp_path / "missing") == []
