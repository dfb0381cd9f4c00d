"""Folders, and files that are written whole or not at all."""

import os

import pytest

from homelib.paths import cache_dir, runs_dir, shipped, written_whole


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.nii.gz"
    with written_whole(path) as part:
        assert part.name.endswith(".nii.gz")  # writers go by the suffix
        assert part.parent == path.parent  # else the rename would be a copy
        part.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert [p.name for p in path.parent.iterdir()] == ["a.nii.gz"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def killed():
        with written_whole(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    with written_whole(tmp_path / "whole") as part:
        part.write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_folders_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOMELIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOMELIB_RUNS", "~/runs")
    assert cache_dir() == tmp_path / "cache"
    assert cache_dir().is_dir()
    assert str(runs_dir()) == os.path.expanduser("~/runs")
    monkeypatch.delenv("HOMELIB_RUNS")
    assert str(runs_dir()) == "runs"


def test_what_ships_is_found():
    assert (shipped("data_manifests") / "demo_ct.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="nowhere/"):
        shipped("nowhere")
