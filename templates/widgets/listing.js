// The rows of layers that the server made: filtering them, and marking one. `read` tells what of a row is searched,
// `troubled` which rows are left when only problems are asked for; `then` is called when other rows are shown.
const listing = ({read = (row) => row.textContent, troubled, then = () => {}}) => {
  const body = $(".layers > tbody"), heads = $$(".layers > thead th"), all = body ? [...body.rows] : [], byLayer = [];
  const search = $("[data-test=filter]"), problems = $("[data-test=problems-only]");
  const texts = all.map((row) => read(row).toLowerCase());
  all.forEach((row) => { byLayer[row.dataset.i] = row; });

  function filter() {
    const text = search.value.trim().toLowerCase();
    let shown = 0;
    all.forEach((row, i) => { const show = texts[i].includes(text) && (!problems?.checked || troubled(row)); row.hidden = !show; shown += show; });
    $("[data-test=count]").textContent = shown === all.length ? words.count(shown, "layer") : `${shown} of ${all.length}`;
    $(".empty").hidden = shown > 0;
    $(".layers > thead").hidden = shown === 0;
    then();
  }
  function clear() { search.value = ""; if (problems) problems.checked = false; filter(); }

  if (search) {
    search.addEventListener("input", filter);
    search.addEventListener("keydown", (event) => { if (event.key === "Escape") { clear(); search.blur(); } });
    frame.actions.clear = () => { clear(); search.focus(); };
    Object.assign(frame.keys, {"/": () => search.focus(), Escape: clear});
  }
  if (problems) {
    problems.addEventListener("change", filter);
    frame.keys.p = () => { problems.checked = !problems.checked; filter(); };
  }
  addEventListener("beforeprint", () => root.classList.add("all"));

  return {
    body, heads, all, search, filter, clear,
    row: (layer) => byLayer[layer],
    visible: () => body ? [...body.rows].filter((row) => !row.hidden && !row.classList.contains("inline")) : [],
    mark(old, now) {
      byLayer[old]?.classList.remove("on"); byLayer[old]?.removeAttribute("aria-current");
      byLayer[now]?.classList.add("on"); byLayer[now]?.setAttribute("aria-current", "true");
    },
    columns: () => heads.filter((head) => head.offsetWidth).length,
  };
};
