"""The report on how small the layers of a model can be made: one summary, and the page, JSON and Markdown from it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from math import isfinite, nan

from qvis.analysis.damage import UNRELIABLE
from qvis.analysis.sizes import (
    FREE_DB,
    METHODS,
    Compressibility,
    Curve,
    LayerSizes,
    Point,
    Score,
    Trial,
    describe,
    kept_db,
)
from qvis.layers import Thresholds
from qvis.report.document import SCHEMA_VERSION, Document, Sentence, jsonable
from qvis.report.frame import render_page
from qvis.report.markdown import code, prose
from qvis.report.report import DocumentReport
from qvis.report.sensitivity import significant
from qvis.version import __version__
from qvis.words import count, listed_names, percent, size, visible

KIND = "compressibility"
VALUES = 128
"""Singular values in a summary, evenly spaced where there are more."""
ROWS = 300
"""Scores on the page and layers in Markdown, the best ones."""
TOLD = 10
"""Layers in Markdown that are not folded away."""
STYLES = ("table", "detail", "left_out", "chart", "compressibility", "narrow", "print")
SCRIPTS = ("chart", "sorting", "listing", "choosing", "compressibility")


def summarize(found: Compressibility) -> Document:
    """All that the page, the JSON and the Markdown tell; plain values."""
    ranks = {layer.name: rank for rank, layer in enumerate(found.ranked, 1)}
    scores = [_score(found, one) for one in found.scores]
    return {
        "schema_version": SCHEMA_VERSION,
        "qvis": __version__,
        "kind": KIND,
        "title": "Compressibility",
        "evidence": found.evidence,
        "model": {"name": found.name, "framework": found.framework, "layers": len(found.layers)},
        "bits": found.bits,
        "keep_db": found.keep_db,
        "samples": found.samples,
        "passes": found.passes,
        "bytes": found.bytes,
        "stored_bytes": found.stored_bytes,
        "baseline_db": _db(found.baseline),
        "accuracy": _known(found.accuracy[0]),
        "baseline_accuracy": _known(found.accuracy[1]),
        "progress": {
            "state": found.state,
            "done": len(found.scores),
            "total": len(found.trials),
            # not of a run that has ended: the same model gives the same bytes
            "remaining_seconds": _known(found.remaining_seconds) if found.state == "running" else None,
        },
        "verdict": {"sentence": _sentence(found), "text": tell_verdict(found), "details": _details(found), "first": 2},
        "methods": METHODS,
        "together": [_together(found, one) for one in found.trials if one.all_layers],
        "layers": [_layer(found, layer, ranks[layer.name]) for layer in found.layers],
        "scores": sorted((one for one in scores if one), key=lambda one: -(one["bytes_per_db"] or 0)),
        "skipped": [{"name": one.name, "reason": one.reason} for one in found.skipped],
        "notes": list(found.notes),
    }


def _db(damage: float) -> float | None:
    kept = kept_db(damage)
    return round(kept, 2) if isfinite(kept) else None


def _known(value: float, digits: int = 4) -> float | None:
    return significant(value, digits) if isfinite(value) else None


def _layer(found: Compressibility, layer: LayerSizes, rank: int) -> Document:
    best = found.best(layer)
    offers = [_offer(found, layer, method, found.offer(layer, method)) for method in METHODS]
    spectrum = layer.spectrum
    values = [] if spectrum is None else [significant(float(one)) for one in spectrum.values]
    step = max(1, -(-len(values) // VALUES))
    return {
        "rank": rank,
        "name": layer.name,
        "op": layer.op,
        "shape": list(layer.shape),
        "weights": layer.weights,
        "channels": layer.channels,
        "bytes": layer.bytes,
        "kept_db": _db(layer.damage.value),
        "entropies": {str(bits): round(one, 3) for bits, one in layer.entropies.items()},
        "zeros": layer.zeros,
        "dead": list(layer.dead),
        "near_dead": list(layer.near_dead),
        "singular_values": {"every": step, "values": values[::step]},
        "full_rank": len(values),
        "effective_rank": None if spectrum is None else _known(spectrum.effective_rank),
        "rank_90": None if spectrum is None else spectrum.energy_rank(0.9),
        "rank_99": None if spectrum is None else spectrum.energy_rank(0.99),
        "best": None if best is None else best[0],
        "offers": [one for one in offers if one is not None],
        "curves": {method: _curve(curve) for method, curve in layer.curves.items()},
        "refused": dict(layer.refused),
        "notes": list(layer.notes),
    }


def _offer(found: Compressibility, layer: LayerSizes, method: str, point: Point | None) -> Document | None:
    if point is None:
        return None
    lost = found.lost_db(point.damage.value, layer.damage.value)
    return {
        "method": method,
        "setting": point.setting,
        "text": describe(layer, method, point.setting),
        "bytes": point.bytes,
        "saved": layer.bytes - point.bytes,
        "share": significant(point.bytes / layer.bytes),
        "kept_db": _db(point.damage.value),
        "confidence": point.damage.confidence,
        "lost_db": _known(lost),
        "bytes_per_db": _known(found.worth(layer, point)),
    }


def _curve(curve: Curve) -> Document:
    return {
        "settings": [point.setting for point in curve.points],
        "bytes": [point.bytes for point in curve.points],
        "predicted_db": [_db(point.damage.predicted) for point in curve.points],
        "measured_db": [_db(point.damage.measured) for point in curve.points],
    }


def _score(found: Compressibility, score: Score) -> Document | None:
    trial = score.trial
    if trial.all_layers:
        return None
    layer = found.by_name[trial.layer]
    lost = found.lost_db(score.damage, layer.damage.value)
    predicted, measured = _db(trial.predicted), _db(score.damage)
    return {
        "layer": layer.name,
        "method": trial.method,
        "text": describe(layer, *trial.choice[layer.name]),
        "share": significant(trial.share),
        "saved": trial.saved,
        "predicted_db": predicted,
        "measured_db": measured,
        "off_db": None if predicted is None or measured is None else round(predicted - measured, 2),
        "lost_db": _known(lost),
        "bytes_per_db": _known(found.bytes_per_db(trial.saved, lost)),
        "accuracy": _known(score.accuracy),
    }


def _together(found: Compressibility, trial: Trial) -> Document:
    score = next((one for one in found.scores if one.trial is trial), None)
    measured = nan if score is None else score.damage
    kept, base = kept_db(measured), kept_db(found.baseline)
    methods: dict[str, int] = {}
    for method, _ in trial.choice.values():
        methods[method] = methods.get(method, 0) + 1
    return {
        "bytes": found.bytes - trial.saved,
        "saved": trial.saved,
        "share": significant(trial.share),
        "predicted_db": _db(trial.predicted),
        "measured_db": _db(measured),
        "lost_db": _known(base - kept),
        "bytes_per_db": _known(found.bytes_per_db(trial.saved, base - kept)),
        "accuracy": None if score is None else _known(score.accuracy),
        "methods": methods,
        "choice": {name: [method, setting] for name, (method, setting) in trial.choice.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# In words


def tell_verdict(found: Compressibility) -> str:
    """What could be saved at what damage, in one sentence."""
    return "".join(text for text, _ in _sentence(found))


def _sentence(found: Compressibility) -> Sentence:
    layers = count(len(found.layers), "layer")
    base = f"In {found.bits} bits {layers} {'takes' if len(found.layers) == 1 else 'take'} {size(found.bytes)}"
    best = found.together
    kept = f"{kept_db(found.baseline):.1f} dB"
    if isinstance(best, Score):
        trial = best.trial
        how = f", measured on {count(found.samples, 'sample')}, instead of {kept}."
        return [
            (f"{base}; ", ""),
            (f"{size(trial.saved)} ({percent(trial.saved / found.bytes)}) of it could be saved", "strong"),
            (f", and the output keeps {kept_db(best.damage):.1f} dB{how}", ""),
        ]
    if isinstance(best, Trial):
        return [
            (f"{base}; ", ""),
            (f"{size(best.saved)} ({percent(best.saved / found.bytes)}) of it could be saved", "strong"),
            (f", and the output would keep {kept_db(best.predicted):.1f} dB instead of {kept}: ", ""),
            (f"{found.evidence}, not measured.", ""),
        ]
    if kept_db(found.baseline) < found.keep_db:
        why = f"the output keeps {kept} so, less than the {found.keep_db:g} dB that are to be left."
    else:
        why = f"no way is known to save more of it and to keep {found.keep_db:g} dB of the output."
    return [(f"{base}: {why}", "")]


def _details(found: Compressibility) -> list[str]:
    right = ""
    if isfinite(found.accuracy[0]):
        whole, rounded = (f"{100 * one:.1f} %" for one in found.accuracy)
        right = f"; {whole} of the samples are right in the model as it is, and {rounded} in {found.bits} bits"
    ranked = [layer for layer in found.ranked if found.best(layer) is not None]
    lines = [f"As it is, the model holds these weights in {size(found.stored_bytes)}{right}."]
    if ranked:
        named = listed_names([visible(layer.name) for layer in ranked], most=3)
        lines.append(f"Most bytes for each dB: {named}.")
    else:
        lines.append(f"No layer alone can be made smaller within {found.keep_db:g} dB.")
    how = (
        f"Curves are {found.evidence}, from {count(found.passes, 'backward pass')}".replace("passs", "passes")
        if found.passes
        else "Nothing is predicted"
    )
    lines.append(f"{how}; {count(len(found.scores), 'score')} of {len(found.trials):,} measured, by making the change.")
    return [*lines, *found.notes]


def tell_state(document: Document) -> str:
    """How far the measuring is."""
    progress = document["progress"]
    done = f"{progress['done']:,} of {count(progress['total'], 'score')} measured"
    left = progress["remaining_seconds"]
    return {
        "predicted": f"Nothing is measured yet: {count(progress['total'], 'score')} to go.",
        "running": f"{done}; {'about ' + in_time(left) + ' to go' if left is not None else 'just begun'}.",
        "complete": f"{done}.",
        "interrupted": f"Interrupted: {done}; what is here is final, and the rest is predicted only.",
        "out of time": f"The time was up: {done}; what is here is final, and the rest is predicted only.",
    }[progress["state"]]


def in_time(seconds: float) -> str:
    """``45 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def in_db(value: float | None, signs: int = 1) -> str:
    """``30.1``, with a minus sign that is one."""
    return "all" if value is None else f"{value:.{signs}f}".replace("-", "−")


