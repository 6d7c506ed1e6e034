"""Which metrics a PromQL expression reads, and which labels it gives: what is not in a page of /metrics is an error."""

from __future__ import annotations

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

TARGET = frozenset({"job", "instance", "namespace", "pod"})  # what Prometheus adds to every series of a pod

Labels = frozenset[str]


def read_page(page: str) -> dict[str, Labels]:
    """The samples of a page of /metrics: name -> its labels."""
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return {name: frozenset(labels) for name, labels in samples.items()}


def labels_of(text: str, samples: dict[str, Labels]) -> Labels:
    """The labels of the series that an expression gives.

    Raises:
        ValueError: It reads a metric or a label that is not in `samples`, or joins series whose labels differ.
    """
    labels = _labels(promql.parse(text), samples)
    if labels is None:
        raise ValueError(f"{text}: a number")
    return labels


def _labels(node: promql.Expr, samples: dict[str, Labels]) -> Labels | None:
    """The labels of an expression; None: it is a number."""
    match node:
        case promql.NumberLiteral() | promql.StringLiteral():
            return None
        case promql.VectorSelector():
            return _selected(node, samples)
        case promql.MatrixSelector():
            return _selected(node.vector_selector, samples)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels(node.expr, samples)
        case promql.Call():
            return _called(node, samples)
        case promql.AggregateExpr():
            return _aggregated(node, samples)
        case promql.BinaryExpr():
            return _joined(node, samples)
    raise ValueError(f"{node}: not read here")


def _selected(node: promql.VectorSelector, samples: dict[str, Labels]) -> Labels:
    if node.name not in samples:
        raise ValueError(f"{node.name}: no such metric")
    labels = samples[node.name] | TARGET
    _check({matcher.name for matcher in node.matchers.matchers}, labels, node)
    return labels


def _called(node: promql.Call, samples: dict[str, Labels]) -> Labels | None:
    inner = [_labels(arg, samples) for arg in node.args]
    (labels,) = [found for found in inner if found is not None]
    if node.func.name == "absent":
        return frozenset()
    if node.func.name == "histogram_quantile":
        _check({"le"}, labels, node)
        return labels - {"le"}
    return labels


def _aggregated(node: promql.AggregateExpr, samples: dict[str, Labels]) -> Labels:
    inner = _labels(node.expr, samples) or frozenset()
    if node.modifier is None:
        return frozenset()
    named = frozenset(node.modifier.labels)
    _check(named, inner, node)
    return named if node.modifier.type == promql.AggModifierType.By else inner - named


def _joined(node: promql.BinaryExpr, samples: dict[str, Labels]) -> Labels | None:
    left, right = _labels(node.lhs, samples), _labels(node.rhs, samples)
    if left is None or right is None:
        return right if left is None else left
    matching = node.modifier.matching if node.modifier else None
    named = frozenset(matching.labels) if matching else frozenset()
    _check(named, left | right, node)
    if matching and matching.type == promql.LabelModifierType.Include:
        _check(named, left & right, node)
    elif left - named != right - named:
        raise ValueError(f"{node}: joins series by {sorted(left - named)} and by {sorted(right - named)}")
    return left


def _check(names: set[str] | Labels, known: Labels, node: promql.Expr) -> None:
    if missing := names - known:
        raise ValueError(f"{node}: no label {sorted(missing)}; there are {sorted(known)}")
