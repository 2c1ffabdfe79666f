"""Reports of which path serves what."""

from __future__ import annotations

from elastic_moe.cluster.fit import CodePath, FitNotes, FitReport, Part, PartFit

HALF = "it has two feed-forward halves"


def report() -> FitReport:
    notes = FitNotes()
    notes.add(Part.NORMS, "RMSNorm", CodePath.NATIVE, count=5)
    notes.add(Part.NORMS, "LayerNorm", CodePath.TRANSFORMERS, "it has a bias")
    for _ in range(3):
        notes.add(Part.LAYERS, "Layer", CodePath.TRANSFORMERS, HALF)
    return FitReport(rows=notes.rows())


def test_notes_are_counted_by_kind_path_and_reason() -> None:
    layers, *norms = report().rows
    assert layers == PartFit(part=Part.LAYERS, modules="Layer", count=3, path=CodePath.TRANSFORMERS, reason=HALF)
    assert [(row.modules, row.count) for row in norms] == [("RMSNorm", 5), ("LayerNorm", 1)]


def test_notes_go_on_from_rows() -> None:
    notes = FitNotes(report().rows)
    notes.add(Part.LAYERS, "Layer", CodePath.TRANSFORMERS, HALF)
    assert notes.count(Part.LAYERS) == 4
    assert notes.count(Part.NORMS) == 6
    assert notes.count(Part.ROUTER) == 0


def test_a_report_in_words() -> None:
    assert report().summary() == "layers transformers, norms native 5/6 + transformers 1/6"
    assert report().reasons() == (
        "layers: 3 x Layer by transformers (it has two feed-forward halves)",
        "norms: 1 x LayerNorm by transformers (it has a bias)",
    )
    assert report().text().splitlines()[1] == "  " + report().reasons()[0]
    assert report().shares(Part.ROUTER) == ""
    assert report().paths() == (
        (Part.LAYERS, CodePath.TRANSFORMERS),
        (Part.NORMS, CodePath.NATIVE),
        (Part.NORMS, CodePath.TRANSFORMERS),
    )
