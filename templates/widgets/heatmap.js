// Damage of every layer at every width: a table whose cells are coloured by their decibels, made when it is first shown.
const heatmap = (() => {
  const section = $(".heatmap");
  if (!section) return {};
  const UNRELIABLE = .3;                                               // as in analysis/damage.py
  const HOW = {measured: "measured", high: "predicted, within 1.5 times or so", fair: "predicted, within 2.5 times or so", low: "predicted, may be far off"};
  const known = data.report.sensitivity, sheet = $(".sheet", section), grid = $("table", sheet);
  const [whole, body] = grid.tBodies;
  const order = {model: [...data.layers.keys()], rank: [...data.layers.keys()].sort((a, b) => data.layers[a].rank - data.layers[b].rank)};
  const chosen = (name) => $(`input[name=${name}]:checked`, section).value;
  const rows = [];
  let selected = -1;

  const figures = (layer, what) => what === "inputs" ? layer.sensitivity?.inputs : layer.sensitivity?.weights[what];
  const kept = (damage) => damage === 0 ? "∞" : (-10 * Math.log10(damage)).toFixed(1).replace("-", "−");

  function fill(cell, damage, confidence) {
    const unknown = damage === null || damage === undefined;
    const off = !unknown && confidence !== "measured" && damage > UNRELIABLE;
    cell.textContent = unknown ? "n/a" : kept(damage);
    cell.className = unknown ? "unknown" : off ? "low off" : confidence;
    // nothing is left of the colour at 60 dB, and all of it is there at 0 dB
    cell.style.setProperty("--h", unknown || damage === 0 ? 0 : Math.round(Math.max(0, Math.min(100, 100 + 1000 / 60 * Math.log10(damage)))));
    cell.dataset.how = unknown ? "not known" : `${words.percent(damage)}, ${off ? "beyond the model: unreliable" : HOW[confidence]}`;
  }

  function line(name) {
    const made = element("tr"), head = element("th");
    head.scope = "row";
    head.append(name);
    made.append(head, ...known.bits.map(() => element("td")));
    return made;
  }

  function build() {
    const head = element("tr");
    head.append(...["Layer", ...known.bits.map((bits) => `${bits} bits`)].map((text) => { const cell = element("th", text); cell.scope = "col"; return cell; }));
    grid.tHead.append(head);
    whole.append(line("All layers at once"));
    data.layers.forEach((layer, i) => {
      const link = element("a", words.visible(layer.name));
      link.href = `#layer=${encodeURIComponent(layer.name)}`;
      link.title = link.textContent;
      rows[i] = line(link);
      rows[i].dataset.i = i;
    });
    sheet.classList.toggle("compact", data.layers.length > 60);
    recolour(); arrange(); mark(selected);
  }

  function recolour() {
    const what = chosen("what"), total = what === "inputs" ? known.total_inputs : known.total[what];
    known.bits.forEach((_, b) => fill(whole.rows[0].cells[b + 1], total[b], "measured"));
    data.layers.forEach((layer, i) => {
      const part = figures(layer, what);
      known.bits.forEach((_, b) => fill(rows[i].cells[b + 1], part?.value[b], part?.confidence[b]));
    });
    grid.caption.textContent = `Decibels kept when each layer's ${what === "inputs" ? "inputs are" : `weights, on a grid per ${what}, are`} rounded`;
  }

  function arrange() { body.append(...order[chosen("order")].map((i) => rows[i])); }

  function mark(now) {
    rows[selected]?.classList.remove("on"); rows[selected]?.removeAttribute("aria-current");
    selected = now;
    const row = rows[now];
    if (!row) return;
    row.classList.add("on"); row.setAttribute("aria-current", "true");
    const above = row.offsetTop - grid.tHead.offsetHeight - whole.offsetHeight, below = row.offsetTop + row.offsetHeight - sheet.clientHeight;
    if (above < sheet.scrollTop) sheet.scrollTop = above; else if (below > sheet.scrollTop) sheet.scrollTop = below;
  }

  function show() { if (section.open && !rows.length) build(); }
  section.addEventListener("toggle", show);
  section.addEventListener("change", (event) => { if (event.target.name === "what") recolour(); else arrange(); });
  document.addEventListener("layer", (event) => mark(event.detail));
  sheet.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td");
    if (cell) cell.title = `${cell.parentNode.cells[0].textContent}, ${known.bits[cell.cellIndex - 1]} bits: ${cell.dataset.how}`;
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
