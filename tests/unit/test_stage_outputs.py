import json
import math

import pytest
from recording import Recorder

from spd_dist.analysis.report import StageTotal
from spd_dist.storage.manifests import Manifest, OutputFile
from spd_dist.storage.records import write_record
from spd_dist.storage.subspace_file import SiteSummary
from spd_dist.tracking.metrics import MetricLogger, read_metrics
from spd_dist.tracking.stage_outputs import product_of, show_cost, show_stage, show_subspace
from spd_dist.types import Certificate, Completion


def site(spectrum, angle_bound=0.1):
    return SiteSummary(
        module="k_proj", width=len(spectrum), rank=1, energy_fraction=0.5, num_rows=9, sketch_size=3,
        certificate=Certificate(14.0, 0.5, 0.0, 9), certified_energy_fraction=1.0, certified_energy_share=0.5,
        angle_bound=angle_bound, num_null_directions=0, spectrum=spectrum,
    )  # fmt: skip


def test_a_subspace_is_shown_as_curves_over_its_directions_and_a_table_of_certificates(tmp_path):
    mirror = Recorder()
    with MetricLogger(tmp_path, mirror=mirror) as metrics:
        sites = {"layers.3.key": site([9.0, 4.0, 1.0]), "layers.3.value": site([4.0], angle_bound="not certified")}
        show_subspace(metrics, sites)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["project/layer3_key_singular_value"] for row in rows] == [3, 2, 1]
    assert [row["project/layer3_key_energy_fraction"] for row in rows] == pytest.approx([9 / 14, 13 / 14, 1])
    assert [row.get("project/layer3_value_energy_fraction") for row in rows] == [1.0, None, None]
    ((name, columns, table),) = mirror.tables
    assert name == "project/certificates"
    by_column = dict(zip(columns, table[1], strict=True))
    assert (by_column["site"], by_column["angle_bound"]) == ("layers.3.value", "not certified")
    assert (by_column["sketch_delta"], by_column["num_rows"]) == (0.5, 9)


def test_a_wide_spectrum_is_thinned_and_keeps_its_ends(tmp_path):
    with MetricLogger(tmp_path) as metrics:
        show_subspace(metrics, {"layers.0.key": site([math.exp(-index) for index in range(5000)])})
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert (steps[:3], steps[-1]) == ([1, 2, 3], 5000)
    assert len(steps) < 400


def test_a_corpus_is_shown_by_lengths_rates_and_samples_under_its_arm(tmp_path):
    mirror, folder = Recorder(), tmp_path / "arms/psr/generate/completions"
    folder.mkdir(parents=True)
    made = [Completion(f"p{n}", 0, 1, (5,), tuple(range(n + 1)), "text", "stop") for n in range(40)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(vars(one)) + "\n" for one in made))
    with MetricLogger(tmp_path / "metrics", mirror=mirror) as metrics:
        show_stage(metrics.labelled("psr"), tmp_path, "arms/psr/generate")
    (row,) = read_metrics(tmp_path / "metrics")
    assert (row["generate/psr_mean_tokens"], row["generate/psr_stop_rate"], row["label"]) == (20.5, 1.0, "psr")
    assert mirror.histograms == [("generate/psr_length_tokens", list(range(1, 41)))]
    ((name, columns, rows),) = mirror.tables
    assert (name, columns[0], len(rows)) == ("generate/psr_samples", "id", 32)


def test_the_cost_of_a_stage_without_a_known_peak_is_shown_without_it(tmp_path):
    cost = {"arms/psr/generate": StageTotal(None, 2.0, 4, 0.5, None, "2026-01-01")}
    with MetricLogger(tmp_path, mirror=Recorder()) as metrics:
        show_cost(metrics, cost)
    (row,) = read_metrics(tmp_path)
    assert {name for name in row if "/" in name} == {"cost/psr_generate_seconds", "cost/psr_generate_device_hours"}


def test_what_a_stage_made_says_what_it_was_made_from(tmp_path):
    folder = tmp_path / "arms/psr/finetune"
    (folder / "adapter").mkdir(parents=True)
    outputs = {"adapter/x": OutputFile(1, "2")}
    manifest = Manifest("arms/psr/finetune", {"completions": "hash"}, outputs, 1.0, 2.0, 2, "2026-01-01", {})
    write_record(folder / "manifest.json", manifest)
    product = product_of(tmp_path, "arms/psr/finetune")
    assert (product.name, product.kind, product.is_copied) == ("psr-adapter", "adapter", True)
    assert product.metadata["inputs"] == {"completions": "hash"}
    (folder / "adapter").rename(folder / "model")
    assert not product_of(tmp_path, "arms/psr/finetune").is_copied
