// Damage of every layer at every width: a table whose cells are coloured by their decibels, made when it is first shown.
const heatmap = (() => {
  const section = $(".heatmap");
  if (!section) return {};
  const CHUNK = 40;                                                    // rows that the browser lays out, or leaves, together
  const HOW = {measured: "measured", high: "predicted, within 1.5 times or so", fair: "predicted, within 2.5 times or so", low: "predicted, may be far off"};
  const known = data.report.sensitivity, sheet = $(".sheet", section), grid = $("table", sheet);
  const order = {model: [...data.layers.keys()], rank: [...data.layers.keys()].sort((a, b) => data.layers[a].rank - data.layers[b].rank)};
  const chosen = (name) => $(`input[name=${name}]:checked`, section).value;
  const rows = [];
  let selected = -1, whole;

  const figures = (layer, what) => what === "inputs" ? layer.sensitivity?.inputs : layer.sensitivity?.weights[what];
  const total = (what) => what === "inputs" ? known.total_inputs : known.total[what];
  const kept = (damage) => damage === 0 ? "∞" : (-10 * Math.log10(damage)).toFixed(1).replace("-", "−");

  const unknown = (damage) => damage === null || damage === undefined;
  const off = (damage, confidence) => confidence !== "measured" && damage > data.unreliable;

  function fill(cell, damage, confidence) {
    if (unknown(damage)) { cell.textContent = "n/a"; cell.className = "unknown"; return; }
    cell.textContent = kept(damage);
    cell.className = off(damage, confidence) ? "low off" : confidence;
    // nothing is left of the colour at 60 dB, and all of it is there at 0 dB
    cell.style.cssText = `--h:${damage === 0 ? 0 : Math.round(Math.max(0, Math.min(100, 100 + 1000 / 60 * Math.log10(damage))))}`;
  }
  function tell(damage, confidence) {
    return unknown(damage) ? "not known" : `${words.percent(damage)}, ${off(damage, confidence) ? "beyond the model: unreliable" : HOW[confidence]}`;
  }

  // The table is laid out as blocks and grids, which may cost it its roles.
  function role(made, name) { made.setAttribute("role", name); return made; }
  function heading(scope, name) {
    const made = role(element("th"), `${scope}header`);
    made.scope = scope === "column" ? "col" : scope;
    made.append(name);
    return made;
  }
  function line(name) {
    const made = role(element("tr"), "row");
    made.append(heading("row", name), ...known.bits.map(() => role(element("td"), "cell")));
    return made;
  }

  function build() {
    const head = role(element("tr"), "row");
    head.append(...["Layer", ...known.bits.map((bits) => `${bits} bits`)].map((text) => heading("column", text)));
    whole = line("All layers");
    role(grid, "table"); role(grid.tHead, "rowgroup").append(head, whole);
    grid.style.setProperty("--n", known.bits.length);
    const empty = line(element("a"));
    data.layers.forEach((layer, i) => {
      rows[i] = empty.cloneNode(true);
      rows[i].dataset.i = i;
      const link = rows[i].firstChild.firstChild;
      link.textContent = link.title = words.visible(layer.name);
      link.href = `#layer=${encodeURIComponent(layer.name)}`;
    });
    sheet.classList.toggle("compact", data.layers.length > 60);
    recolour(); arrange(); mark(selected);
  }

  function recolour() {
    const what = chosen("what");
    known.bits.forEach((_, b) => fill(whole.cells[b + 1], total(what)[b], "measured"));
    data.layers.forEach((layer, i) => {
      const part = figures(layer, what);
      known.bits.forEach((_, b) => fill(rows[i].cells[b + 1], part?.value[b], part?.confidence[b]));
    });
    grid.caption.textContent = `Decibels kept when each layer's ${what === "inputs" ? "inputs are" : `weights, on a grid per ${what}, are`} rounded`;
  }

  function arrange() {
    const wanted = order[chosen("order")].map((i) => rows[i]), bodies = [];
    for (let first = 0; first < wanted.length; first += CHUNK) {
      const body = role(element("tbody"), "rowgroup"), chunk = wanted.slice(first, first + CHUNK);
      body.append(...chunk);
      body.style.setProperty("--rows", chunk.length);
      bodies.push(body);
    }
    grid.replaceChildren(grid.caption, grid.tHead, ...bodies);
  }

  function mark(now) {
    rows[selected]?.classList.remove("on"); rows[selected]?.removeAttribute("aria-current");
    selected = now;
    const row = rows[now];
    if (!row) return;
    row.classList.add("on"); row.setAttribute("aria-current", "true");
    const box = sheet.getBoundingClientRect(), place = row.getBoundingClientRect();
    const above = place.top - box.top - grid.tHead.offsetHeight, below = place.bottom - box.bottom;
    if (above < 0) sheet.scrollTop += above; else if (below > 0) sheet.scrollTop += below;
  }

  function show() { if (section.open && !rows.length) build(); }
  section.addEventListener("toggle", show);
  section.addEventListener("change", (event) => { if (event.target.name === "what") recolour(); else arrange(); });
  document.addEventListener("layer", (event) => mark(event.detail));
  sheet.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    const row = cell.parentNode, b = cell.cellIndex - 1, what = chosen("what");
    const part = row === whole ? {value: total(what), confidence: known.bits.map(() => "measured")} : figures(data.layers[row.dataset.i], what);
    const spread = row === whole ? known.total_spread_db[what]?.[b] : null;
    cell.title = `${row.firstChild.textContent}, ${known.bits[b]} bits: ${tell(part?.value[b], part?.confidence[b])}${spread ? `, ±${spread} dB between draws of the rounding` : ""}`;
  });
  sheet.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-i]");
    if (!row) return;
    event.preventDefault();
    const i = +row.dataset.i;
    if (table.row(i).hidden) table.clear();
    detail.select(i, {scroll: true});
  });
  show();
  return {};
})();
