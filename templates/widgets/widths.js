// Which mix of widths is shown: the chart of all of them, the figures beside it, and the picture of the layers.
const widths = await (async () => {
  const {document: report, columns} = await unpack("payload").then((response) => response.json());
  const {layers, grids, sizes, uniform, verified} = report, rest = sizes.rest_bytes, listeners = [];
  const isKnown = (value) => value !== null && Number.isFinite(value);
  const same = (a, b) => a.grids.every((grid, i) => grid === b.grids[i]);
  // all mixes by size; where the chosen one is on the frontier too it is there once
  const mixes = [report.chosen, ...report.frontier.filter((mix) => !same(mix, report.chosen))].sort((a, b) => a.bytes - b.bytes || a.average_bits - b.average_bits);
  const chosen = mixes.indexOf(report.chosen);
  let at = chosen;

  const db = (value) => isKnown(value) ? `${value.toFixed(1).replace("-", "−")} dB` : value === null ? "n/a" : "all";
  const {size} = words;
  const kept = (mix) => mix.measured_db ?? mix.predicted_db;
  const sure = (mix) => mix.measured_db === null ? "predicted" : `measured, ± ${mix.measured_spread_db.toFixed(1)}`;
  const sharing = (granularity) => typeof granularity === "number" ? `groups of ${granularity}` : `per ${granularity}`;
  const apart = (by) => Math.abs(by).toFixed(1) === "0.0" ? "as much" : `${Math.abs(by).toFixed(1)} dB ${by < 0 ? "less" : "more"}`;
  const common = (mix) => `int${Math.round(mix.average_bits)}`;

  // What one width for all layers keeps at a size, as qvis.analysis.widths.interpolate has it.
  function uniformAt(bytes) {
    const known = uniform.filter((mix) => isKnown(mix.measured_db)), above = known.findIndex((mix) => mix.bytes >= bytes);
    if (above < 0 || (above === 0 && known[0].bytes > bytes)) return null;
    const [a, b] = [known[Math.max(0, above - 1)], known[above]];
    return b.bytes === a.bytes ? b.measured_db : a.measured_db + (b.measured_db - a.measured_db) * (bytes - a.bytes) / (b.bytes - a.bytes);
  }

  // ------------------------------------------------------------------------------------------ the chart
  const host = $("[data-test=frontier]");
  function draw() {
    const largest = Math.max(...[...mixes, ...uniform].map((mix) => mix.bytes)) + rest;
    const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "bytes"]].find(([limit]) => largest >= limit) ?? [1, "bytes"];
    const x = (mix) => (mix.bytes + rest) / unit;
    const tell = (mix, what) => `${what}: ${mix.average_bits.toFixed(2)} bits on average, ${size(mix.bytes + rest)}\n${[isKnown(mix.measured_db) && `${db(mix.measured_db)} ${sure(mix)}`, isKnown(mix.predicted_db) && `${db(mix.predicted_db)} predicted`].filter(Boolean).join(", ")}`;
    const on = mixes[at], label = (i) => i === chosen ? "chosen mix" : "best mix";
    const dots = mixes.map((mix, i) => [mix, i]).filter(([mix, i]) => i !== chosen && isKnown(mix.measured_db));
    chart(host, {
      height: narrow.matches ? 260 : 320,
      x: {label: `size of the model, ${name} (${size(sizes.float_bytes)} in float)`},
      y: {label: "dB of the output kept"},
      label: `What the output keeps by the size of the model. The chosen mix: ${db(kept(report.chosen))} at ${size(sizes.bytes)}. One width for all layers: ${uniform.map((mix) => `${db(mix.measured_db)} at ${size(mix.bytes + rest)} (${common(mix)})`).join(", ")}. The numbers stand below.`,
      onpick: show,
      series: [
        {name: "best mixes, predicted", kind: "line", points: mixes.filter((mix) => isKnown(mix.predicted_db)).map((mix) => [x(mix), mix.predicted_db])},
        {kind: "dots", size: 0, points: mixes.map((mix, i) => [x(mix), mix.predicted_db ?? mix.measured_db, tell(mix, label(i)), i])},
        {name: "measured", kind: "dots", points: dots.map(([mix, i]) => [x(mix), mix.measured_db, tell(mix, label(i)), i])},
        {kind: "line", style: "dotted", colour: "stem", points: uniform.map((mix) => [x(mix), mix.measured_db])},
        ...uniform.map((mix, i) => ({name: i ? undefined : "one width for all layers, measured", kind: "dots", style: "open", colour: "stem", mark: common(mix), points: [[x(mix), mix.measured_db, tell(mix, `${common(mix)} for all layers`)]]})),
        {name: "the chosen mix", kind: "dots", size: 6, colour: "problem", mark: "chosen", points: [[x(report.chosen), kept(report.chosen), tell(report.chosen, "chosen mix"), chosen]]},
        ...(at === chosen ? [] : [{name: "shown", kind: "dots", size: 7, style: "open", colour: "ink", points: [[x(on), kept(on), tell(on, "shown"), at]]}]),
      ],
    });
  }

  // ------------------------------------------------------------------------------------------ the figures
  const slider = $("#what-if"), back = $("[data-test=back]");
  function figure(name, text, remark) {
    const cell = $(`[data-figure=${name}] dd`);
    if (!cell) return;
    $("b", cell).textContent = text;
    $("small", cell).textContent = remark;
  }
  const firstly = Object.fromEntries($$("[data-figure]").map((one) => [one.dataset.figure, [$("b", one).textContent, $("small", one).textContent]]));
  function tell() {
    const mix = mixes[at], bytes = mix.bytes + rest, other = uniformAt(mix.bytes);
    $("[data-test=mix-title]").textContent = at === chosen ? "The chosen mix" : "Another mix";
    if (at === chosen) for (const [name, texts] of Object.entries(firstly)) figure(name, ...texts);
    else {
      const gain = other === null ? "none takes as many bytes" : `the mix keeps ${apart(kept(mix) - other)}`;
      figure("average", `${mix.average_bits.toFixed(2)} bits`, "scales not counted");
      figure("size", size(bytes), `${Math.round(100 * bytes / sizes.float_bytes)}\u00a0% of ${size(sizes.float_bytes)} in float`);
      figure("kept", db(kept(mix)), sure(mix));
      figure("uniform", db(other), gain);
      figure("accuracy", mix.accuracy ? `${(100 * mix.accuracy.share).toFixed(1)}\u00a0%` : "n/a", mix.accuracy ? "" : "not counted for this mix");
    }
    const change = bytes / sizes.bytes - 1;
    $("[data-test=change]").textContent = at === chosen ? `${words.count(mixes.length, "mix").replace(/s$/, "es")} to look at.`
      : `${Math.abs(100 * change).toFixed(0)}\u00a0% ${change < 0 ? "smaller" : "larger"} than the chosen mix, ${apart(kept(mix) - verified.sqnr_db)}.`;
    back.hidden = at === chosen;
    slider.value = at;
    slider.setAttribute("aria-valuetext", `${mix.average_bits.toFixed(2)} bits on average, ${size(bytes)}, ${db(kept(mix))} ${sure(mix)}`);
    $("[data-action=smaller]").disabled = at === 0;
    $("[data-action=larger]").disabled = at === mixes.length - 1;
  }

  // ------------------------------------------------------------------------------------------ the picture
  const bars = $$(".strip > li"), highest = Math.max(...grids.map((grid) => grid.bits));
  function paint() {
    const mix = mixes[at], count = new Map(), weights = new Map();
    bars.forEach((bar, i) => {
      const {bits} = grids[mix.grids[i]];
      count.set(bits, (count.get(bits) ?? 0) + 1);
      weights.set(bits, (weights.get(bits) ?? 0) + layers[i].weights);
      if (+bar.dataset.bits === bits) return;
      bar.dataset.bits = bits;
      bar.style.setProperty("--h", `${100 * bits / highest}%`);
      bar.title = `${words.visible(layers[i].name)}: ${bits} bits`;
      const label = $("b", bar);
      if (label) label.textContent = bits;
    });
    const whole = Math.max(1, report.model.weights);
    $("[data-test=widths]").textContent = [...count.keys()].sort((a, b) => b - a).map((bits) => `${bits} bits: ${words.count(count.get(bits), "layer")} with ${Math.round(100 * weights.get(bits) / whole)}\u00a0% of the weights`).join("; ") + ".";
  }

  let asked;
  function show(index) {
    at = Math.max(0, Math.min(mixes.length - 1, index));
    tell();
    cancelAnimationFrame(asked);                                       // a slider asks more often than a table can answer
    asked = requestAnimationFrame(() => { paint(); draw(); for (const listen of listeners) listen(mixes[at]); });
  }
  slider.max = mixes.length - 1;
  slider.addEventListener("input", () => show(+slider.value));
  $("[data-test=what-if]").hidden = mixes.length < 2;
  Object.assign(frame.actions, {smaller: () => show(at - 1), larger: () => show(at + 1), chosen: () => show(chosen)});
  tell();
  draw();

  return {report, columns, layers, grids, mixes, isKnown, db, size, sharing, kept, sure, listeners, mix: () => mixes[at], isChosen: () => at === chosen, highest};
})();
