// Copies and downloads of the mix that is shown, texts for tools, and the keyboard.
const {report, layers, grids} = widths;

const records = () => layers.map((layer, i) => {
  const grid = grids[widths.mix().grids[i]];
  return {layer: layer.name, op: layer.op, shape: layer.shape.join(" x "), weights: layer.weights, bits: grid.bits, granularity: grid.granularity, bytes: layer.options.bytes[widths.mix().grids[i]]};
});
const told = () => ({format: "qvis bit widths", qvis: report.qvis, model: {name: report.model.name, framework: report.model.framework}, average_bits: widths.mix().average_bits,
  layers: layers.map((layer, i) => ({name: layer.name, op: layer.op, shape: layer.shape, ...grids[widths.mix().grids[i]]}))});
const asJson = () => JSON.stringify(told(), null, 1);

Object.assign(frame.actions, {
  json() { frame.save("bit_widths.json", JSON.stringify(report, null, 1), "application/json"); },
  csv() { frame.save("widths.csv", frame.csv(records()), "text/csv"); },
  copy_csv() { frame.copy(frame.csv(records()), "Copied as CSV"); },
  widths_json() { frame.save("widths.json", asJson(), "application/json"); },
  copy_json() { frame.copy(asJson(), "Copied as JSON"); },
  markdown() {
    const mix = widths.mix(), shown = table.visible(), most = 50;
    const head = widths.isChosen() ? report.verdict.text : `${mix.average_bits.toFixed(2)} bits on average, ${widths.size(mix.bytes + report.sizes.rest_bytes)}: the output keeps ${widths.db(widths.kept(mix))} (${widths.sure(mix)}).`;
    const lines = shown.slice(0, most).map((i) => {
      const grid = mix.grids[i];
      return [frame.escape(layers[i].name), frame.escape(layers[i].op), layers[i].weights.toLocaleString("en"), grids[grid].bits, widths.sharing(grids[grid].granularity), layers[i].options.bytes[grid].toLocaleString("en"), table.text(table.kept(i, grid))];
    });
    frame.copy([`**${frame.escape(head)}**`, "", ...frame.markdown([["layer"], ["op"], ["weights", true], ["bits", true], ["grid"], ["bytes", true], ["keeps, dB", true]], lines),
      ...(shown.length > most ? ["", `and ${shown.length - most} more layers`] : [])].join("\n"));
  },
});

for (const button of $$("[data-export]")) button.addEventListener("click", () => {
  const part = button.closest("details"), text = $("pre", part).textContent;
  if (button.dataset.export === "copy") frame.copy(text, "Copied");
  else frame.save(part.dataset.file, text, "text/plain");
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog").open) return;
  if (event.target === table.search) {
    if (event.key === "Escape") { frame.actions.clear(); table.search.blur(); }
    return;
  }
  if (event.key === "/") { event.preventDefault(); table.search.focus(); }
  else if (event.key === "-") frame.actions.smaller();
  else if (event.key === "+" || event.key === "=") frame.actions.larger();
  else if (event.key === "c") frame.actions.chosen();
  else if (event.key === "Escape" && table.search.value) { table.search.value = ""; table.filter(); }
});

let themed;                                                            // the theme to return to after printing
addEventListener("beforeprint", () => { root.classList.add("all"); themed = root.dataset.theme; root.dataset.theme = "light"; });
addEventListener("afterprint", () => { root.dataset.theme = themed; });
frame.showTheme();
await frame.start();
