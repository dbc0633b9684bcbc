// Layers that stay in float: which are marked, what that saves, and the text that tells a tool.
const exclusions = (() => {
  const section = $(".exclusions");
  if (!section) return {};
  const settings = Object.fromEntries(data.report.exclusions.map((one) => [one.tool, one]));
  const button = $("[data-test=exclude]", section), none = $("[data-test=exclude-none]", section), tool = $("select", section);
  const text = $("pre", section), copy = $("[data-test=exclusion-copy]", section);
  const damage = (layer) => layer.sensitivity?.damage ?? null;
  const share = (value) => value === null ? "n/a" : words.percent(value);
  const total = (layers, read) => layers.reduce((sum, layer) => sum + (read(layer) ?? 0), 0);
  const ranked = [...data.layers.keys()].sort((a, b) => data.layers[a].rank - data.layers[b].rank);
  const marked = new Set(ranked.filter((i) => ["problem", "unusable"].includes(data.layers[i].severity)));
  let selected = -1;

  // As Setting.fill of excluding.py composes it.
  function compose(setting, names) {
    const items = new Set(names.flatMap((name) => Object.hasOwn(setting.items, name) ? setting.items[name] : [`'${name}'`]));
    return setting.usable && items.size ? setting.prefix + [...items].join(setting.separator) + setting.suffix : "";
  }
  function explain(setting, names, told) {
    if (!setting.usable) return setting.note;
    const reasons = new Map();
    for (const name of names) if (Object.hasOwn(setting.missing, name)) reasons.set(setting.missing[name], [...(reasons.get(setting.missing[name]) ?? []), words.visible(name)]);
    const notes = [...reasons].map(([why, those]) => `${those.slice(0, 4).join(", ")}${those.length > 4 ? ` and ${those.length - 4} more` : ""}: ${why}`);
    return [...notes, told && setting.note].filter(Boolean).join("; ");
  }

  function line(i) {
    const layer = data.layers[i], made = element("tr"), head = element("th"), link = element("a", words.visible(layer.name)), back = element("button", "×"), last = element("td");
    head.scope = "row"; link.href = `#layer=${encodeURIComponent(layer.name)}`; link.title = link.textContent;
    back.type = "button"; back.setAttribute("aria-label", `Quantize ${link.textContent} after all`);
    back.addEventListener("click", () => { toggle(i); (none.disabled ? tool : none).focus(); });
    head.append(link); last.append(back);
    made.append(head, element("td", share(damage(layer))), element("td", share(layer.sensitivity?.share_of_operations ?? null)), last);
    return made;
  }

  function show() {
    const kept = ranked.filter((i) => marked.has(i)), layers = kept.map((i) => data.layers[i]), others = data.layers.filter((_, i) => !marked.has(i));
    const setting = settings[tool.value], names = layers.map((layer) => layer.name);
    $("tbody", section).replaceChildren(...kept.map(line));
    $(".marked", section).hidden = none.disabled = !kept.length;
    const rest = total(others, damage), before = total(data.layers, damage), what = data.report.sensitivity.loss ? "the loss" : "the output";
    const decibels = rest > 0 ? `${words.percent(rest)} of ${what} (${words.decibels(-10 * Math.log10(rest))})` : "nothing";
    $(".remains", section).textContent = kept.length
      ? `${words.count(kept.length, "layer")} with ${words.percent(total(layers, (layer) => layer.sensitivity?.share_of_operations))} of the operations ${kept.length === 1 ? "stays" : "stay"} in float. The damages of the others add up to ${decibels} at ${data.report.bits} bits, instead of ${words.percent(before)}.`
      : `No layer is marked. The damages of all add up to ${decibels} at ${data.report.bits} bits.`;
    text.textContent = compose(setting, names);
    text.hidden = copy.disabled = !text.textContent;
    $("[data-test=exclusion-note]", section).textContent = explain(setting, names, text.textContent);
    data.layers.forEach((_, i) => table.row(i).classList.toggle("float", marked.has(i)));
    name();
  }

  function name() {
    const layer = data.layers[selected];
    button.disabled = !layer;
    button.textContent = !layer ? "Select a layer to mark it" : `${marked.has(selected) ? "Quantize" : "Leave"} ${words.visible(layer.name)} ${marked.has(selected) ? "after all" : "in float"}`;
  }

  function toggle(i) {
    if (!data.layers[i]) return;
    if (!marked.delete(i)) marked.add(i);
    show();
  }

  button.addEventListener("click", () => toggle(selected));
  none.addEventListener("click", () => { marked.clear(); show(); tool.focus(); });
  tool.addEventListener("change", show);
  copy.addEventListener("click", () => frame.copy(text.textContent, "Copied"));
  document.addEventListener("layer", (event) => { selected = event.detail; name(); });
  frame.keys.x = () => toggle(selected);
  show();
  return {};
})();