# ---------------------------------------------------------------------------------------------------------------------
# Forms


class CompressibilityReport(DocumentReport):
    """The page, the JSON and the Markdown of one state of the findings; made by :meth:`qvis.Compressibility.write`."""

    def __init__(self, found: Compressibility) -> None:
        super().__init__(summarize(found))

    def to_html(self) -> str:
        """The page."""
        return render_html(self.document)

    def to_markdown(self) -> str:
        """The summary for a pull request: verdict first, ten layers, the rest folded away."""
        return render_markdown(self.document)


def render_html(document: Document) -> str:
    """The page."""
    plain = jsonable(document)
    return render_page(
        "compressibility.html.jinja",
        plain,
        styles=STYLES,
        scripts=SCRIPTS,
        data={"payload": json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()},
        ranked=sorted(plain["layers"], key=lambda layer: layer["rank"]),
        state=tell_state(plain),
        written=datetime.now(timezone.utc).strftime("%H:%M:%S UTC") if plain["progress"]["state"] == "running" else "",
        size=size,
        db=in_db,
        per_db=_per_db,
        told=percent,
        most=ROWS,
        free_db=FREE_DB,
        unreliable=round(100 * UNRELIABLE),
        thresholds=Thresholds(),
    )


def _per_db(row: Document) -> str:
    """Bytes for each dB, or that they cost nothing."""
    if row["lost_db"] is None:
        return "n/a"
    return "free" if row["lost_db"] < FREE_DB else size(row["bytes_per_db"])


