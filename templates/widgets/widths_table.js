// The layers: their widths in the mix that is shown, and what each width would cost them.
const table = (() => {
  const {report, layers, grids, columns, isKnown, listeners} = widths, ALL_KEPT = 9999;
  const list = listing({read: (row) => `${row.cells[1].textContent} ${row.cells[2].textContent}`}), rows = list.all;
  const chosen = $$("[data-test=granularity] input");
  let found = -1;
  const several = report.granularities.length > 1, FIRST = 7;          // the first column of damages
  const place = (bits, granularity) => grids.findIndex((grid) => grid.bits === bits && String(grid.granularity) === granularity);
  // JSON has no infinity: a damage of nothing is what is kept in full
  const kept = (i, grid) => { const one = layers[i].options; return one.damage[grid] === 0 ? Infinity : one.damage_db[grid] ?? null; };
  const whole = new Intl.NumberFormat("en");
  const text = (value) => value === null ? "n/a" : isKnown(value) ? value.toFixed(1).replace("-", "−") : "all";
  const key = (value) => value === null ? "" : isKnown(value) ? value : ALL_KEPT;

  function fill(cell, value, content) {
    cell.dataset.v = key(value);
    if (cell.textContent !== content) cell.textContent = content;
  }

  function show() {
    const mix = widths.mix(), granularity = chosen.find((one) => one.checked)?.value ?? String(report.granularities[0]);
    const shown = columns.map((grid) => place(grids[grid].bits, granularity));
    rows.forEach((row, i) => {
      const grid = mix.grids[i], {bits, granularity: own} = grids[grid], bytes = layers[i].options.bytes[grid], cell = row.cells[4];
      cell.dataset.v = bits;
      $("b", cell).textContent = bits;
      if (several) $("small", cell).textContent = widths.sharing(own);
      fill(row.cells[5], bytes, whole.format(bytes));
      fill(row.cells[6], kept(i, grid), text(kept(i, grid)));
      shown.forEach((one, column) => {
        const at = row.cells[FIRST + column], value = one < 0 ? null : kept(i, one);
        fill(at, value, text(value));
        at.classList.toggle("on", one === grid);
        at.classList.toggle("near", one !== grid && grids[columns[column]].bits === bits);
      });
    });
    $("[data-test=columns-for]").textContent = widths.sharing(isNaN(granularity) ? granularity : +granularity);
  }

  sorting(list.body, list.heads, {
    down: (column) => column >= 3 && column <= 5,                      // sizes with the largest, dB with the least kept
    then() {},
  });

  // A bar of the picture leads to its layer, in the middle of the window.
  function find(i) {
    if (list.row(i).hidden) list.clear();
    root.classList.add("all");                                         // rows far down are laid out late
    list.mark(found, i);
    found = i;
    list.row(i).scrollIntoView({block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
  }
  $(".strip").addEventListener("click", (event) => { const bar = event.target.closest("li"); if (bar) find(+bar.dataset.i); });

  for (const one of chosen) one.addEventListener("change", show);
  listeners.push(show);
  if (chosen.some((one) => one.checked && one.value !== String(report.granularities[0]))) show();  // a browser brings back what was marked
  if (list.search.value) list.filter();
  return {kept, text, visible: () => list.visible().map((row) => +row.dataset.i)};
})();
