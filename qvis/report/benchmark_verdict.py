"""What a benchmark comes to, in one sentence and in those that back it, and the words for its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from qvis.report.cells import shorten
from qvis.report.document import Sentence, plain
from qvis.words import count, listed_names, percent, short, size, visible

Document = Mapping[str, Any]
ENOUGH = 0.01
"""By so much top-1 may fall, or so many samples be answered differently, for a model to be called good enough."""
NAME = 60
"""Characters of a model's name in a sentence."""
FIRST = 3
"""Details that stand right below the verdict."""
OTHERS = 3
"""Other batch sizes and threads that are told of."""


def find_verdict(document: Document) -> dict[str, Any]:
    """The verdict; ``document`` is all else."""
    variants = document["variants"]
    if not variants:
        sentence: Sentence = [("No model was measured.", "")]
        return {"sentence": sentence, "text": plain(sentence), "details": list(document["notes"]), "first": FIRST}
    baseline = variants[0] if document["has_baseline"] and len(variants) > 1 else None
    place, start = _choose(document)
    chosen = variants[place]
    evidence = document["evidence"]
    sentence = [
        (f"{evidence[:1].upper()}{evidence[1:]}: {start}", ""),
        (name(chosen), "strong"),
        ("," if start else "", ""),
        *_join([_tell_bytes(chosen, baseline), _tell_time(chosen, baseline), _tell_answers(chosen, document)]),
        *_tell_right(chosen, baseline),
        (".", ""),
    ]
    engines = _tell_engines(chosen, baseline)
    details = [*engines, *_details(document, chosen, baseline)]
    first = FIRST + len(engines)
    return {"variant": place, "sentence": sentence, "text": plain(sentence), "details": details, "first": first}


def name(variant: Document) -> str:
    """What a model is called in a sentence."""
    return shorten(visible(variant["name"]), NAME)


def _choose(document: Document) -> tuple[int, str]:
    """The place of the model that the verdict tells of, and how it was chosen: the smallest that is good enough."""
    variants = document["variants"]
    baseline = variants[0] if document["has_baseline"] else None
    places = list(range(len(variants)))[1 if baseline is not None and len(variants) > 1 else 0 :]
    if len(places) == 1:
        return places[0], ""

    def weight(place: int) -> float:
        one = variants[place]
        return float(one["share_of_bytes"] if known(one["share_of_bytes"]) else stored(one))

    losses = {place: loss for place in places if (loss := _loss(variants[place], baseline)) is not None}
    total = count(len(places), "model")
    if not losses:
        return min(places, key=weight), f"of {total} the smallest, "
    good = [place for place, loss in losses.items() if loss <= ENOUGH + 1e-9]
    labelled = baseline is not None and share(baseline, "top1") is not None
    limit = "within one point of the baseline’s top-1" if labelled else "with 99 % of the baseline’s answers"
    if not good:
        return min(losses, key=losses.__getitem__), f"of {total} none is {limit}; the closest, "
    return min(good, key=weight), f"of {total} the smallest {limit}, "


def _loss(variant: Document, baseline: Document | None) -> float | None:
    """The share of answers that a model loses; None where it is not known."""
    if baseline is None:
        return None
    before, now, agreement = share(baseline, "top1"), share(variant, "top1"), share(variant, "agreement")
    if before is not None and now is not None:
        return before - now
    return None if agreement is None else 1 - agreement


def _join(clauses: list[Sentence]) -> Sentence:
    """``takes a``, ``b`` and ``c``."""
    clauses = [clause for clause in clauses if clause]
    found: Sentence = []
    for i, clause in enumerate(clauses):
        link = " " if i == 0 else " and " if i == len(clauses) - 1 else ", "
        found += [(link, ""), *clause]
    return found or [(" was opened", "")]


def _tell_bytes(variant: Document, baseline: Document | None) -> Sentence:
    if baseline is None or not known(variant["share_of_bytes"]):
        return [("takes ", ""), (size(stored(variant)), "strong")]
    what = "of the bytes" if variant["bytes_compared"] == "file" else "of the bytes for its parameters"
    return [("takes ", ""), (f"{percent(variant['share_of_bytes'])} {what}", "strong")]


