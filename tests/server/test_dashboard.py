"""The dashboard for Grafana asks for what /metrics has."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.engine.stats import StepStats
from nanovllm.server.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]


def an_output() -> Any:
    times = {"num_generation_tokens": 1, "first_token_latency": 0.1, "time_in_queue": 0.0, "finished_time": None}
    completion = SimpleNamespace(finish_reason="stop")
    return SimpleNamespace(metrics=SimpleNamespace(**times), prompt_token_ids=[1], finished=True, outputs=[completion])


def exposition() -> dict[str, set[str]]:
    """The names of samples in /metrics, with their labels."""
    engine = SimpleNamespace(index=0, stats=StepStats(), facts=None, num_restarts=0)
    metrics = Metrics(SimpleNamespace(all=[engine]), "demo")  # type: ignore[arg-type]
    watch = metrics.watch(0)
    watch.see(an_output())
    watch.end()
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    return exposition()


def names_in(text: str) -> set[str]:
    return set(re.findall(r"(?:vllm|nanovllm):\w+", text))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["legendFormat"])
def test_every_metric_and_label_of_a_panel_exists(target: dict[str, Any], samples: dict[str, set[str]]) -> None:
    expression = target["expr"]
    asked = names_in(expression)
    assert asked and asked <= set(samples), asked - set(samples)
    labels = set(re.findall(r"(\w+)=~?\"", expression)) | set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    labels |= {label for inner in re.findall(r"by \(([^)]*)\)", expression) for label in inner.split(", ")}
    assert all(labels <= samples[name] for name in asked)
    assert expression.count("(") == expression.count(")")


def test_variables_take_their_values_from_metrics_that_exist(samples: dict[str, set[str]]) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    for name in ("model_name", "engine"):
        (asked,) = names_in(variables[name]["definition"])
        assert name in samples[asked] and variables[name]["query"]["query"] == variables[name]["definition"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == set(variables)


def test_panels_have_ids_and_places_of_their_own() -> None:
    assert DASHBOARD["schemaVersion"] == 39
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
