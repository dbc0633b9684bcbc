// Sorting and filtering of the rows that the server made.
const table = (() => {
  const body = $(".layers > tbody"), heads = $$(".layers > thead th");
  const search = $("[data-test=filter]"), problems = $("[data-test=problems-only]");
  const rows = body ? [...body.rows] : [];
  const byLayer = [];
  const level = rows.map((row) => +row.cells[1].dataset.v);
  const texts = rows.map((row) => `${row.cells[2].textContent} ${row.cells[3].textContent}`.toLowerCase());
  rows.forEach((row) => { byLayer[row.dataset.i] = row; });

  const sort = sorting(body, heads, {
    // words and ranks start with the smallest, measures with the worst
    down: (column, head) => column === 1 || column >= 4 && !["sqnr", "sqnr-channel", "lev", "gain"].some((name) => head.classList.contains(name)),
    then(column, down) {
      $("#layers-title").textContent = column === 0 ? (down ? "Layers, best first" : "Layers, worst first") : "Layers";
      detail.place();
    },
  });

  function filter() {
    const text = search.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => { const show = texts[i].includes(text) && (!problems.checked || level[i] > 1); row.hidden = !show; shown += show; });
    $("[data-test=count]").textContent = shown === rows.length ? words.count(shown, "layer") : `${shown} of ${rows.length}`;
    $(".empty").hidden = shown > 0;
    $(".layers > thead").hidden = shown === 0;
    detail.place();
  }

  function clear() { search.value = ""; problems.checked = false; filter(); }

  search?.addEventListener("input", filter);
  problems?.addEventListener("change", filter);
  body?.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || row.classList.contains("inline") || event.target.closest(".inline")) return;
    event.preventDefault();
    detail.toggle(+row.dataset.i);
  });

  return {
    sort, filter, clear, search, problems,
    row: (layer) => byLayer[layer],
    visible: () => body ? [...body.rows].filter((row) => !row.hidden && !row.classList.contains("inline")) : [],
    mark(old, now) {
      byLayer[old]?.classList.remove("on"); byLayer[old]?.removeAttribute("aria-current");
      byLayer[now]?.classList.add("on"); byLayer[now]?.setAttribute("aria-current", "true");
      document.dispatchEvent(new CustomEvent("layer", {detail: now}));
    },
    columns: () => heads.filter((head) => head.offsetWidth).length,
  };
})();