def _tell_time(variant: Document, baseline: Document | None) -> Sentence:
    """How long a call takes, at the first batch size and number of threads, and where engines differ that they do."""
    if variant["simulated"]:
        return [("was not timed since it only simulates integers", "watch")]
    if not variant["latencies"]:
        return []
    first = variant["latencies"][0]
    at, ratio = tell_point(first), first["ratio"]
    if ratio is None or not known(ratio["value"]):
        return [(tell_time(first["median_s"]), "strong"), (f" a call ({at})", "")]
    if baseline is not None and not _share_engine(variant, baseline):
        at = f"{at}, another engine"
    between = tell_interval(ratio)
    judged = judge(ratio)
    figure = f"{tell_ratio(ratio['value'])} times the time"
    if judged == "unsure":
        return [(figure, "strong"), (f" ({at}; too few calls to be sure)", "")]
    if judged == "same":
        return [("is no faster", "watch"), (f" ({figure}, {between}; {at})", "")]
    return [(figure, "strong" if judged == "faster" else "watch"), (f" ({at}; {between})", "")]


def _tell_answers(variant: Document, document: Document) -> Sentence:
    answers = variant["answers"]
    if answers is not None and answers["same"] is not None:
        reference = "float" if is_float(document["variants"][0]) else "the baseline"
        return [(f"answers {answers['same']:,} of {document['samples']:,} as {reference}", "")]
    if variant["identical"]:
        return [("has identical outputs", "")]
    if known(variant["sqnr_db"]):
        return [(f"keeps {tell_db(variant)} of the output", "")]
    return []


def _tell_right(variant: Document, baseline: Document | None) -> Sentence:
    now, before = share(variant, "top1"), None if baseline is None else share(baseline, "top1")
    if now is None:
        return []
    if before is None:
        return [(f"; top-1 {tell_share(now)}", "")]
    if now == before:
        return [(f"; top-1 {tell_share(now)} as before", "")]
    style = "watch" if before - now > ENOUGH + 1e-9 else ""
    return [("; ", ""), (f"top-1 {tell_share(now)}", style), (f" instead of {tell_share(before)}", "")]


def _share_engine(one: Document, other: Document) -> bool:
    """Whether both run in the same engine; what it computes with there is what quantizing changes."""
    return bool(one["engine"].partition(",")[0] == other["engine"].partition(",")[0])


def _tell_engines(chosen: Document, baseline: Document | None) -> list[str]:
    """What is to be known of a comparison of times where engines differ."""
    if baseline is None or _share_engine(chosen, baseline) or not (chosen["latencies"] and baseline["latencies"]):
        return []
    engines = f"{visible(chosen['engine'])} runs it, {visible(baseline['engine'])} the baseline"
    return [f"{engines}: times tell of the engines as well."]


def _details(document: Document, chosen: Document, baseline: Document | None) -> Iterator[str]:
    yield _sizes(chosen, baseline)
    contents = chosen["contents"]
    if contents is not None and known(contents["integer_operations"]):
        yield tell_operations(contents)
    if known(chosen["sqnr_db"]) or chosen["identical"]:
        yield f"The output keeps {tell_db(chosen)}." if not chosen["identical"] else "The outputs are identical."
    others = [one for one in chosen["latencies"][1:] if one["ratio"] is not None and known(one["ratio"]["value"])]
    if others:
        told = [f"{tell_ratio(one['ratio']['value'])} ({tell_point(one)})" for one in others[:OTHERS]]
        more = [f"{len(others) - OTHERS} more below"] * (len(others) > OTHERS)
        yield f"Times the baseline’s with other batches and threads: {', '.join([*told, *more])}."
    if chosen["peak_bytes"] is not None and baseline is not None and baseline["peak_bytes"] is not None:
        yield f"Opening and running it takes {size(chosen['peak_bytes'])}, the baseline {size(baseline['peak_bytes'])}."
    for one in untimed(document):
        yield f"{name(one)} was not timed: {sentence(one['simulated'])}"
    yield from document["notes"]


