"""Files and words that nobody wrote on purpose: one error of ours, never another, whatever they hold."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import tiny_tokenizer
from tiny_gguf import write_tiny_gguf
from torch import ones

from spd_dist.config import Data
from spd_dist.data.readers import read_rows
from spd_dist.data.templates import asking, render_prompt
from spd_dist.errors import UserError
from spd_dist.models.gguf_header import check_gguf
from spd_dist.overrides import load_config
from spd_dist.storage.artifacts import read_jsonl, read_tensors
from spd_dist.storage.manifests import MANIFEST, why_not_complete

pytestmark = pytest.mark.slow

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from(["model", "data", "calibrate", "generate", "finetune", "evaluate", "metrics", "seed", "x"])
KEYS = st.sampled_from(
    ["name", "task", "mask", "rank", "layers", "batch_size", "max_tokens", "temperature", "arms", "y"]
)
quickly = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def only_our_errors(call: Callable[[], object]) -> None:
    """It works, or says one sentence, whose exit code goes with its class."""
    with contextlib.suppress(UserError):
        call()


@quickly
@given(section=SECTIONS, key=KEYS, value=PLAIN, text=st.text(max_size=30))
def test_configs(tmp_path, section, key, value, text):
    file = tmp_path / "config.yaml"
    for content in (json.dumps({section: {key: value}}), json.dumps({section: value}), text):
        file.write_text(content, encoding="utf-8", errors="surrogatepass")
        only_our_errors(lambda: load_config([file]))
    only_our_errors(lambda: load_config([], [f"{section}.{key}={json.dumps(value)}"]))
    only_our_errors(lambda: load_config([], [f"{section}.{key}={text}"]))


@quickly
@given(
    rows=st.lists(PLAIN, max_size=3), spoiled=st.binary(max_size=20), ending=st.sampled_from(["jsonl", "json", "csv"])
)
def test_rows_and_json_lines(tmp_path, rows, spoiled, ending):
    file = tmp_path / f"rows.{ending}"
    for content in (b"\n".join(json.dumps(row).encode() for row in rows), json.dumps(rows).encode(), spoiled):
        file.write_bytes(content)
        only_our_errors(lambda: list(read_rows(str(file))))
        only_our_errors(lambda: read_jsonl(file))


@quickly
@given(value=PLAIN, outputs=PLAIN)
def test_manifests(tmp_path, value, outputs):
    for content in (value, {"inputs": {}, "outputs": outputs}, {"inputs": {}, "outputs": {"a": outputs}}):
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        only_our_errors(lambda: why_not_complete(tmp_path, {}))


@quickly
@given(
    template=st.text(alphabet="{}%|mesagconti[]'\"()+-.0 \n", max_size=40)
    | st.sampled_from(["{{ 1/0 }}", "{% for", "{{x.y.z}}"])
)
def test_chat_templates(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    only_our_errors(lambda: render_prompt(asking("1 + 1?"), tokenizer, Data()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """A file of each kind that can be read."""
    tensors = save({"a": ones(2, 3), "b": ones(4)}, {"k": "v"})
    return {"gguf": write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf").read_bytes(), "safetensors": tensors}


@pytest.mark.parametrize(("kind", "read"), [("gguf", check_gguf), ("safetensors", read_tensors)])
@quickly
@given(place=st.integers(0, 600), new=st.binary(min_size=1, max_size=8), cut=st.integers(0, 2**16) | st.none())
def test_headers_of_models(whole, tmp_path, kind, read, place, new, cut):
    content = whole[kind][:place] + new + whole[kind][place + len(new) :]
    file = Path(tmp_path) / f"a.{kind}"
    for spoiled in (content, content[:cut], struct.pack("<Q", 2**62) + content, new):
        file.write_bytes(spoiled)
        only_our_errors(lambda: read(file))
