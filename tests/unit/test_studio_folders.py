"""Names that a page may give for files: those of the lists, and nothing that leads out of the folders."""

from __future__ import annotations

import shutil

import pytest

from dmm_core.errors import BadInput
from dmm_core.studio.folders import Folders
from tests.unit.studios import make_folders


@pytest.fixture
def folders(tmp_path) -> Folders:
    return make_folders(tmp_path)


def test_lists_are_of_the_folders(folders, tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    (folders.checkpoints[0] / "notes.txt").write_text("no model", encoding="utf-8")
    assert folders.list_checkpoints() == ["a.safetensors", "c.safetensors", "sub/b.safetensors"]
    listed = Folders(folders.checkpoints, folders.loras, folders.own, lambda: [
        folders.checkpoints[0] / "a.safetensors", tmp_path / "outside.safetensors", "elsewhere.ckpt",
    ])  # fmt: skip
    assert listed.list_checkpoints() == ["a.safetensors"]
    assert folders.list_students() == []
    assert folders.checkpoint("sub/b.safetensors") == folders.checkpoint("sub\\b.safetensors")


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../../outside.safetensors", "/etc/passwd",
                                  "C:\\x.safetensors", "\\\\server\\x", "a\0b", "a\nb"])  # fmt: skip
def test_names_that_lead_out_are_refused(folders, tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match="leads out of the folder"):
        folders.checkpoint(name)
    with pytest.raises(BadInput):
        folders.new_checkpoint(name)


def test_links_that_lead_out_are_refused(folders, tmp_path):
    out = tmp_path / "outside"
    out.mkdir()
    shutil.copy(folders.checkpoints[0] / "a.safetensors", out / "x.safetensors")
    try:
        (folders.checkpoints[0] / "link.safetensors").symlink_to(out / "x.safetensors")
        (folders.checkpoints[0] / "door").symlink_to(out, target_is_directory=True)
        (folders.checkpoints[0] / "gone.safetensors").symlink_to(out / "not there.safetensors")
    except OSError:
        pytest.skip("no links here")
    for name in ("link.safetensors", "door/x.safetensors", "gone.safetensors"):
        assert name not in folders.list_checkpoints()
        with pytest.raises(BadInput, match="is a link that leads out"):
            folders.checkpoint(name)
    for name in ("door/new", "gone"):
        with pytest.raises(BadInput, match="leads out of check points by a link"):
            folders.new_checkpoint(name)
    (folders.checkpoints[0] / "inner.safetensors").symlink_to(folders.checkpoints[0] / "a.safetensors")
    assert "inner.safetensors" in folders.list_checkpoints()


def test_missing_and_empty_names(folders):
    with pytest.raises(BadInput, match=r"there is no checkpoint .gone\.safetensors.\. Was it deleted"):
        folders.checkpoint("gone.safetensors")
    for name in ("", None, " "):
        with pytest.raises(BadInput, match="no checkpoint is chosen"):
            folders.checkpoint(name)
