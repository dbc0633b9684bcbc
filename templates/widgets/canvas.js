// What all figures are drawn with: Bokeh's own models, made here so that no report has to load Bokeh in Python, the page's
// colours, and axes with round numbers.
const canvas = (() => {
  const plots = {}, glyphs = {}, ink = {};
  const bokeh = unpack("bokeh").then((response) => response.text());    // while the rest of the page is wired

  async function load() {
    const script = document.createElement("script");                   // its hash is in the page's security policy
    script.textContent = await bokeh;
    await data.loaded;
    document.body.append(script);
    Bokeh.logger.set_level?.("error");
  }

  const make = (model, attributes) => new (Bokeh.Models.get(model))(attributes);
  const field = (name) => ({field: name});
  const range = () => make("Range1d", {start: 0, end: 1});

  function add(plot, name, source, type, attributes) {
    const glyph = make(type, attributes);
    const renderer = make("GlyphRenderer", {data_source: source, glyph, nonselection_glyph: null, selection_glyph: null, muted_glyph: null});
    plots[plot].renderers = [...plots[plot].renderers, renderer];
    glyphs[`${plot}.${name}`] = renderer;
    return renderer;
  }

  function addPlot(name, {x = range(), xTicks = true, label = ""} = {}) {
    const axis = (show) => make("LinearAxis", {ticker: make("FixedTicker", {ticks: []}), visible: show, minor_tick_line_color: null, major_tick_line_color: null,
      axis_label_text_font_size: "11px", axis_label_text_font_style: "normal", axis_label_standoff: 4, major_label_text_font_size: "11px"});
    const below = axis(xTicks), left = axis(true);
    below.axis_label = label; left.axis_line_color = null;
    plots[name] = make("Plot", {name, x_range: x, y_range: range(), x_scale: make("LinearScale"), y_scale: make("LinearScale"), sizing_mode: "stretch_both",
      toolbar_location: null, background_fill_color: null, border_fill_color: null, outline_line_color: null, min_border: 0, min_border_left: 44, min_border_top: 6, min_border_bottom: 7,
      min_border_right: 4, below: [below], left: [left], center: [make("Grid", {dimension: 1, axis: left})], output_backend: "canvas"});
    return plots[name];
  }

  function hover(plot, renderer, rows, mode) {
    const tool = make("HoverTool", {renderers: [renderer], tooltips: rows, mode, line_policy: "none"});
    plots[plot].toolbar.tools = [...plots[plot].toolbar.tools, tool];
    if (mode === "vline") plots[plot].toolbar.tools = [...plots[plot].toolbar.tools, make("BoxZoomTool", {dimensions: "width"})];
  }

  async function view(names) {
    const {Document} = Bokeh.require("document"), doc = new Document();
    for (const name of names) doc.add_root(plots[name]);
    await Bokeh.embed.add_document_standalone(doc, document.body, names.map((name) => $(`#fig-${name}`)));
    for (const name of names) untab($(`#fig-${name}`));
  }
  // A figure does nothing by keyboard, so that it is no stop of the tab key; the tables hold its numbers.
  function untab(node) {
    for (const e of $$("*", node)) { if (e.tabIndex >= 0) e.tabIndex = -1; if (e.shadowRoot) untab(e.shadowRoot); }
  }

  // ------------------------------------------------------------------------------------------ colours
  // elements that take the page's colours, so that all are read after one calculation of styles
  const probes = Object.fromEntries(["ink", "ink-2", "ink-3", "line", "accent", "span", "box", "zero", "stem", "watch", "problem", "unusable"].map((name) => {
    const probe = element("i");
    probe.hidden = true;
    probe.style.color = `var(--${name})`;
    return [name, probe];
  }));
  document.body.append(...Object.values(probes));
  function paint() {
    for (const [name, probe] of Object.entries(probes)) ink[name] = getComputedStyle(probe).color;
    const font = getComputedStyle(document.body).fontFamily;
    for (const plot of Object.values(plots)) {
      for (const axis of [...plot.below, ...plot.left]) axis.setv({major_label_text_color: ink["ink-3"], axis_label_text_color: ink["ink-3"], major_label_text_font: font, axis_label_text_font: font});
      for (const axis of plot.below) axis.axis_line_color = ink.stem;
      plot.center[0].grid_line_color = ink.line;
    }
  }
  // Before printing Bokeh has to take the new colours and draw now, not in the next frame.
  function repaint() {
    for (const plot of Object.values(plots)) {
      try {
        const view = Bokeh.index.find_one(plot);
        for (const renderer of view.computed_renderer_views ?? []) renderer.glyph?.set_visuals?.(renderer.model.data_source, renderer.all_indices);
        view.paint();
      } catch { /* an older BokehJS, or a figure that is not drawn yet: the next frame will do */ }
    }
  }

  // ------------------------------------------------------------------------------------------ axes
  function roundStep(rough, tolerance) {
    const power = 10 ** Math.floor(Math.log10(rough));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * tolerance);
  }
  function setTicks(axis, low, high, parts, ticks, label) {
    if (!ticks) {
      const step = roundStep((high - low) / parts, .8);
      ticks = [];
      for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step);
      label = (v) => (v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e4 ? v.toExponential(0) : String(+v.toPrecision(3))).replaceAll("-", "−");
    }
    axis.ticker.ticks = ticks;
    axis.major_label_overrides = new Map(ticks.map((tick) => [tick, label(tick)]));
  }
  function padded(low, high, part = .06) {
    if (!(low <= high)) return [-1, 1];
    const pad = (high - low || Math.abs(high) || 1) * part;
    return [low - pad, high + pad];
  }
  const setRange = (target, [start, end]) => target.setv({start, end, reset_start: start, reset_end: end});
  function extent(...arrays) {
    let low = Infinity, high = -Infinity;
    for (const array of arrays) for (const value of array) if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
    return [low, high];
  }
  const decades = (low, high, most = 5) => {
    const each = Math.max(1, Math.ceil((high - low) / most)), ticks = [];
    for (let tick = Math.floor(high); tick >= low; tick -= each) ticks.push(tick);
    return ticks;
  };

  // ------------------------------------------------------------------------------------------ words beside the pictures
  function keys(name, items) {
    $(`[data-keys=${name}]`).replaceChildren(...items.filter(Boolean).flatMap(([text, kind, colour]) => {
      const key = element("span", text, kind);
      if (colour) key.style.setProperty("--c", `var(--${colour})`);
      return [key, element("wbr")];
    }));
  }

  return {plots, glyphs, ink, load, make, field, range, add, addPlot, hover, view, paint, repaint, setTicks, roundStep, padded, setRange, extent, decades, keys};
})();
