"""Video files that are no videos, or that name others."""

import os
import re
import warnings
from pathlib import Path

import pytest
from PIL import Image

from data.clip_folder import ClipFolder
from tests import video_files

pytest.importorskip("av", reason="PyAV is not installed (pip install av)")
MPD = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1">'
)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos of 20 frames."""
    root = tmp_path / "videos"
    for name in ("a.mp4", "b.avi", "c.mkv"):
        video_files.write_video(root / name, 20, codec="mpeg4" if name == "b.avi" else "libx264")
    return root


def test_no_other_file_and_no_network_is_opened(videos: Path) -> None:
    """Playlists, manifests and session descriptions under names of videos would make FFmpeg follow them."""
    real = videos / "a.mp4"
    contents = {
        "concat.mp4": "ffconcat version 1.0\nfile a.mp4\n",
        "hls.ts": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{real}\n#EXT-X-ENDLIST\n",
        "dash.mp4": f"{MPD}<BaseURL>{real}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp.mov": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "http:127.0.0.1.mp4": "#EXTM3U\nhttp://127.0.0.1/a.ts\n",
    }
    for name, content in contents.items():
        (videos / name).write_text(content)
    (videos / "concat:a.mp4").write_bytes(real.read_bytes())  # a name that looks like a protocol is a name
    (videos / "http:x?y#z%41.mp4").write_bytes(real.read_bytes())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ClipFolder(videos, 8, frames=4)
    assert [data.path(i) for i in range(5)] == ["a.mp4", "b.avi", "c.mkv", "concat:a.mp4", "http:x?y#z%41.mp4"]
    assert sorted(re.findall(r"videos/(\S+): cannot be read", " ".join(str(w.message) for w in caught))) == sorted(
        contents
    )
    assert video_files.numbers_in(data.read(4, [7])) == [7]


def test_pictures_and_very_long_frames_are_no_videos(videos: Path) -> None:
    video_files.write_video(videos / "long.mp4", 6, size=(16, 4096))
    Image.new("RGB", (16, 16)).save(videos / "p.mp4", "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(ClipFolder(videos, 8, frames=4)) == 3
    text = " ".join(str(w.message) for w in caught)
    assert "long.mp4: cannot be read, and is left out: 4096 x 16 pixels; a side may be at most 100 times" in text
    assert "p.mp4: cannot be read, and is left out" in text


def test_a_name_that_is_not_utf_8(videos: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    (videos / name).write_bytes((videos / "a.mp4").read_bytes())
    for _ in range(2):  # the second time from the listing
        data = ClipFolder(videos, 8, frames=4)
        assert data.path(3) == name and video_files.numbers_in(data.read(3, [5])) == [5]
