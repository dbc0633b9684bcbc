// What rounding a layer does to the output of the model: what would help, the damage by bit width, and what else was found.
const damage = (() => {
  const known = data.report.sensitivity, panel = $("[data-test=damage]");
  if (!known || !panel) return {SHOWN: false, build() {}, paint() {}, draw() {}, tell() {}};
  const {plots, glyphs, ink, make, field, add, addPlot, hover, setTicks, setRange, keys} = canvas;
  const UNRELIABLE = data.unreliable, LIMITS = ["watch", "problem"], {thresholds} = data.report;
  const limit = (level) => 10 ** (-thresholds[`${level}_db`] / 10);
  const GRIDS = {tensor: "one grid per tensor", channel: "a grid per channel"};
  const KINDS = {per_channel: "grid per channel", clip: "clip", more_bits: "more bits", equalize: "equalize", prune: "prune", float: "stay in float"};
  const output = known.loss ? "loss" : "output";
  const isNumber = (value) => value !== null && Number.isFinite(value);
  const percent = (value) => !isNumber(value) ? "n/a" : value > 0 && value < 1e-6 ? `${(100 * value).toExponential(1).replace("-", "−")}\u00a0%` : words.percent(value);
  const number = (value) => value === 0 ? "0" : words.number(value);
  const decibels = (value) => !isNumber(value) ? "n/a" : value > 0 ? `${(-10 * Math.log10(value)).toFixed(1).replace("-", "−")} dB` : "∞";
  const factor = (spread) => isNumber(spread) ? `×÷ ${Math.exp(spread).toPrecision(2)}` : "";
  const series = (one) => [...known.granularities.map((name) => ({name, head: `Weights, ${GRIDS[name]}`, short: `weights, ${GRIDS[name]}`, figures: one.weights[name]})),
    {name: "inputs", head: "What enters", short: "what enters", figures: one.inputs}].filter((each) => each.figures);
  const LOOKS = {tensor: ["circle", "accent", -.18], channel: ["square", "ink", 0], inputs: ["triangle", "stem", .18]};

  // ------------------------------------------------------------------------------------------ words and tables
  function tell(layer) {
    const one = layer.sensitivity;
    panel.hidden = !one;
    if (!one) return;
    const remedies = $("[data-test=remedies]");
    remedies.hidden = !layer.remedies.length;
    const first = layer.remedies.findIndex((remedy) => isNumber(remedy.damage) && remedy.damage <= limit("watch"));
    $("ul", remedies).replaceChildren(...layer.remedies.map((remedy, i) => {
      const line = element("li", "", i === first ? "first" : ""), text = element("span", words.unbroken(remedy.text));
      if (i === first) text.append(element("em", "Recommended: the first that suffices."));
      const left = remedy.damage === 0 ? "no damage" : isNumber(remedy.damage) ? decibels(remedy.damage) : "not known";
      line.append(element("b", KINDS[remedy.kind] ?? remedy.kind), text, element("span", left, "left"));
      line.dataset.kind = remedy.kind;
      return line;
    }));
    tabulate(one);
    list(one);
  }

  const row = (head, cells) => {
    const line = element("tr"), first = element("th", head);
    first.scope = "row";
    line.append(first, ...cells);
    return line;
  };
  const heads = (table, names) => {
    const line = element("tr");
    line.append(...names.map((name) => { const head = element("th", name); head.scope = "col"; return head; }));
    $("thead", table).replaceChildren(line);
  };

  function tabulate(one) {
    const table = $("[data-test=damage-table]"), groups = [];
    let rough = false;
    heads(table, ["", ...known.bits.map((bits) => `${bits} bits`)]);
    for (const {head, figures} of series(one)) {
      const title = element("th", head), first = element("tr"), group = element("tbody"), lines = [first];
      title.colSpan = known.bits.length + 1; title.scope = "rowgroup";
      first.append(title);
      if (figures.predicted.some(isNumber)) lines.push(row("predicted", figures.predicted.map((value, i) => {
        const unsure = isNumber(value) && value >= UNRELIABLE, cell = element("td", percent(value) + (unsure ? " ?" : ""), unsure ? "rough" : "");
        rough ||= unsure;
        cell.append(element("small", factor(figures.spread[i])));
        return cell;
      })));
      if (figures.measured.some(isNumber)) lines.push(row("measured", figures.measured.map((value) => element("td", percent(value)))));
      group.append(...lines);
      groups.push(group);
    }
    $$("tbody", table).forEach((group) => group.remove());
    table.append(...groups);
    $("[data-test=unreliable]").hidden = !rough;
  }

  function list(one) {
    const table = $("[data-test=damage-facts]"), at = known.bits.indexOf(data.report.bits);
    const cell = (text, small) => { const made = element("td", text); if (small) made.append(element("small", small)); return made; };
    const both = (head, read) => row(head, known.granularities.map(read));
    const whole = (head, ...cells) => { const line = row(head, [cell(...cells)]); line.cells[1].colSpan = known.granularities.length; return line; };
    const level = (value, how) => cell(percent(value), isNumber(value) ? `${decibels(value)}, ${how}` : "");
    const sure = (confidence) => confidence === "measured" ? confidence : `${confidence} confidence`;
    heads(table, ["", ...known.granularities.map((name) => GRIDS[name])]);
    const inputs = one.inputs && at >= 0 ? [percent(one.inputs.value[at]), `${decibels(one.inputs.value[at])}, ${sure(one.inputs.confidence[at])}`] : ["n/a"];
    $("tbody", table).replaceChildren(
      both("The weights of this layer alone", (name) => level(one.weights[name].value[at] ?? null, sure(one.weights[name].confidence[at]))),
      whole("What enters this layer alone", ...inputs),
      both("The weights of all layers but this one", (name) => isNumber(one.without[name]) ? level(one.without[name], "measured") : level(one.predicted_without[name], "predicted")),
      both("Its own output keeps", (name) => cell(words.decibels(one.output_sqnr_db[name] ?? null))),
      whole("Multiplications for one sample", one.operations.toLocaleString("en"), `${words.percent(one.share_of_operations)} of all`));
  }

  // ------------------------------------------------------------------------------------------ figure
  let marks, bars, shared;
  function build() {
    marks = make("ColumnDataSource", {data: {}});
    bars = make("ColumnDataSource", {data: {}});
    const plot = addPlot("damage");
    shared = {rough: make("BoxAnnotation", {level: "underlay", line_color: null, fill_alpha: 1, bottom: Math.log10(UNRELIABLE)})};
    if ("propagate_hover" in shared.rough) shared.rough.propagate_hover = true;
    for (const level of LIMITS) {
      shared[level] = make("Span", {location: Math.log10(limit(level)), dimension: "width", line_dash: [4, 3], line_width: 1});
      shared[`${level}_label`] = make("Label", {text: level, text_font_size: "10px", y: Math.log10(limit(level)), text_baseline: "bottom", text_align: "right"});
    }
    plot.center = [...plot.center, ...Object.values(shared)];
    for (const name of Object.keys(LOOKS)) {
      shared[`source_${name}`] = make("ColumnDataSource", {data: {x: [], y: []}});
      add("damage", `line_${name}`, shared[`source_${name}`], "Line", {x: field("x"), y: field("y"), line_width: 1, line_alpha: .5});
    }
    add("damage", "bars", bars, "Segment", {x0: field("x"), x1: field("x"), y0: field("low"), y1: field("high"), line_color: field("colour"), line_width: 1.5});
    const dots = add("damage", "marks", marks, "Scatter", {x: field("x"), y: field("y"), marker: field("marker"), size: 7, line_color: field("colour"), fill_color: field("fill"), line_width: 1.25});
    hover("damage", dots, [["what", "@what"], ["width", "@width"], ["damage", "@text"], ["keeps", "@keeps"], ["how", "@how"]], "mouse");
  }
  function paint() {
    shared.rough.fill_color = ink.zero;
    for (const level of LIMITS) { shared[level].line_color = ink[level]; shared[`${level}_label`].text_color = ink[level]; }
    for (const [name, [, colour]] of Object.entries(LOOKS)) glyphs[`damage.line_${name}`].glyph.line_color = ink[colour];
  }

  function draw(index) {
    const layer = data.layers[index], one = layer.sensitivity;
    if (!one) return;
    const points = [], whiskers = [], all = series(one), log = (value) => Math.log10(value);
    for (const {name, short, figures} of all) {
      const [marker, colour, shift] = LOOKS[name];
      const known_at = figures.value.map((value, i) => [value, i]).filter(([value]) => value > 0);
      shared[`source_${name}`].data = {x: known_at.map(([, i]) => i + shift), y: known_at.map(([value]) => log(value))};
      known.bits.forEach((bits, i) => {
        const base = {x: i + shift, marker, colour: ink[colour], what: short, width: `${bits} bits`};
        const mark = (value, fill, how) => { if (value > 0) points.push({...base, y: log(value), fill, how, text: percent(value), keeps: decibels(value)}); };
        const predicted = figures.predicted[i], spread = figures.spread[i] ?? 0;
        mark(predicted, null, `predicted ${factor(figures.spread[i])}`);
        if (predicted > 0) whiskers.push({...base, low: log(predicted) - spread * Math.LOG10E, high: log(predicted) + spread * Math.LOG10E});
        mark(figures.measured[i], ink[colour], "measured");
      });
    }
    for (const name of Object.keys(LOOKS)) if (!all.some((each) => each.name === name)) shared[`source_${name}`].data = {x: [], y: []};
    const columns = (rows, names) => Object.fromEntries(names.map((name) => [name, rows.map((each) => each[name])]));
    marks.data = columns(points, ["x", "y", "marker", "colour", "fill", "what", "width", "text", "keeps", "how"]);
    bars.data = columns(whiskers, ["x", "low", "high", "colour"]);
    const ys = [...points.map((point) => point.y), ...LIMITS.map((level) => log(limit(level)))];
    const low = Math.max(-12, Math.min(...ys)), high = Math.max(0, ...ys), end = known.bits.length - .5;
    setRange(plots.damage.x_range, [-.5, end]);
    setRange(plots.damage.y_range, [low - .06 * (high - low), high + .06 * (high - low)]);
    setTicks(plots.damage.below[0], 0, 1, 1, known.bits.map((_, i) => i), (i) => `${known.bits[i]} bits`);
    setTicks(plots.damage.left[0], 0, 1, 1, canvas.decades(low, high), (v) => `${v >= -2 ? 100 * 10 ** v : (100 * 10 ** v).toFixed(Math.min(8, -2 - v))} %`);
    for (const level of LIMITS) shared[`${level}_label`].x = end;
    const predicted = whiskers.length > 0, measured = points.some((point) => point.how === "measured");
    keys("damage", [...all.map(({name, short}) => [short, `shape ${LOOKS[name][0]}`, LOOKS[name][1]]),
      predicted && [measured ? "hollow: predicted, with its standard error" : "predicted, with its standard error", "mark plain"], measured && [predicted ? "filled: measured" : "measured", "mark plain"],
      predicted && ["predictions unreliable", "band", "zero"]]);
    const told = all.map(({short, figures}) => `${short} ${figures.value.map((value, i) => `${percent(value)} at ${known.bits[i]} bits`).join(", ")}`).join("; ");
    $("#fig-damage").setAttribute("aria-label", `Damage to the ${output} on a log scale: ${told}. The table below holds the numbers.`);
  }

  return {SHOWN: true, build, paint, draw, tell, percent, number, row, heads, isNumber};
})();
