// The panel of the selected layer: findings in words, figures, tables.
const detail = (() => {
  if (!$(".detail")) return {place() {}, select() {}, start() {}};
  const FLAG_WORDS = [[1, "outlier"], [2, "starved"], [4, "near dead"], [8, "dead"], [16, "NaN or infinite"]];
  const VERBS = {ok: "Leave it.", watch: "Watch it.", problem: "Fix it.", unusable: "Unusable."};
  const CHANGES = {better: "Better.", worse: "Worse.", same: "About the same.", unchanged: "Unchanged.", rounded: "Rounded already."};

  function tell(layer) {
    const part = data.of(layer, "after"), lines = [];
    const evidence = (text) => element("span", ` (${text})`, "evidence");
    if (data.changes) {
      const first = element("p", "", "first");
      first.append(element("span", CHANGES[layer.verdict], `verb ${layer.verdict}`), ` ${words.unbroken(layer.text)}`, evidence(data.report.evidence));
      lines.push(first);
    }
    part.reasons.forEach((reason, i) => {
      const line = element("p", "", i === 0 && !data.changes ? "first" : "");
      if (i === 0) line.append(element("span", data.changes ? `Now ${layer.severity}.` : VERBS[layer.severity], `verb ${layer.severity}`), " ");
      line.append(words.unbroken(reason.text), evidence(reason.evidence));
      lines.push(line);
    });
    $(".findings").replaceChildren(...lines);
    const which = $("[data-test=which]");
    if (which) which.hidden = !layer.stored;
    if (layer.stored) $(".note", which).textContent = data.asStored
      ? "Shown: the weights as the model holds them. The findings are about the quantized ones."
      : `Shown: with ${layer.norms.map(words.visible).join(" and ")} folded in, which is what gets rounded.`;
    const shape = part.shape.join("×") || "scalar";
    const extra = [data.changes && layer.name_before !== layer.name && `before: ${words.visible(layer.name_before)}`, part.aliases.length && `tied to ${part.aliases.map(words.visible).join(", ")}`, ...part.notes].filter(Boolean);
    $(".detail-meta").textContent = [`${part.op} ${shape} ${part.dtype}`, words.count(part.weights, "weight"), `${words.count(part.channels, "output channel")} (${part.channels_from})`, `layer ${chosen.selected() + 1} of ${data.layers.length}`, ...extra].join(", ");
  }

  function row(head, cells) {
    const line = element("tr"), first = element("th", head);
    first.scope = "row";
    line.append(first, ...cells.map((cell) => element("td", cell)));
    return line;
  }
  function header(target, names) {
    const line = element("tr");
    line.append(...names.map((name) => {
      const [first, second] = name.split(", "), head = element("th", first);
      head.scope = "col";
      if (second) head.append(element("small", second));
      return head;
    }));
    $("thead", target).replaceChildren(line);
  }
  function tabulate() {
    const parts = data.parts(chosen.selected());
    const statistics = $("[data-test=statistics]"), rounding = $("[data-test=rounding]");
    header(statistics, [...(data.changes ? [""] : []), "count", "mean", "deviation", "min", "25 %", "50 %", "75 %", "max"]);
    $("tbody", statistics).replaceChildren(...parts.map((part, i) => {
      const s = part.relative_range_statistics;
      const cells = [s.count, ...["mean", "std", "min", "q25", "q50", "q75", "max"].map((key) => s[key] === null ? "n/a" : words.short(s[key]))];
      if (data.changes) return row(data.series[i], cells);
      const line = element("tr");
      line.append(...cells.map((cell) => element("td", cell)));
      return line;
    }));
    header(rounding, ["", ...(data.changes ? ["tensor, before", "tensor, after", "channel, before", "channel, after"] : ["grid per tensor", "grid per channel"])]);
    const both = (a, b, words) => [...parts.map((part) => words(part[a])), ...parts.map((part) => words(part[b]))];
    const share = (value) => value === null ? "n/a" : words.percent(value);
    const kept = (value, noise) => value === null && noise !== null ? "∞" : words.decibels(value);   // JSON has no sign for it
    const whole = (head, read) => { const line = row(head, parts.map(read)); [...line.cells].slice(1).forEach((cell) => { cell.colSpan = 2; }); return line; };
    $("tbody", rounding).replaceChildren(
      row("Noise of a quarter of the channels", both("noise_share", "noise_share_channel", share)),
      row("SQNR of all weights", [...parts.map((part) => kept(part.sqnr_tensor_db, part.noise_share)), ...parts.map((part) => kept(part.sqnr_channel_db, part.noise_share_channel))]),
      whole("Step of the tensor's grid", (part) => words.number(part.step)),
      whole("Levels of the median channel", (part) => `${part.median_levels} of ${2 ** data.report.bits}`),
      whole("Starved, near dead, dead channels", (part) => `${part.flags.starved.length}, ${part.flags.near_dead.length}, ${part.flags.dead.length} of ${part.channels}`));
  }

  const channels = $(".channels");
  async function listChannels() {
    if (!channels.open || chosen.selected() < 0) return;
    await data.loaded;
    if (chosen.selected() < 0) return;
    const layer = data.layers[chosen.selected()], sets = data.shown(chosen.selected()), grid = document.createElement("table");
    const names = ["min", "q25", "q50", "mean", "q75", "max", "std", "relative_range"], titles = ["min", "25 %", "50 %", "mean", "75 %", "max", "deviation", "relative range"];
    const head = grid.createTHead().insertRow();
    for (const title of ["channel", ...(data.changes ? [""] : []), ...titles, "note"]) { const cell = element("th", title); cell.scope = "col"; head.append(cell); }
    const body = grid.createTBody(), total = data.of(layer, "after").channels;
    for (let i = 0; i < sets[0].channel.length; i++) {
      sets.forEach((set, s) => {
        const first = set.channel[i], next = i + 1 < set.channel.length ? set.channel[i + 1] : total;
        const note = FLAG_WORDS.filter(([bit]) => set.flags[i] & bit).map(([, word]) => word).join(", ");
        const line = body.insertRow();
        const cells = [next - first > 1 ? `${first} to ${next - 1}` : first, ...(data.changes ? [data.series[s]] : []), ...names.map((name) => words.number(set[name][i])), note];
        line.append(...cells.map((cell) => element("td", cell)));
      });
    }
    $("div", channels).replaceChildren(grid);
  }
  channels.addEventListener("toggle", listChannels);
  $$("[name=which]").forEach((input) => input.addEventListener("change", () => {
    data.asStored = $("[name=which][value=stored]").checked;
    chosen.select(chosen.selected(), {quiet: true});
  }));

  const chosen = choosing(data.layers, table, {
    tell(layer, index) {
      $("#detail-name").textContent = words.visible(layer.name);
      tell(layer); tabulate(); listChannels(); damage.tell(layer); distributions.tell(index);
    },
    draw: (index) => figures.show(index),
    mark(old, now) {
      overview.mark(old, now);
      document.dispatchEvent(new CustomEvent("layer", {detail: now}));
    },
  });
  return chosen;
})();
