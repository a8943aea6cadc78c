"""Sending an export to a hub on this machine: one commit, without what names this machine; refusals in one line."""

import json

import huggingface_hub.constants
import pytest
from fake_hub import fake_hub

from limbeck.errors import ConfigError, LimbeckError
from limbeck.pipeline.config import HubConfig
from limbeck.pipeline.hub import push


@pytest.fixture
def export(tmp_path):
    directory = tmp_path / "export"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    (directory / "model.safetensors").write_bytes(bytes(range(256)))
    (directory / "limbeck.json").write_text(json.dumps({"command": ["/home/me/secret"]}))
    return directory


def point_at(monkeypatch, url, is_offline=False):
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)


def test_all_files_but_the_manifest_are_one_commit(export, monkeypatch):
    with fake_hub() as hub:
        point_at(monkeypatch, hub.url)
        sent = push(HubConfig(repository="me/small"), export)
        files = {file.name: file.read_bytes() for file in export.iterdir() if file.name != "limbeck.json"}
        assert hub.repositories == {"me/small": files}
        assert hub.commits == 1 and hub.private["me/small"] and "Bearer hf_made_up" in hub.tokens
        assert sent["repository"] == "me/small" and sent["url"] == f"{hub.url}/me/small/commit/{sent['commit']}"
        push(HubConfig(repository="me/open", private=False), export)
        assert not hub.private["me/open"]


def test_a_refusal_says_what_to_do(export, monkeypatch):
    with fake_hub(refuses=True) as hub:
        point_at(monkeypatch, hub.url)
        with pytest.raises(LimbeckError, match=r"push_to_hub me/small: the Hub refused .*call the pipeline again"):
            push(HubConfig(repository="me/small"), export)


def test_nothing_is_sent_where_the_network_is_off(export, monkeypatch):
    with fake_hub() as hub:
        point_at(monkeypatch, hub.url, is_offline=True)
        with pytest.raises((ConfigError, LimbeckError), match="push_to_hub me/small"):
            push(HubConfig(repository="me/small"), export)
        assert not hub.repositories


def test_a_name_that_the_hub_refuses_is_refused(export, monkeypatch):
    with fake_hub() as hub:
        point_at(monkeypatch, hub.url)
        with pytest.raises(ConfigError, match="push_to_hub me/sm all"):
            push(HubConfig(repository="me/sm all"), export)
