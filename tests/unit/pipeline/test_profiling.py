from __future__ import annotations

from pathlib import Path

import pytest

from nestling.pipeline.profiling import write_profile_page
from nestling.profile import FileProfile, Fingerprint, Kernel, Measurement


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    fingerprint = Fingerprint(
        "ort:cpu?threads=1", "A CPU", (), 1, "Linux", "onnxruntime 1.0", "0" * 12, False
    )
    taken = Measurement(fingerprint, (0.002,) * 20, (0.001,) * 20, 0.1, 0.1)
    nodes = (Kernel("stem", "Conv", "CPUExecutionProvider", ("float",), ("float",), 5.0),)
    page = tmp_path / "page.html"
    write_profile_page([FileProfile(Path("net.onnx"), taken, (), {}, nodes)], page)
    assert "stem" in page.read_text()
    page.unlink()
    with pytest.raises(ValueError, match="at least one"):
        write_profile_page([], page)
    assert list(tmp_path.iterdir()) == []
