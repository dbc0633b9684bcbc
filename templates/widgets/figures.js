// Six figures of the weights, made once and refilled for each layer; what they show comes from the arrays in the page alone.
const figures = (() => {
  const FLAG = {outlier: 1, starved: 2, near_dead: 4, dead: 8, nonfinite: 16};
  const STRIPS = ["ranges", "relative", "levels"], SMALL = ["histogram", "mean_std", "min_max"];
  const BIT_DEPTH = data.report.bits, LARGEST = 2 ** (BIT_DEPTH - 1) - 1;
  const {plots, glyphs, ink, make, field, range, add, addPlot, hover, view, setTicks, roundStep, padded, setRange, extent, keys} = canvas;
  const sources = {}, shared = {};
  let making, zoomed;

  // ------------------------------------------------------------------------------------------ making
  // What the pointer finds: a channel's whole width, where a dot would leave most of it out, and NaN altogether.
  function addTarget(plot, y) {
    return add(plot, "target", sources.channels, "VBar", {x: field("channel"), bottom: y, top: y, width: 1, fill_color: null, line_color: null});
  }

  function build() {
    const before = data.changes;
    for (const name of ["channels", "flags", "bins", "dots"]) sources[name] = make("ColumnDataSource", {data: {}});
    const channels = sources.channels, x = field("channel");
    shared.x = range();
    const names = ["mean", "min", "max", "q25", "q75", "std"];
    const labels = {mean: "mean", min: "min", max: "max", q25: "25 %", q75: "75 %", std: "deviation"};
    const rows = [["channel", "@label"], ...names.map((key) => [labels[key], before ? `@before_${key}_text → @${key}_text` : `@${key}_text`])];
    const note = ["note", "@note"];

    addPlot("ranges", {x: shared.x, xTicks: false});
    shared.zero = make("BoxAnnotation", {level: "underlay", line_color: null, fill_alpha: 1});
    if ("propagate_hover" in shared.zero) shared.zero.propagate_hover = true;      // some BokehJS, such as 3.6, would hide the channels behind it
    shared.zeroLine = make("Span", {location: 0, dimension: "width", line_width: 1, level: "underlay"});
    plots.ranges.center = [...plots.ranges.center, shared.zero, shared.zeroLine];
    if (before) for (const key of ["max", "min", "mean"]) add("ranges", `area_${key}`, channels, "VArea", {x, y1: field(`before_${key}`), y2: field(key), fill_alpha: .45});
    else {
      add("ranges", "span", channels, "VBar", {x, bottom: field("min"), top: field("max"), width: field("thin"), line_color: null});
      add("ranges", "box", channels, "VBar", {x, bottom: field("q25"), top: field("q75"), width: field("wide"), line_color: null});
    }
    for (const key of ["min", "max", "mean"]) {
      add("ranges", `line_${key}`, channels, "Line", {x, y: field(key), line_width: key === "mean" ? 1.5 : 1.25});
      if (before) add("ranges", `before_${key}`, channels, "Line", {x, y: field(`before_${key}`), line_width: 1.5, line_dash: [2, 2]});
    }
    add("ranges", "mean", channels, "Scatter", {x, y: field("mean"), size: field("dot"), line_color: null});
    add("ranges", "flags", sources.flags, "Scatter", {x, y: field("y"), marker: field("marker"), size: 8, fill_color: field("colour"), line_color: field("colour")});
    hover("ranges", addTarget("ranges", field("middle")), [...rows, note], "vline");

    addPlot("relative", {x: shared.x, xTicks: data.report.kind === "relative_weight_ranges", label: data.report.kind === "relative_weight_ranges" ? "output channel" : ""});
    if (before) add("relative", "before", channels, "Scatter", {x, y: field("before_relative_log"), marker: "dash", size: 8, line_width: 1.5, fill_color: null});
    add("relative", "stem", channels, "VBar", {x, bottom: 0, top: field("relative_log"), width: field("thin"), line_color: null});
    add("relative", "dots", channels, "Scatter", {x, y: field("relative_log"), marker: field("relative_marker"), size: field("relative_size"), fill_color: field("relative_colour"), line_color: null});
    hover("relative", addTarget("relative", .15), [["channel", "@label"], ["relative range", before ? "@before_relative_text → @relative_text" : "@relative_text"], note], "vline");

    const last = data.report.kind !== "relative_weight_ranges";
    addPlot("levels", {x: shared.x, xTicks: last, label: last ? "output channel" : ""});
    shared.starved = make("Span", {location: Math.log2(data.report.thresholds.starved_levels), dimension: "width", line_dash: [4, 3], line_width: 1});
    plots.levels.center = [...plots.levels.center, shared.starved];
    const bars = add("levels", "bars", channels, "VBar", {x, bottom: 0, top: field("levels_log"), width: field("bar"), fill_color: field("colour"), line_color: null});
    if (before) add("levels", "before", channels, "Scatter", {x, y: field("before_levels_log"), marker: "dash", size: 8, line_width: 1.5, fill_color: null});
    hover("levels", bars, [["channel", "@label"], ["levels", before ? "@before_levels → @levels" : "@levels"], note], "vline");

    addPlot("histogram");
    add("histogram", "bins", sources.bins, "Quad", {left: field("left"), right: field("right"), bottom: 0, top: field("now"), line_color: null});
    if (before) add("histogram", "before", sources.bins, "Step", {x: field("middle"), y: field("before"), mode: "center", line_width: 1.25});
    hover("histogram", glyphs["histogram.bins"], [["relative range", "@label"], ["channels", before ? "@before → @now" : "@now"]], "mouse");

    for (const [name, across, up, labels] of [["mean_std", "mean", "std", ["mean", "deviation"]], ["min_max", "min", "max", ["min", "max"]]]) {
      addPlot(name, {label: labels[0]});
      if (before) add(name, "before", sources.dots, "Scatter", {x: field(`before_${across}`), y: field(`before_${up}`), size: 6, fill_color: null, line_width: 1.25});
      const dots = add(name, "dots", sources.dots, "Scatter", {x: field(across), y: field(up), size: 5, fill_alpha: .75, line_color: null, fill_color: field("colour")});
      hover(name, dots, [["channel", "@label"], [labels[0], `@${across}_text`], [labels[1], `@${up}_text`]], "mouse");
    }
  }

  // The models are filled before their views are made, and the figures below the fold get theirs when the page is idle.
  async function embed(index) {
    await canvas.load();
    build(); damage.build(); distributions.build();
    latest = index;
    paint();
    await view(damage.SHOWN ? ["damage"] : STRIPS);
    for (const name of STRIPS) $(`#fig-${name}`).addEventListener("dblclick", () => setRange(shared.x, zoomed));
    setTimeout(async () => {
      for (const names of damage.SHOWN ? [["entering", "weights"], STRIPS, ["inputs"], SMALL] : [SMALL]) await view(names);
    });
  }

  // ------------------------------------------------------------------------------------------ colours
  function paint() {
    if (!plots.ranges) return;
    canvas.paint(); damage.paint(); distributions.paint();
    shared.zero.fill_color = ink.zero; shared.zeroLine.line_color = ink.stem; shared.starved.line_color = ink["ink-3"];
    const fills = {"ranges.span": "span", "ranges.box": "box", "ranges.mean": "ink", "relative.stem": "span", "histogram.bins": "box", "ranges.area_max": "span", "ranges.area_min": "span", "ranges.area_mean": "zero"};
    for (const [name, colour] of Object.entries(fills)) if (glyphs[name]) glyphs[name].glyph.fill_color = ink[colour];
    for (const key of ["min", "max"]) glyphs[`ranges.line_${key}`].glyph.line_color = ink.box;
    glyphs["ranges.line_mean"].glyph.line_color = ink.ink;
    for (const [name, renderer] of Object.entries(glyphs)) if (/before/.test(name)) renderer.glyph.line_color = ink["ink-2"];
    if (latest !== undefined) fill(latest);
  }
  // ------------------------------------------------------------------------------------------ filling
  let latest;
  function derive(arrays, part) {
    const log = (value) => value > 0 ? Math.log10(value) : NaN;
    const levels = Array.from(arrays.min, (low, i) => part.step > 0 && Number.isFinite(low) ? Math.round(arrays.max[i] / part.step) - Math.round(low / part.step) + 1 : 1);
    return {levels, levels_log: levels.map(Math.log2), relative_log: Array.from(arrays.relative_range, log), relative_text: Array.from(arrays.relative_range, (v) => Number.isFinite(v) ? words.short(v) : "n/a")};
  }

  function fill(index) {
    latest = index;
    damage.draw(index); distributions.draw(index);
    const layer = data.layers[index], all = data.shown(index), now = all.at(-1), parts = data.parts(index), part = parts.at(-1);
    const before = data.changes ? all[0] : null;
    const count = now.channel.length, positions = [...Array(count).keys()];
    const enveloped = count < part.channels;
    const has = (i, flag) => (now.flags[i] & FLAG[flag]) !== 0;
    const notes = {outlier: "outlier by range", starved: "starved", near_dead: "near dead", dead: "dead", nonfinite: "NaN or infinite"};
    const peaks = positions.map((i) => Math.max(Math.abs(now.min[i]), Math.abs(now.max[i])));
    const setter = peaks.reduce((best, peak, i) => peak > (peaks[best] ?? 0) ? i : best, -1);
    const note = positions.map((i) => [i === setter && "sets the step", ...Object.keys(notes).map((flag) => has(i, flag) && notes[flag])].filter(Boolean).join(", "));
    const colour = positions.map((i) => has(i, "nonfinite") ? ink.unusable : has(i, "starved") || has(i, "near_dead") || has(i, "dead") ? ink.watch : i === setter ? ink.accent : ink.box);
    const label = positions.map((i) => {
      const first = now.channel[i], next = i + 1 < count ? now.channel[i + 1] : part.channels;
      return next - first > 1 ? `${first} to ${next - 1}` : String(first);
    });
    const width = Math.max(120, $("#fig-ranges").clientWidth - 60);
    const values = {...derive(now, part), note, colour, label,
      relative_marker: positions.map((i) => has(i, "outlier") ? "triangle" : "circle"),
      relative_size: positions.map((i) => has(i, "outlier") ? 9 : count > 200 ? 3 : 5),
      relative_colour: positions.map((i) => has(i, "outlier") ? ink.problem : has(i, "dead") ? ink.watch : ink.box),
      thin: Array(count).fill(Math.min(.5, 3 * count / width)), wide: Array(count).fill(Math.min(.8, 12 * count / width)), bar: Array(count).fill(.7),
      dot: Array(count).fill(count > 200 ? 2 : count > 48 ? 3 : 5)};
    const columns = ["min", "max", "mean", "std", "q25", "q75"];
    for (const key of columns) { values[key] = now[key]; values[`${key}_text`] = Array.from(now[key], words.number); }
    if (before) {
      for (const key of columns) { values[`before_${key}`] = before[key]; values[`before_${key}_text`] = Array.from(before[key], words.number); }
      for (const [key, array] of Object.entries(derive(before, layer.before))) values[`before_${key}`] = array;
    }
    const [low, high] = padded(...extent(now.min, now.max, ...(before ? [before.min, before.max] : [])), .12);
    sources.channels.data = sources.dots.data = {...values, channel: positions, middle: Array(count).fill((low + high) / 2)};

    zoomed = [-.7, count - .3];
    setRange(shared.x, zoomed);
    setRange(plots.ranges.y_range, [low, high]);
    setTicks(plots.ranges.left[0], low, high, 3);
    shared.zero.setv({bottom: -part.step / 2, top: part.step / 2});
    const flagged = positions.filter((i) => note[i] && !before);
    sources.flags.data = {
      channel: flagged,
      y: flagged.map((i) => has(i, "nonfinite") && !Number.isFinite(now.max[i]) ? 0 : i === setter && -now.min[i] > now.max[i] ? now.min[i] - (high - low) * .05 : now.max[i] + (high - low) * .05),
      marker: flagged.map((i) => has(i, "nonfinite") || has(i, "dead") ? "x" : has(i, "starved") || has(i, "near_dead") ? "inverted_triangle" : i === setter ? "diamond" : "triangle"),
      colour: flagged.map((i) => has(i, "outlier") && i !== setter && !has(i, "nonfinite") ? ink.problem : colour[i]),
    };
    const step = roundStep(Math.max(1, part.channels / 8), 1), ticks = [];         // round channel numbers, at the points that hold them
    for (let channel = 0, i = 0; channel < part.channels; channel += step) {
      while (i + 1 < count && now.channel[i + 1] <= channel) i++;
      ticks.push(i);
    }
    const channelLabel = (i) => String(Math.ceil(now.channel[i] / step) * step);
    for (const name of ["levels", "relative"]) {
      setTicks(plots[name].below[0], 0, count, 8, ticks, channelLabel);
    }

    const tops = [0, BIT_DEPTH / 2, BIT_DEPTH];
    setRange(plots.levels.y_range, [-.4, BIT_DEPTH + .4]);
    setTicks(plots.levels.left[0], 0, BIT_DEPTH, 2, tops, (v) => String(Math.round(2 ** v)));
    const relative = extent(values.relative_log, values.before_relative_log ?? [], [0, .3]);
    const decades = (end) => Array.from({length: Math.floor(end) + 1}, (_, i) => i).filter((i) => end < 4 || i % 2 === 0);
    const logTicks = (end) => end < .35 ? [0, Math.log10(1.5), Math.log10(2)] : end < 1 ? [0, Math.log10(2), Math.log10(5), 1] : decades(end);
    const logLabel = (v) => words.short(+(10 ** v).toPrecision(2));
    setRange(plots.relative.y_range, [Math.max(-.5, relative[0]) - .05 * relative[1], relative[1] * 1.12]);
    setTicks(plots.relative.left[0], 0, 1, 2, logTicks(relative[1]), logLabel);

    const bins = now.histogram.length, end = Math.max(...parts.map((one) => Math.log10(one.largest_relative_range ?? 1)), 1e-9) || 1;
    const wide = end / bins, edges = Array.from({length: bins}, (_, i) => i * wide);
    sources.bins.data = {left: edges.map((e) => e + wide * .05), right: edges.map((e) => e + wide * .95), middle: edges.map((e) => e + wide / 2), now: Array.from(now.histogram), before: Array.from(before?.histogram ?? now.histogram),
      label: edges.map((e) => `${(10 ** e).toPrecision(3)} to ${(10 ** (e + wide)).toPrecision(3)}`)};
    const most = Math.max(1, ...now.histogram, ...(before?.histogram ?? []));
    setRange(plots.histogram.x_range, [-end * .02, end * 1.02]);
    setRange(plots.histogram.y_range, [0, most * 1.08]);
    setTicks(plots.histogram.left[0], 0, most, 2, most < 3 ? [0, 1, 2].filter((v) => v <= most) : undefined, String);
    setTicks(plots.histogram.below[0], 0, end, 2, logTicks(end).filter((v) => v <= end * 1.02), logLabel);

    for (const [name, across, up] of [["mean_std", "mean", "std"], ["min_max", "min", "max"]]) {
      const x = padded(...extent(now[across], before?.[across] ?? [])), y = padded(...extent(now[up], before?.[up] ?? []));
      setRange(plots[name].x_range, x); setRange(plots[name].y_range, y);
      setTicks(plots[name].below[0], ...x, 2); setTicks(plots[name].left[0], ...y, 3);
    }
    describe(layer, part, {now, before, count, setter: label[setter], values, enveloped, low, high});
    setStyle();
  }

  // ------------------------------------------------------------------------------------------ words beside the pictures
  function describe(layer, part, {count, setter, enveloped}) {
    const flagged = (name, sign, one, many = one) => part.flags[name].length ? [`${sign} ${part.flags[name].length} ${part.flags[name].length === 1 ? one : many}`, `mark ${name === "outliers" ? "outlier" : ""}`] : null;
    const rule = `Q3 + ${data.report.thresholds.outlier_iqr} IQR`;
    if (data.changes) keys("ranges", [["min, mean, max after", "rule", "box"], ["before", "dotted", "ink-2"], ["difference", "band", "span"]]);
    else keys("ranges", [["min to max", "", "span"], ["25 to 75 %", "box", "box"], ["mean", "dot", "ink"], ["rounds to 0", "band", "zero"], setter !== undefined && [`◆ ${setter} sets the step`, "mark set"],
      flagged("outliers", "▲", "outlier", "outliers"), flagged("starved", "▼", "starved"), flagged("near_dead", "▼", "near dead"), flagged("dead", "✕", "dead"), flagged("nonfinite", "✕", "NaN or infinite")]);
    keys("relative", [["log scale", "mark plain"], flagged("outliers", "▲", `above ${rule}`), part.flags.outliers.length === 0 && [`none above ${rule}`, "mark plain"], data.changes && ["before", "rule", "ink-2"]]);
    keys("levels", [[`dashed: fewer than ${data.report.thresholds.starved_levels} is starved`, "mark plain"], data.changes && ["before", "rule", "ink-2"]]);
    const note = $("[data-test=envelope]");
    note.hidden = !enveloped;
    note.textContent = enveloped ? `Drawn as an envelope of ${count} points over ${part.channels.toLocaleString("en")} channels: each point spans its channels from the smallest minimum to the largest maximum; flagged channels stand alone${part.flags_complete === false ? " as far as there is room, the widest first" : ""}.` : "";
    const label = (name, text) => plots[name] && $(`#fig-${name}`).setAttribute("aria-label", text);
    label("ranges", `Minimum, quartiles, mean and maximum of ${words.count(part.channels, "channel")} of ${words.visible(layer.name)}. The table of channels below holds the numbers.`);
    label("relative", `Relative range of each channel, up to ${words.number(part.largest_relative_range)}, ${words.count(part.flags.outliers.length, "outlier")}.`);
    label("levels", `Levels of the shared grid for each channel: median ${part.median_levels}, ${part.flags.starved.length} starved.`);
    label("histogram", `Histogram of the relative ranges of the channels in ${data.channels(0)[0].histogram.length} bins.`);
    label("mean_std", "Scatter of mean against standard deviation of each channel.");
    label("min_max", "Scatter of minimum against maximum of each channel.");
  }

  function setStyle() {
    if (data.changes) return;
    const lines = $("[name=style][value=lines]").checked;
    for (const key of ["min", "max", "mean"]) glyphs[`ranges.line_${key}`].visible = lines;
    for (const key of ["span", "box"]) glyphs[`ranges.${key}`].visible = !lines;
  }
  $$("[name=style]").forEach((input) => input.addEventListener("change", setStyle));

  return {paint, repaint: canvas.repaint, show: async (index) => { latest = index; if (making) { await making; if (latest === index) fill(index); } else await (making = embed(index)); }, plots, sources};
})();
