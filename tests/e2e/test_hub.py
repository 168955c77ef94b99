"""What a run made goes to a hub and comes back the same; a hub that is ill, strange or away is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard, constants
from launching import SMALL, launch
from peft import PeftModel
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

import spd_dist as spd
from spd_dist.errors import ConfigError, DataError, UserError
from spd_dist.hub.publish import Publication, publish
from spd_dist.hub.repository import Patience, Repository, upload
from spd_dist.storage.artifacts import read_json, sha256_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own request
QUICK = Patience(3, first_wait_seconds=0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A finished run with an adapter, a merged model, a subspace, a corpus and a report."""
    folder = tmp_path_factory.mktemp("run")
    words = [*SMALL, "evaluate.arms=[base,spd]", "finetune.merge=true", "finetune.num_epochs=1"]
    launch(1, [f"model.name={base}", f"run_dir={folder / 'run'}", *words], folder / "log")
    return folder / "run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub that this process talks to, with an empty cache."""
    with FakeHub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served
        assert served.unknown == set()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


def pushed(run: Path, product: str, **changes: object) -> str:
    return publish(Publication(run, product, f"me/{product}", **changes), QUICK)


def test_a_student_comes_back_from_the_hub_as_it_was_and_its_card_says_how_it_came(hub, run, base):
    (run / "finetune/adapter/README.md").read_text().index(str(base))
    for product in ("adapter", "merged"):
        assert pushed(run, product, base_model="org/base").startswith(f"{hub.url}/me/{product}/commit/")
        assert hub.repos[f"me/{product}"].private
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "finetune" / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/adapter")
    assert torch.equal(logits(theirs), logits(ours))
    merged = AutoModelForCausalLM.from_pretrained("me/merged")
    assert torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(run / "finetune" / "model")))
    files = hub.repos["me/adapter"].commits[-1][1]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert not any(str(base).encode() in content for content in files.values())
    card, report = ModelCard(files["README.md"].decode()), read_json(run / "report.json")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "adapter")
    assert "self-policy-distillation" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type) == ("arithmetic", "accuracy")
    assert result.metric_value == report["arms"]["spd"]["value"]
    assert report["verdict"] in card.text
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in card.text


def test_all_parameters_of_a_student_go_under_their_own_name(hub, run, tmp_path):
    full = Path(shutil.copytree(run, tmp_path / "full"))
    config = (full / "config.yaml").read_text()
    (full / "config.yaml").write_text(
        config.replace("  mode: lora", "  mode: full").replace("merge: true", "merge: false")
    )
    with pytest.raises(ConfigError, match=r"product merged: .* none, as its finetune.mode is full; push full"):
        pushed(full, "merged")
    pushed(full, "full", base_model="org/base")
    card = hub.repos["me/full"].commits[-1][1]["README.md"].decode()
    assert "base_model_relation: finetune" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/full")' in card


def test_a_subspace_and_a_corpus_come_back_from_the_hub(hub, run, tmp_path):
    pushed(run, "subspace")
    found, expected = spd.load_subspace("me/subspace"), spd.load_subspace(run)
    assert list(found.overlap(expected).values()) == pytest.approx([1.0] * 4)
    assert found.metadata == expected.metadata
    first = hub.repos["me/subspace"].commits[-1][0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "subspace.safetensors").write_bytes(b"another one")
    hub.add("me/subspace", tmp_path / "other")
    with pytest.raises(DataError, match="corrupt"):
        spd.load_subspace("me/subspace")
    assert spd.load_subspace("me/subspace", revision=first).metadata == expected.metadata
    pushed(run, "corpus")
    files = hub.repos["datasets/me/corpus"].commits[-1][1]
    assert files["completions.jsonl"] == (run / "generate/completions/completions.jsonl").read_bytes()
    card = files["README.md"].decode()
    assert "data_files: completions.jsonl" in card
    assert "with its keys and values held to its capability subspace" in card
    assert "base_model" not in card.split("---")[1]  # a folder of this machine is no name on the hub


def test_a_push_that_was_cut_goes_on_and_a_repeated_one_sends_nothing(hub, run):
    hub.failing["commit"] = 99
    with pytest.raises(UserError, match=r"me/merged: the hub did not take it in 3 attempts .*503.*the same command"):
        pushed(run, "merged", base_model="org/base")
    weights = f"PUT {sha256_of(run / 'finetune/model/model.safetensors')}"
    assert hub.asked[weights] == 1
    hub.failing.clear()
    hub.failing.update(create=1, preupload=1, commit=1)
    pushed(run, "merged", base_model="org/base")
    pushed(run, "merged", base_model="org/base")
    assert hub.asked[weights] == 1
    assert len(hub.repos["me/merged"].commits) == 2  # the hub's own first one, and ours


