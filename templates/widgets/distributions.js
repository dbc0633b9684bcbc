// How the values that enter a layer and its weights are distributed, where the grids end that calibration would choose, and
// the ranges of the input channels.
const distributions = (() => {
  const section = $("[data-test=entering]"), head = data.distributions;
  if (!section) return {build() {}, paint() {}, draw() {}, tell() {}};
  const {plots, glyphs, ink, make, field, add, addPlot, hover, setTicks, setRange, padded, extent, keys} = canvas;
  const {row, heads, percent, number, isNumber} = damage;
  const SIDES = {weights: "weight_grids", entering: "entering"};
  const weights = $("[data-test=weights]");

  // ------------------------------------------------------------------------------------------ reading
  // For each layer and each of its sides two rows of bars and the grids; the grids go back to where the document has them.
  const loaded = unpack("distributions").then((response) => response.arrayBuffer()).then(read);
  data.loaded = Promise.all([data.loaded, loaded]);
  function read(bytes) {
    const numbers = join(bytes.slice(0, 4 * head.numbers)), codes = new Uint8Array(bytes, 4 * head.numbers), each = head.fields.length;
    const height = (code) => code ? (code - 1) / head.heights * head.decades - head.decades : -Infinity;
    const known = data.layers.map((layer) => layer.sensitivity).filter(Boolean);
    const parts = known.flatMap((one) => Object.values(SIDES).map((name) => one[name]).filter(Boolean));
    parts.forEach((part, p) => {
      const value = (m, f) => { const found = numbers[(m * each + f) * parts.length + p]; return Number.isNaN(found) ? null : found; };
      part.grids = head.methods.map((method, m) => ({method, ...Object.fromEntries(head.fields.map((name, f) => [name, value(m, f)]))})).filter((grid) => grid.step !== null);
      for (const grid of part.grids) { grid.low *= grid.step; grid.high *= grid.step; }
      const [counts, importance] = [0, 1].map((row) => codes.subarray((2 * p + row) * head.bars, (2 * p + row + 1) * head.bars));
      Object.defineProperty(part, "bars", {value: {counts, importance, height}});                      // not of the document
    });
    let at = parts.length * head.methods.length * each;
    for (const {entering} of known) {
      if (!entering) continue;
      const count = Math.min(entering.channels, head.most), from = at;
      at += 3 * count;
      Object.defineProperty(entering, "ranges", {value: Object.fromEntries(["min", "mean", "max"].map((name, c) => [name, numbers.subarray(from + c * count, from + (c + 1) * count)]))});
    }
  }

  // ------------------------------------------------------------------------------------------ tables
  const part = (layer, side) => layer.sensitivity?.[SIDES[side]] ?? null;
  // the least damage or, where nothing is known of it, the largest signal-to-noise ratio
  function best(grids) {
    const by = grids.some((grid) => isNumber(grid.damage)) ? (grid) => isNumber(grid.damage) ? -grid.damage : -Infinity : (grid) => grid.sqnr_db ?? -Infinity;
    return grids.reduce((found, grid) => !found || by(grid) > by(found) ? grid : found, null);
  }
  const ends = (grid) => `${number(grid.low)} to ${number(grid.high)}`;

  function tabulate(holder, found) {
    const chosen = best(found.grids);
    $("summary", holder).textContent = chosen ? `Grids of ${found.grids.length} calibration methods, best by ${isNumber(chosen.damage) ? "damage" : "SQNR"}: ${chosen.method}` : "No grid: all values are the same";
    heads($("table", holder), ["method", "step", "zero point", "range", "SQNR", "damage"]);
    $("tbody", holder).replaceChildren(...found.grids.map((grid) => {
      const cells = [words.number(grid.step), grid.zero, ends(grid), words.decibels(grid.sqnr_db), percent(grid.damage)];
      const line = row(grid.method, cells.map((cell) => element("td", cell)));
      line.cells[0].title = data.report.sensitivity.methods[grid.method] ?? "";
      if (grid === chosen) { line.className = "best"; line.cells[0].append(" ", element("small", "◆ best")); }
      return line;
    }));
  }

  // The first channel of each point; those between two of them are drawn together.
  function groups({channels, ranges}) {
    const count = ranges.min.length, first = [...Array(count + 1).keys()].map((i) => Math.floor(i * channels / count));
    return Array.from(ranges.min, (_, i) => first[i + 1] - first[i] > 1 ? `${first[i]} to ${first[i + 1] - 1}` : String(first[i]));
  }
  const holder = $("[data-test=entering-channels]", section);
  let shown;
  function listChannels() {
    if (!holder.open || !shown?.ranges) return;
    heads($("table", holder), ["channel", "min", "mean", "max"]);
    $("tbody", holder).replaceChildren(...groups(shown).map((label, i) => row(label, ["min", "mean", "max"].map((name) => element("td", number(shown.ranges[name][i]))))));
  }
  holder.addEventListener("toggle", listChannels);

  async function tell(index) {
    const layer = data.layers[index], entering = part(layer, "entering"), own = part(layer, "weights");
    section.hidden = !layer.sensitivity;
    weights.hidden = !own || data.asStored && layer.stored !== null;
    $("[data-test=nothing-enters]").hidden = entering !== null;
    $("[data-test=entering-known]").hidden = entering === null;
    shown = entering;
    await data.loaded;
    if (shown !== entering) return;
    if (own) tabulate($("[data-test=weight-grids]"), own);
    if (!entering) return;
    tabulate($("[data-test=entering-grids]"), entering);
    listChannels();
    const note = $(".envelope", holder), count = entering.ranges.min.length;
    note.hidden = count === entering.channels;
    note.textContent = note.hidden ? "" : `Drawn as an envelope of ${count} points over ${entering.channels.toLocaleString("en")} channels.`;
  }

  // ------------------------------------------------------------------------------------------ figures
  const sources = {};
  function build() {
    for (const name of Object.keys(SIDES)) {
      for (const what of ["bars", "ends"]) sources[`${name}_${what}`] = make("ColumnDataSource", {data: {}});
      addPlot(name);
      const edges = {left: field("left"), right: field("right")};
      add(name, "counts", sources[`${name}_bars`], "Quad", {...edges, bottom: field("floor"), top: field("counts"), line_color: null});
      add(name, "importance", sources[`${name}_bars`], "Segment", {x0: field("left"), x1: field("right"), y0: field("importance"), y1: field("importance"), line_width: 2});
      add(name, "ends", sources[`${name}_ends`], "Segment", {x0: field("x"), x1: field("x"), y0: field("bottom"), y1: field("top"), line_color: field("colour"), line_dash: field("dash"), line_width: field("width")});
      hover(name, glyphs[`${name}.counts`], [["values", "@label"], ["about", "@share of them"], ["importance", "about @weight of it"]], "mouse");
    }
    sources.inputs = make("ColumnDataSource", {data: {}});
    addPlot("inputs", {label: "input channel"});
    const x = field("channel");
    add("inputs", "span", sources.inputs, "VBar", {x, bottom: field("min"), top: field("max"), width: field("thin"), line_color: null});
    add("inputs", "mean", sources.inputs, "Scatter", {x, y: field("mean"), size: field("dot"), line_color: null});
    const target = add("inputs", "target", sources.inputs, "VBar", {x, bottom: field("middle"), top: field("middle"), width: 1, fill_color: null, line_color: null});
    hover("inputs", target, [["channel", "@label"], ...["min", "mean", "max"].map((name) => [name, `@${name}_text`])], "vline");
  }
  function paint() {
    for (const name of Object.keys(SIDES)) { glyphs[`${name}.counts`].glyph.fill_color = ink.span; glyphs[`${name}.importance`].glyph.line_color = ink.ink; }
    glyphs["inputs.span"].glyph.fill_color = ink.box;
    glyphs["inputs.mean"].glyph.fill_color = ink.ink;
  }

  function draw(index) {
    const layer = data.layers[index];
    for (const side of Object.keys(SIDES)) if (part(layer, side)) drawBars(layer, side, part(layer, side));
    if (part(layer, "entering")) drawInputs(layer, part(layer, "entering"));
  }

  function drawBars(layer, side, found) {
    const {low, high, bars, grids} = found, width = (high - low) / head.bars || 1, chosen = best(grids);
    const tops = [...bars.counts].map(bars.height), weigh = [...bars.importance].map(bars.height);
    const known = weigh.some(Number.isFinite), floor = Math.min(-1, ...[...tops, ...weigh].filter(Number.isFinite)) - .4;
    const share = (heights) => { const sizes = heights.map((h) => 10 ** h), sum = sizes.reduce((a, b) => a + b, 0); return sizes.map((size) => sum ? `${+(100 * size / sum).toPrecision(1)} %` : "n/a"); };
    const left = tops.map((_, i) => low + i * width);
    sources[`${side}_bars`].data = {left, right: left.map((edge) => edge + width), counts: tops.map((top) => Math.max(top, floor)), floor: tops.map(() => floor), importance: weigh.map((h) => Number.isFinite(h) ? h : NaN),
      label: left.map((edge) => `${number(edge)} to ${number(edge + width)}`), share: share(tops), weight: share(weigh)};
    const lines = grids.flatMap((grid) => [grid.low, grid.high].filter((end) => end !== 0).map((x) => ({x, best: grid === chosen}))).sort((a, b) => a.best - b.best);
    sources[`${side}_ends`].data = {x: lines.map((line) => line.x), bottom: lines.map(() => floor), top: lines.map(() => .35), colour: lines.map((line) => line.best ? ink.accent : ink.stem), dash: lines.map((line) => line.best ? "solid" : "dashed"), width: lines.map((line) => line.best ? 2 : 1)};
    const across = padded(...extent([low, high, ...lines.map((line) => line.x)]), .03);
    setRange(plots[side].x_range, across);
    setRange(plots[side].y_range, [floor, .4]);
    setTicks(plots[side].below[0], ...across, 5);
    setTicks(plots[side].left[0], 0, 1, 1, canvas.decades(floor + .2, 0, 3), (v) => `${+(100 * 10 ** v).toPrecision(1)} %`);
    const zeros = side === "entering" && isNumber(found.zeros) && found.zeros > 0 && `${words.percent(found.zeros)} exact zeros, left out`;
    keys(side, [["how many, of the fullest bar, log scale", "box", "span"], known && ["importance: how much errors there matter", "rule", "ink"], chosen && [`ends of the best grid: ${chosen.method}`, "", "accent"],
      grids.length > 1 && ["of the others", "dashes", "stem"], zeros && [zeros, "mark plain"]]);
    $(`#fig-${side}`).setAttribute("aria-label", `Histogram of ${side === "weights" ? "the weights" : "what enters"} of ${words.visible(layer.name)}, from ${number(low)} to ${number(high)}${zeros ? `, ${zeros}` : ""}${chosen ? `; the best grid, by ${chosen.method}, goes from ${ends(chosen)}` : ""}.`);
  }

  function drawInputs(layer, found) {
    const {ranges} = found, count = ranges.min.length, width = Math.max(120, $("#fig-entering").clientWidth - 60), all = [...Array(count).keys()];
    const [low, high] = padded(...extent(ranges.min, ranges.max), .08), label = groups(found);
    sources.inputs.data = {channel: all, ...ranges, label, middle: Array(count).fill((low + high) / 2), thin: Array(count).fill(Math.min(.5, 3 * count / width)), dot: Array(count).fill(count > 200 ? 2 : count > 48 ? 3 : 5),
      ...Object.fromEntries(["min", "mean", "max"].map((name) => [`${name}_text`, Array.from(ranges[name], number)]))};
    setRange(plots.inputs.x_range, [-.7, count - .3]);
    setRange(plots.inputs.y_range, [low, high]);
    setTicks(plots.inputs.left[0], low, high, 3);
    const step = Math.max(1, canvas.roundStep(Math.max(1, count / 8), 1));
    setTicks(plots.inputs.below[0], 0, 1, 1, all.filter((i) => i % step === 0), (i) => label[i].split(" ")[0]);
    keys("inputs", [["min to max", "", "box"], ["mean", "dot", "ink"]]);
    $("#fig-inputs").setAttribute("aria-label", `Minimum, mean and maximum of ${words.count(found.channels, "input channel")} of ${words.visible(layer.name)}. The table below holds the numbers.`);
  }

  return {build, paint, draw, tell};
})();