def render_markdown(document: Document) -> str:
    """The summary for a pull request: verdict first, ten layers, the rest folded away."""
    document = jsonable(document)
    lines = [
        f"<!-- qvis {document['qvis']} -->",
        f"## {code(document['model']['name'])}: compressibility",
        "",
        f"**{prose(''.join(text for text, _ in document['verdict']['sentence']))}**",
        "",
        " ".join(prose(text) for text in [*document["verdict"]["details"][:2], tell_state(document)]),
        "",
    ]
    rows = [_markdown_row(layer) for layer in sorted(document["layers"], key=lambda layer: int(layer["rank"]))]
    head = [
        "| Layer | Kind | Now | Best way | Then | Keeps | Per dB |",
        "| --- | --- | --: | --- | --: | --: | --: |",
    ]
    lines += [*head, *rows[:TOLD]]
    if len(rows) > TOLD:
        lines += ["", f"<details><summary>{count(len(rows) - TOLD, 'more layer')}</summary>", ""]
        lines += [*head, *rows[TOLD:ROWS], "", "</details>"]
    return "\n".join(lines) + "\n"


def _markdown_row(layer: Document) -> str:
    name, kind, now = code(layer["name"]), code(layer["op"]), size(layer["bytes"])
    best = next((one for one in layer["offers"] if one["method"] == layer["best"]), None)
    if best is None:
        return f"| {name} | {kind} | {now} | none | | | |"
    sign = "" if best["confidence"] == "measured" else " (predicted)"
    way = f"{METHODS[best['method']]}, {best['text']}"
    cells = (name, kind, now, way, size(best["bytes"]), f"{in_db(best['kept_db'])} dB{sign}", _per_db(best))
    return f"| {' | '.join(cells)} |"


def tell_lines(document: Document) -> list[str]:
    """For a terminal: what the model is, the verdict, and how it was found."""
    sentence = "".join(text for text, _ in document["verdict"]["sentence"])
    lines = [f"{document['model']['name']}: compressibility", sentence, *document["verdict"]["details"]]
    return [visible(line) for line in [*lines, tell_state(document)]]


def tell_rows(document: Document) -> list[tuple[str, ...]]:
    """For a terminal: of each layer its name, bytes, best way, bytes then, dB kept, bytes for each dB.

    Without a sign dB are measured; ~ predicted, and ? maybe far off.
    """
    rows: list[tuple[str, ...]] = []
    for layer in sorted(document["layers"], key=lambda layer: int(layer["rank"])):
        best = next((one for one in layer["offers"] if one["method"] == layer["best"]), None)
        cells = ("none", "", "", "")
        if best is not None:
            sign = "" if best["confidence"] == "measured" else "?" if best["confidence"] == "low" else "~"
            kept = f"{in_db(best['kept_db'])}{sign}"
            cells = (f"{best['method']}, {best['text']}", size(best["bytes"]), kept, _per_db(best))
        rows.append((visible(layer["name"]), size(layer["bytes"]), *cells))
    return rows
