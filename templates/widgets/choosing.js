// The panel of one layer, which is chosen by its row, by keys or by the address. `tell` fills the panel, `draw` what may come
// later, `mark` is told which layer was shown and which is, or -1 for none.
const choosing = (layers, table, {tell, draw = () => {}, mark = () => {}}) => {
  const panel = $(".detail"), home = $("main");
  let selected = -1;

  // On a narrow screen the panel opens under its row.
  function place() {
    const under = table.row(selected);
    let holder = $("tr.inline");
    if (narrow.matches && under && !matchMedia("print").matches) {
      if (!holder) { holder = element("tr", "", "inline"); holder.append(element("td")); }
      holder.firstChild.colSpan = table.columns();
      holder.hidden = under.hidden;
      if (panel.parentNode !== holder.firstChild) holder.firstChild.append(panel);
      if (under.nextSibling !== holder) under.after(holder);
    } else if (panel.parentNode !== home) { home.append(panel); holder?.remove(); }
  }

  function turn(index) {
    table.mark(selected, index); mark(selected, index);
    selected = index;
    panel.hidden = index < 0;
    place();
  }
  // `instant` is for the first time, when rows further down are not laid out yet.
  async function select(index, {scroll = false, quiet = false, instant = false} = {}) {
    turn(index);
    tell(layers[index], index);
    if (!quiet) history.replaceState(null, "", `#layer=${encodeURIComponent(layers[index].name)}`);
    if (scroll) { if (instant) root.classList.add("all"); table.row(index).scrollIntoView({block: instant ? "center" : narrow.matches ? "start" : "nearest"}); }
    await draw(index);
  }
  function close() {
    turn(-1);
    if (fromHash() >= 0) history.replaceState(null, "", location.pathname + location.search);
  }
  const layerOf = (row) => +row.dataset.i, first = (options) => { const [row] = table.visible(); return row && select(layerOf(row), options); };
  function move(by) {
    const rows = table.visible(), at = rows.indexOf(table.row(selected)), next = rows[Math.max(0, Math.min(rows.length - 1, at + by))];
    if (next) select(layerOf(next), {scroll: true});
  }
  function fromHash() {
    if (!location.hash.startsWith("#layer=")) return -1;
    try { const name = decodeURIComponent(location.hash.slice(7)); return layers.findIndex((layer) => layer.name === name); } catch { return -1; }
  }
  function start() {
    if (table.search?.value) table.filter();                           // a browser brings back what was written
    const wanted = fromHash();
    if (wanted >= 0) return select(wanted, {scroll: true, instant: true});
    if (!narrow.matches) return first({quiet: true});
    return close();
  }

  table.body?.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || event.target.closest(".inline")) return;
    event.preventDefault();
    if (narrow.matches && layerOf(row) === selected) close(); else select(layerOf(row));
  });
  table.search?.addEventListener("keydown", (event) => { if (event.key === "Enter" && table.visible().length) { table.search.blur(); first({scroll: true}); } });
  Object.assign(frame.actions, {next: () => move(1), previous: () => move(-1)});
  Object.assign(frame.keys, {j: frame.actions.next, k: frame.actions.previous});
  addEventListener("hashchange", () => { const wanted = fromHash(); if (wanted >= 0) select(wanted, {scroll: true}); });
  narrow.addEventListener("change", () => { if (selected < 0 && !narrow.matches) first({quiet: true}); else place(); });
  addEventListener("beforeprint", place);
  addEventListener("afterprint", place);

  return {place, select, close, start, selected: () => selected};
};
