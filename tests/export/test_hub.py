"""Uploads to a local stand-in of the hub, and what the user sees of them."""

import json

import huggingface_hub
import pytest

from tests.export.hub_stand_in import hub

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def online(monkeypatch):
    """Lets huggingface_hub talk to an address, with a token."""

    def connect(address: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("spin_lightning.export.hub.get_token", lambda: TOKEN)

    return connect


# (huggingface_hub 2.4 passes the file to httpx by an argument that httpx deprecates.)
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_push_uploads_every_file_of_the_verified_folder(own_run, spin, online, tmp_path, capfd):
    with hub() as seen:
        online(seen.address)
        arguments = ("export", own_run.root, tmp_path / "out", "--merge", "true")
        spin(*arguments, "--push", "me/mine")
    (created,) = seen.repositories
    assert (created["name"], created["organization"]) == ("mine", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert seen.files == written
    assert {"README.md", "model.safetensors", "chat_template.jinja"} <= set(written)
    assert seen.tokens == {f"Bearer {TOKEN}"}
    out, err = capfd.readouterr()
    assert f"Uploaded: {seen.address}/me/mine/commit/{'1' * 40}" in out
    assert TOKEN not in out + err
    assert all(TOKEN.encode() not in content for content in written.values())


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "log in with: hf auth login"), (403, "a token that may write")]
)
def test_refused_push_keeps_the_folder_and_shows_no_token(
    status, fix, own_run, spin, online, tmp_path, capfd
):
    with hub(status) as seen:
        online(seen.address)
        with pytest.raises(SystemExit):
            spin("export", own_run.root, tmp_path / "out", "--to", "merged", "--push", "me/mine")
    out, err = capfd.readouterr()
    assert "the hub did not take the folder" in err
    assert fix in err
    assert f"hf upload me/mine {tmp_path / 'out'}" in err
    assert TOKEN not in out + err
    assert (tmp_path / "out" / "README.md").exists()


def test_push_that_cannot_work_is_refused_before_anything_is_written(
    own_run, spin, online, tmp_path, monkeypatch, capsys
):
    online("http://127.0.0.1:9")
    for options, problem in (
        (["--push", "mine"], "it is not the name of a repository. Fix: give owner/name"),
        (["--push", "me/mine"], "a folder on this machine, which others cannot load"),
    ):
        with pytest.raises(SystemExit):
            spin("export", own_run.root, tmp_path / "out", *options)
        assert problem in capsys.readouterr().err
    monkeypatch.setattr("spin_lightning.export.hub.get_token", lambda: None)
    with pytest.raises(SystemExit):
        spin("export", own_run.root, tmp_path / "out", "--merge", "true", "--push", "me/mine")
    assert "no token of the hub is known. Fix: log in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_address_that_does_not_answer_is_one_error(own_run, spin, online, tmp_path, capsys):
    online("http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        spin("export", own_run.root, tmp_path / "out", "--merge", "true", "--push", "me/mine")
    message = capsys.readouterr().err
    assert "check the connection to the hub" in message
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