def _sizes(variant: Document, baseline: Document | None) -> str:
    def told(key: str) -> str:
        instead = f" instead of {size(baseline[key])}" if baseline is not None and baseline[key] is not None else ""
        return f"{size(variant[key])}{instead}"

    text = f"Its parameters take {told('parameter_bytes')}"
    if variant["file_bytes"] is not None:
        text = f"The file has {told('file_bytes')}; its parameters take {told('parameter_bytes')}"
    contents = variant["contents"]
    if contents is not None and known(contents["integer_bytes"]):
        text += f", {percent(contents['integer_bytes'])} of them integers"
    return f"{text}."


def tell_operations(contents: Document) -> str:
    """How many operations compute in integers, and which do not."""
    kinds = contents["operations"]
    integer, computing = kinds["integer"], kinds["integer"] + kinds["hybrid"] + kinds["float"]
    if integer == computing:
        return f"All {count(computing, 'operation')} that compute do so in integers."
    if not integer:
        text = f"None of {count(computing, 'operation')} that compute does so in integers"
        hybrid = kinds["hybrid"]
        if hybrid:
            text += f"; {'all' if hybrid == computing else hybrid} of them have integer weights and take floats"
        return f"{text}."
    left = listed_names([visible(one["operation"]) for one in contents["leftovers"]])
    return f"{integer:,} of {count(computing, 'operation')} that compute do so in integers, all but {left}."


# ------------------------------------------------------------------------------------------------------------- words


def known(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and isfinite(value)


def stored(variant: Document) -> int:
    """Bytes of the file, or of the parameters where there is none."""
    bytes_: int = variant["parameter_bytes"] if variant["file_bytes"] is None else variant["file_bytes"]
    return bytes_


def share(variant: Document, which: str) -> float | None:
    """``top1``, ``top5`` or ``agreement``; None where it is not known."""
    found: float | None = None if variant["answers"] is None else variant["answers"][which]
    return found


def is_float(variant: Document) -> bool:
    """Whether a file is known to compute with floats alone."""
    contents = variant["contents"]
    if contents is None:
        return False
    kinds, integers = contents["operations"], contents["integer_bytes"]
    # shapes and indices are integers in any file
    return kinds["float"] > 0 and kinds["integer"] + kinds["hybrid"] == 0 and not (known(integers) and integers > 0.05)


def untimed(document: Document) -> list[Document]:
    """The models that only simulate integers."""
    return [one for one in document["variants"] if one["simulated"]]


def judge(ratio: Document) -> str:
    """``faster`` or ``slower`` where the interval leaves out 1, else ``same``; ``unsure`` without an interval."""
    if not (known(ratio["low"]) and known(ratio["high"])):
        return "unsure"
    return "faster" if ratio["high"] < 1 else "slower" if ratio["low"] > 1 else "same"


def tell_ratio(value: float) -> str:
    """``0.44``, ``0.013``, ``12.5``: two decimals, or where they are too few or too many some digits."""
    if value < 0.095:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else short(value)


def tell_interval(ratio: Document) -> str:
    """``0.41 to 0.47``."""
    return f"{tell_ratio(ratio['low'])} to {tell_ratio(ratio['high'])}"


def tell_point(point: Any) -> str:
    """``batch 1, 1 thread``."""
    return f"batch {point['batch']:,}, {count(point['threads'], 'thread')}"


def tell_time(seconds: float) -> str:
    """A time in three digits: ``123 µs``, ``12.3 ms``, ``1.23 s``."""
    if not isfinite(seconds):
        return "n/a"
    rounded = float(f"{seconds:.3g}")
    if rounded >= 1:
        return f"{short(seconds)} s"
    return f"{short(1e3 * seconds)} ms" if rounded >= 1e-3 else f"{short(1e6 * seconds)} µs"


def tell_share(value: float) -> str:
    """``98.3 %``."""
    return f"{100 * value:.1f} %"


def tell_db(found: Document) -> str:
    """``32.1 dB``, ``identical`` where nothing differs, ``n/a`` where it is not known."""
    if found["identical"]:
        return "identical"
    return f"{found['sqnr_db']:.1f} dB".replace("-", "−") if known(found["sqnr_db"]) else "n/a"


def tell_points(difference: float) -> str:
    """A difference of shares: ``−1.2 points``."""
    return f"{100 * difference:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def sentence(text: str) -> str:
    """``text`` with a period at its end."""
    text = visible(text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
