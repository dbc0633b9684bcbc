// The panel of the selected layer: answers, its weights with the levels of the grids that are drawn, all its grids.
const detail = (() => {
  const channel = $("[data-test=channel]"), log = $("[data-test=log]"), MOST_DRAWN = 4;
  const COLOURS = ["accent", "problem", "better", "unusable"];
  let results = [], drawn = [];

  function tell(layer) {
    $("#detail-name").textContent = words.visible(layer.name);
    const shape = layer.shape.join("×") || "scalar";
    const some = layer.rows < layer.channels && `tried on ${layer.rows.toLocaleString("en")} of ${words.count(layer.channels, "channel")}, evenly spaced by their largest weight`;
    const bad = layer.nonfinite > 0 && `${words.count(layer.nonfinite, "weight")} NaN or infinite, which count for nothing`;
    $("[data-test=detail-meta]").textContent = [`${layer.op} ${shape} ${layer.dtype}`, `${layer.channels.toLocaleString("en")} channels of ${words.count(layer.elements, "weight")}`, some, bad, `layer ${chosen.selected() + 1} of ${grids.layers.length}`].filter(Boolean).join(", ");
    const lines = layer.answers.map((answer) => {
      const line = element("p");
      line.append(element("b", answer.question), ` ${answer.short[0].toUpperCase()}${answer.short.slice(1)}: `, words.unbroken(answer.text));
      return line;
    });
    if (grids.ran && layer.why_no_damage) lines.push(element("p", `Judged by the SQNR of its weights: ${layer.why_no_damage}.`, "note"));
    $("[data-test=findings]").replaceChildren(...lines);
  }

  // ------------------------------------------------------------------------------------------ weights and levels
  function list(layer) {
    const last = layer.shown.length - 1;
    channel.replaceChildren(...layer.shown.map(([number], part) => {
      const option = element("option", number === null ? "all channels" : `channel ${number}${last > 1 ? {1: ", the narrowest", [last]: ", the widest"}[part] ?? "" : ""}`);
      option.value = part;
      return option;
    }));
    channel.value = results.filter((one) => drawn.includes(one.place)).every((one) => one.scheme.granularity === "tensor") ? 0 : last;
  }
  function draw() {
    const layer = grids.layers[chosen.selected()], part = grids.shown(chosen.selected(), +channel.value), {low, high, counts} = part;
    const all = drawn.map((place) => ({place, levels: part.levels(place)}));
    const ends = all.flatMap(({levels}) => levels ? [Math.min(...levels), Math.max(...levels)] : []);
    const [left, right] = [Math.min(low, ...ends), Math.max(high, ...ends)], pad = (right - left || Math.abs(left) || 1) * .02;
    const x = {low: left - pad, high: right + pad}, width = (high - low) / counts.length || pad, most = Math.max(1, ...counts);
    const bars = [...counts].map((n, i) => [low + i * width, n, `${words.number(low + i * width)} to ${words.number(low + (i + 1) * width)}\n${words.count(n, "weight")}`, undefined, low + (i + 1) * width]);
    const y = log.checked ? {log: true, low: .5, high: 1.2 * most} : {low: 0, high: 1.05 * most};
    chart($("#grid-histogram"), {height: 150, x, y: {...y, format: words.short}, label: `Histogram of the weights of ${words.visible(layer.name)}, ${channel.selectedOptions[0].textContent}, from ${words.number(low)} to ${words.number(high)}.`, series: [{kind: "bars", points: bars.filter(([, n]) => n > 0)}]});
    $("[data-test=strips]").replaceChildren(...all.map(({place, levels}, i) => {
      const strip = element("div", "", "strip"), scheme = grids.schemes[place], head = element("p"), host = element("div");
      strip.dataset.place = place;
      const note = levels ? words.count(levels.length, "level") : scheme.bits > 9 ? "too many levels to be seen" : "another grid in each channel: choose one above";
      const group = levels && typeof scheme.granularity === "number" && scheme.granularity < layer.elements ? ", of the group with the largest weight" : "";
      head.append(element("b", scheme.label), ` ${note}${group}`);
      head.style.setProperty("--c", `var(--${COLOURS[i]})`);
      strip.append(head, host);
      if (levels) queueMicrotask(() => chart(host, {height: 46, x: {...x, ticks: []}, y: {low: 0, high: 1, ticks: []}, label: `${scheme.label}: ${levels.length} levels from ${words.number(Math.min(...levels))} to ${words.number(Math.max(...levels))}.`, series: [{kind: "stems", colour: COLOURS[i], points: levels.map((level) => [level, 1, words.number(level)])}]}));
      return strip;
    }));
  }
  function pick(place) {
    drawn = drawn.includes(place) ? drawn.filter((one) => one !== place) : [...drawn, place].slice(-MOST_DRAWN);
    show();
  }

  // ------------------------------------------------------------------------------------------ all grids
  function tabulate(layer) {
    const holder = $("[data-test=grids]"), once = results.filter((one) => one.same === one.place), known = grids.ran && !layer.why_no_damage;
    $("caption", holder).textContent = `Best first: the smallest that keeps ${grids.report.keep_db} dB of ${known ? "the output" : "the weights"}, then the next larger; behind them those that keep less`;
    const head = element("tr");
    head.append(...["", "Grid", "Bits", "Size", "SQNR dB", ...(known ? ["Damage"] : []), "Runs on", "Beaten by"].map((title) => { const cell = element("th", title); cell.scope = "col"; return cell; }));
    head.firstChild.append(element("span", "Levels", "hidden"));
    $("thead", holder).replaceChildren(head);
    $("tbody", holder).replaceChildren(...once.map((one) => {
      const line = element("tr", "", one.by < 0 && !Number.isNaN(one.kept) ? "frontier" : ""), box = element("input"), first = element("td"), name = element("th", one.label);
      line.dataset.place = one.place;
      box.type = "checkbox"; box.checked = drawn.includes(one.place);
      box.setAttribute("aria-label", `Draw the levels of ${one.label}`);
      box.addEventListener("change", () => pick(one.place));
      first.append(box); name.scope = "row";
      const by = element("td", one.by < 0 ? Number.isNaN(one.kept) ? "" : "none" : grids.schemes[one.by].label, "words");
      line.append(first, name, element("td", one.bits.toFixed(2)), element("td", words.size(one.bytes)), element("td", grids.db(one.sqnr)), ...(known ? [element("td", grids.damageText(one))] : []), element("td", one.scheme.runs_on, "words"), by);
      return line;
    }));
    const same = results.length - once.length, note = $("[data-test=same]"), exact = $("[data-test=exact]"), without = once.filter((one) => one.kept === Infinity).length;
    note.hidden = !same;
    note.textContent = same ? `${words.count(same, "grid")} with groups or channels that come to the same here are left out.` : "";
    exact.hidden = !without;
    exact.textContent = without ? `${words.count(without, "grid")} that ${without === 1 ? "makes" : "make"} no error ${without === 1 ? "has" : "have"} no mark.` : "";
  }
  function show() {
    const layer = grids.layers[chosen.selected()];
    draw();
    $("#grid-chart").closest("figure").hidden = !results.some((one) => Number.isFinite(one.kept));
    grids.frontier($("#grid-chart"), results, {keep: grids.report.keep_db, drawn, onpick: pick, label: `What each grid keeps of ${words.visible(layer.name)} by the bits that it takes. The table below holds the numbers.`});
    for (const line of $$("[data-test=grids] tbody tr")) $("input", line).checked = drawn.includes(+line.dataset.place);
  }

  const chosen = choosing(grids.layers, table, {
    tell(layer, index) {
      results = grids.results(index);
      const first = results[0], other = results.find((one) => one.scheme.bits === first.scheme.bits && one.scheme.runs_on !== first.scheme.runs_on && one.same === one.place);
      drawn = [first, other].filter(Boolean).map((one) => one.place);
      tell(layer); list(layer); tabulate(layer); show();
    },
  });
  channel.addEventListener("change", draw);
  log.addEventListener("change", draw);
  frame.keys.l = () => { if (chosen.selected() >= 0) { log.checked = !log.checked; draw(); } };
  return chosen;
})();
