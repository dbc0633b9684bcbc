// What every page answers to: its colour theme, downloads, copying, help. Widgets add actions, keys,
// and what is to be painted anew.
const frame = (() => {
  const toast = $(".toast"), painters = [];
  let timer;
  function say(text) {
    toast.textContent = text; toast.hidden = false;
    clearTimeout(timer); timer = setTimeout(() => { toast.hidden = true; }, 2000);
  }

  function save(name, content, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], {type}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function copy(text, said = "Copied as Markdown") {
    try { await navigator.clipboard.writeText(text); } catch {         // a file:// page may not use the clipboard
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text; area.select(); document.execCommand("copy"); area.remove();
    }
    say(said);
  }

  // A cell that begins like a formula must stay text in a spreadsheet.
  const guard = (value) => typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : value ?? "";
  const quote = (value) => /[",\n\r]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value;
  const csv = (records) => [Object.keys(records[0] ?? {}), ...records.map(Object.values)].map((row) => row.map((value) => quote(guard(value))).join(",")).join("\r\n") + "\r\n";

  // A table in Markdown: each column a title and whether its cells are numbers.
  const escape = (text) => words.visible(String(text)).replace(/[|\\`*_<>[\]~#&]/g, "\\$&").replace(/[\r\n]+/g, " ");
  const markdown = (columns, lines) => [columns.map(([title]) => title), columns.map(([, number]) => number ? "--:" : "---"), ...lines].map((row) => `| ${row.join(" | ")} |`);

  // A sentence, and a table of a line for each layer, the first of them.
  function copyLayers(sentence, columns, lines, most = 50) {
    const more = lines.length - most;
    copy([`**${escape(sentence)}**`, "", ...markdown(columns, lines.slice(0, most)), ...(more > 0 ? ["", `and ${words.count(more, "more layer")}`] : [])].join("\n"));
  }

  const actions = {
    theme() {
      const order = ["auto", "light", "dark"];
      root.dataset.theme = order[(order.indexOf(root.dataset.theme) + 1) % 3];
      try { localStorage.setItem("qvis-theme", root.dataset.theme); } catch { /* a file:// page may have no storage */ }
      showTheme();
    },
    help() { $("dialog").showModal(); },
  };
  const keys = {t: actions.theme, "?": actions.help};

  function showTheme() {
    const button = $("[data-action=theme]"), theme = root.dataset.theme;
    button.lastElementChild.textContent = theme[0].toUpperCase() + theme.slice(1);
    button.setAttribute("aria-label", `Colour theme: ${theme}`);
    for (const paint of painters) paint();
  }

  document.addEventListener("click", (event) => { const button = event.target.closest("[data-action]"); if (button) actions[button.dataset.action](); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("dialog").open || event.target.matches("input:not([type=radio], [type=checkbox], [type=range]), select, textarea")) return;
    const answer = keys[event.key];
    if (answer) { event.preventDefault(); answer(); }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

  // ready: all words and tables stand, and everything answers; drawn: the figures stand there as well
  async function start(drawing) {
    root.dataset.ready = Math.round(performance.now());
    await drawing;
    root.dataset.drawn = Math.round(performance.now());
    $("[data-test=ready]").textContent = `Ready in ${root.dataset.ready} ms${drawing ? `, figures in ${root.dataset.drawn} ms` : ""}.`;
    setTimeout(() => root.classList.add("all"));
  }

  return {actions, keys, painters, say, save, copy, copyLayers, csv, escape, markdown, showTheme, start};
})();
