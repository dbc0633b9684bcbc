// The rows, the panel of the selected layer, downloads, and a page that is written again while scores are measured.
const found = await unpack("payload").then((response) => response.json());
const layers = [...found.layers].sort((a, b) => a.rank - b.rank);              // as the rows are
const table = (() => {
  const rising = (column, head) => !head.classList.contains("less");      // sizes with the largest, dB with the least lost
  const list = listing({then: () => detail.place()});
  sorting(list.body, list.heads, {down: rising, then() { $("#layers-title").textContent = "Layers"; detail.place(); }});
  sorting($("#scores tbody"), $$("#scores thead th"), {down: rising, then: () => { $("#scores-order").textContent = ""; }});
  return list;
})();

const detail = (() => {
  const STYLES = {coding: ["accent", "solid"], rounding: ["accent", "dashed"], weights: ["better", "solid"], pattern: ["better", "open"], channels: ["watch", "dashed"], rank: ["unusable", "dotted"]};
  const name = (method) => found.methods[method];
  const kept = (db) => db === null ? "all" : `${db.toFixed(1).replace("-", "−")} dB`;
  const sign = (offer) => ({measured: "•", low: "?"}[offer.confidence] ?? "±");
  const perDb = (offer) => offer.lost_db === null ? "n/a" : offer.lost_db < .01 ? "free" : words.size(Math.round(offer.bytes_per_db));

  const what = {coding: (s) => `${s} bits`, rounding: (s) => `${s} bits`, weights: (s, l) => `${s.toLocaleString("en")} of ${words.count(l.weights, "weight")}`, channels: (s, l) => `${s} of ${words.count(l.channels, "channel")}`, rank: (s, l) => `rank ${s} of ${l.full_rank}`};
  what.pattern = what.weights;

  function drawCurves(layer) {
    const series = [];
    for (const [method, curve] of Object.entries(layer.curves)) {
      const [colour, style] = STYLES[method], points = curve.bytes.map((bytes, i) => {
        const text = `${name(method)}, ${what[method](curve.settings[i], layer)}\n${words.size(bytes)} (${words.percent(bytes / layer.bytes)})\npredicted: ${curve.predicted_db[i] === null ? "n/a" : kept(curve.predicted_db[i])}${curve.measured_db[i] === null ? "" : `\nmeasured: ${kept(curve.measured_db[i])}`}`;
        return [100 * bytes / layer.bytes, curve.predicted_db[i], text, curve.measured_db[i]];
      }).filter((p) => p[0] <= 112);
      const single = points.length < 2;
      const predicted = points.filter((p) => p[1] !== null).map((p) => p.slice(0, 3));
      if (predicted.length) series.push({name: name(method), kind: single ? "dots" : "line", points: predicted, colour, style: single ? "open" : style});
      const measured = points.filter((p) => p[3] !== null).map((p) => [p[0], p[3], p[2]]);
      if (measured.length) series.push({kind: "dots", points: measured, colour, ...(predicted.length ? {} : {name: name(method)})});
    }
    series.push({kind: "rows", points: [[0, found.keep_db, ""]], colour: "ink-3"});
    const high = Math.max(found.keep_db + 10, ...series.flatMap((s) => s.points.map((p) => p[1])));
    chart($("[data-test=curves]"), {x: {label: `bytes left, % of those in ${found.bits} bits`, low: 0, high: 112, ticks: [0, 25, 50, 75, 100]}, y: {label: "dB of the output kept", low: 0, high: Math.ceil(high / 10) * 10}, height: 300, label: `Size against damage of ${layer.name}`, series});
  }

  function drawSpectrum(layer) {
    const none = layer.effective_rank === null, {every, values} = layer.singular_values;
    $("[data-test=ranks]").textContent = none ? layer.refused.rank : `Effective rank ${layer.effective_rank.toFixed(1)} of ${layer.full_rank}; ${layer.rank_90} keep 90\u00a0% of the energy, ${layer.rank_99} keep 99\u00a0%.`;
    $("[data-test=spectrum]").hidden = none;
    if (none) return;
    const points = values.map((value, i) => [1 + i * every, value, `${1 + i * every}: ${words.number(value)}`]).filter((p) => p[1] > values[0] * 1e-7);
    const marks = [[layer.effective_rank, "effective rank", "accent"], [layer.rank_99, "99 %", "watch"]];
    chart($("[data-test=spectrum]"), {x: {label: "singular value", low: 0, high: Math.max(2, layer.full_rank)}, y: {log: true}, height: 180, label: `Singular values of ${layer.name}`, series: [{kind: "line", points}, ...marks.map(([at, name, colour]) => ({name, kind: "rules", colour, points: [[at, 0, `${name}: ${+at.toFixed(1)}`]]}))]});
  }

  function drawEntropies(layer) {
    const points = Object.entries(layer.entropies).map(([bits, entropy]) => [+bits - .35, entropy, `${bits} bits: ${entropy.toFixed(2)} for each code`, undefined, +bits + .35]);
    const most = Math.max(...points.map((p) => p[4]));
    chart($("[data-test=entropies]"), {x: {label: "bits", low: 1.5, high: most + .2, ticks: points.map((p) => p[0] + .35)}, y: {low: 0, high: Math.ceil(most)}, height: 140, label: `Entropy of the codes of ${layer.name}`, series: [{kind: "bars", points}, {name: "as many as there are", kind: "line", style: "dotted", colour: "ink-3", points: points.map((p) => [p[0] + .35, p[0] + .35, ""])}]});
  }

  function cells(line, ...texts) { texts.forEach(([text, number]) => line.append(element("td", text, number ? "num" : ""))); }

  function tabulate(layer) {
    const offers = new Map(layer.offers.map((offer) => [offer.method, offer]));
    $("[data-test=offers] tbody").replaceChildren(...Object.keys(found.methods).map((method) => {
      const line = element("tr"), head = element("th", name(method)), offer = offers.get(method);
      head.scope = "row";
      line.append(head);
      if (offer) cells(line, [offer.text], [words.size(offer.bytes), 1], [words.percent(offer.share), 1], [`${kept(offer.kept_db)} ${sign(offer)}`, 1], [perDb(offer), 1]);
      else {
        const cell = element("td", layer.refused[method] ?? "none within it", "none");
        cell.colSpan = 5;
        line.append(cell);
      }
      return line;
    }));
  }

  function tell(layer) {
    const named = (channels) => `${channels.slice(0, 12).join(", ")}${channels.length > 12 ? ` and ${channels.length - 12} more` : ""}`;
    const lines = [];
    if (layer.dead.length) lines.push(`${words.count(layer.dead.length, "channel")} dead: ${named(layer.dead)}.`);
    if (layer.near_dead.length) lines.push(`${words.count(layer.near_dead.length, "channel")} near dead: ${named(layer.near_dead)}.`);
    if (layer.zeros) lines.push(`${words.count(layer.zeros, "weight")} (${words.percent(layer.zeros / layer.weights)}) round to zero in ${found.bits} bits.`);
    for (const note of layer.notes) lines.push(`${words.visible(note)}.`);
    $("[data-test=findings]").replaceChildren(...lines.map((line) => element("p", line)));
  }

  Object.assign(frame.actions, {
    csv() { frame.save("compressibility.csv", frame.csv(found.layers.flatMap((layer) => Object.entries(layer.curves).flatMap(([method, curve]) => curve.settings.map((setting, i) => ({layer: words.visible(layer.name), method, setting, bytes: curve.bytes[i], "of bytes": layer.bytes, "predicted dB": curve.predicted_db[i], "measured dB": curve.measured_db[i]}))))), "text/csv"); },
    json() { frame.save("compressibility.json", JSON.stringify(found, null, 1), "application/json"); },
    markdown() {
      const lines = table.visible().map((row) => {
        const layer = layers[row.dataset.i], best = layer.offers.find((offer) => offer.method === layer.best);
        return [frame.escape(layer.name), frame.escape(layer.op), words.size(layer.bytes), ...(best ? [`${name(best.method)}, ${best.text}`, words.size(best.bytes), `${kept(best.kept_db)} ${sign(best)}`, perDb(best)] : ["none", "", "", ""])];
      });
      frame.copyLayers(found.verdict.sentence.map(([text]) => text).join(""), [["layer"], ["op"], ["now", true], [`best way within ${found.keep_db} dB`], ["then", true], ["keeps", true], ["per dB", true]], lines);
    },
  });

  return choosing(layers, table, {
    tell(layer) {
      $("#detail-name").textContent = words.visible(layer.name);
      $("[data-test=detail-meta]").textContent = `${layer.op} ${layer.shape.join("×")}, ${words.count(layer.weights, "weight")}, ${words.size(layer.bytes)} in ${found.bits} bits, which alone keep ${kept(layer.kept_db)}`;
      tell(layer); tabulate(layer); drawCurves(layer); drawSpectrum(layer); drawEntropies(layer);
    },
  });
})();

// While scores are measured the page is written anew: load it, and come back to the same place.
const renewal = (() => {
  const {search} = table, KEY = `qvis-place ${location.pathname}`;
  function remember() { try { sessionStorage.setItem(KEY, JSON.stringify([scrollY, search.value])); } catch { /* a file:// page may have no storage */ } }
  function recall() {
    try {
      const place = JSON.parse(sessionStorage.getItem(KEY) ?? "null");
      sessionStorage.removeItem(KEY);
      if (!place) return;
      search.value = place[1];
      table.filter();
      requestAnimationFrame(() => scrollTo(0, place[0]));
    } catch { /* the same */ }
  }
  function watch() {
    if ($("[data-test=progress]").dataset.state !== "running") return;
    setTimeout(() => { if ($("dialog").open || document.activeElement === search) watch(); else { remember(); location.reload(); } }, 3000);
  }
  return {recall, watch};
})();

frame.showTheme();
await frame.start(detail.start());
root.classList.add("all");
renewal.recall();
renewal.watch();