def test_a_hub_that_does_not_answer_is_told_from_one_that_refuses(hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    with pytest.raises(DataError, match=r"me/adapter: the hub answers 401 .*hf auth login"):
        pushed(run, "adapter")
    assert hub.asked["create"] == 1
    with pytest.raises(DataError, match=r"me/none@main: the hub answers 404 .*correct its name or revision"):
        spd.load_subspace("me/none")
    hub.add("me/empty", save_tiny_model(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"me/empty@main holds no subspace.safetensors"):
        spd.load_subspace("me/empty")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="did not take it in 3 attempts"):
        pushed(run, "adapter")


def test_nothing_becomes_public_by_accident(hub, run, tmp_path):
    hub.add("me/adapter", save_tiny_model(tmp_path / "seen"))
    with pytest.raises(ConfigError, match=r"me/adapter is a public repository.*--public"):
        pushed(run, "adapter")
    assert "commit" not in hub.asked
    pushed(run, "adapter", is_public=True)
    assert hub.asked["commit"] == 1


@pytest.mark.parametrize(("product", "changes", "reason"), [
    ("full", {}, "this run has none, as its finetune.mode is lora; push adapter"),
    ("weights", {}, "'weights' is nothing that a run makes; choose one of adapter, merged"),
    ("adapter", {"arm": "base"}, r"the arm base \(the untouched model\) has none; name another by --arm"),
    ("subspace", {"arm": "psr"}, "the arm psr .* has none"),
    ("subspace", {"arm": "random"}, "--arm: random is not valid .* whose project.mode=random holds it to none"),
    ("adapter", {"base_model": "/models/base"}, "--base-model: '/models/base' is not valid; write the OWNER/NAME"),
    ("adapter", {"repository": "mine"}, "hub name 'mine' is not valid; write OWNER/NAME"),
])  # fmt: skip
def test_a_product_that_a_run_does_not_have_is_refused(run, product, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        publish(Publication(**{"run_dir": run, "product": product, "repository": "me/it"} | changes), QUICK)


def test_a_product_that_is_not_made_yet_names_its_stage(run, tmp_path):
    with pytest.raises(DataError, match=r"arms/psr/finetune/adapter is not there: run the finetune stage first"):
        publish(Publication(run, "adapter", "me/it", "psr"), QUICK)
    with pytest.raises(DataError, match=r"is no run's folder: it has no config.yaml; name the run_dir"):
        publish(Publication(tmp_path, "adapter", "me/it"), QUICK)


def test_without_a_network_nothing_is_pushed_and_what_is_cached_is_read(hub, run, tmp_path, monkeypatch):
    pushed(run, "subspace")
    spd.load_subspace("me/subspace")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert spd.load_subspace("me/subspace").sites
    with pytest.raises(DataError, match=r"me/other@main has no subspace.safetensors .*HF_HUB_OFFLINE is set"):
        spd.load_subspace("me/other")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, so nothing can be pushed to me/it; unset it"):
        upload(tmp_path, Repository("me/it"), "a message", QUICK)
    with pytest.raises(ConfigError, match=r"revision 'v1': .* is here and has no revisions"):
        spd.load_subspace(run, revision="v1")


@pytest.mark.slow
def test_a_run_takes_model_and_rows_of_the_hub_at_the_commits_that_it_names_and_offline_what_it_had(base, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    row = {"question": "1 + 1?", "solution": "It is 2.", "answer": "2"}
    (rows / "train.jsonl").write_text("".join(json.dumps(row | {"id": str(number)}) + "\n" for number in range(9)))
    with FakeHub() as hub:
        model_commit, rows_commit = hub.add("me/tiny", base), hub.add("datasets/me/rows", rows)
        hub.add("me/tiny", save_tiny_model(tmp_path / "later", seed=1))
        (rows / "train.jsonl").write_text("not rows\n")
        hub.add("datasets/me/rows", rows)
        words = ["--until", "project", "data.task=gsm8k", "data.num_train=4", "calibrate.num_examples=4",
                 "model.name=me/tiny", f"model.revision={model_commit}", "metrics.wandb=disabled",
                 f"data.train=me/rows@{rows_commit}", f"data.test=me/rows@{rows_commit}::train"]  # fmt: skip
        environment = os.environ | hub.variables(tmp_path / "home")

        def project(name: str, **variables: str) -> list[bytes]:
            command = [sys.executable, "launchers/spd.py", *words, f"run_dir={tmp_path / name}"]
            done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            sites = spd.load_subspace(tmp_path / name).sites.values()
            return [site.basis_DR.numpy().tobytes() for site in sites]

        online = project("online")
        assert hub.unknown == set()
        asked = sum(hub.asked.values())
        assert project("offline", HF_HUB_OFFLINE="1") == online
        assert sum(hub.asked.values()) == asked
