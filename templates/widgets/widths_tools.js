// Copies and downloads of the mix that is shown, texts for tools, and keys.
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
    const mix = widths.mix(), shown = table.visible();
    const head = widths.isChosen() ? report.verdict.text : `${mix.average_bits.toFixed(2)} bits on average, ${widths.size(mix.bytes + report.sizes.rest_bytes)}: the output keeps ${widths.db(widths.kept(mix))} (${widths.sure(mix)}).`;
    const lines = shown.map((i) => {
      const grid = mix.grids[i];
      return [frame.escape(layers[i].name), frame.escape(layers[i].op), layers[i].weights.toLocaleString("en"), grids[grid].bits, widths.sharing(grids[grid].granularity), layers[i].options.bytes[grid].toLocaleString("en"), table.text(table.kept(i, grid))];
    });
    frame.copyLayers(head, [["layer"], ["op"], ["weights", true], ["bits", true], ["grid"], ["bytes", true], ["keeps, dB", true]], lines);
  },
});

for (const button of $$("[data-export]")) button.addEventListener("click", () => {
  const part = button.closest("details"), text = $("pre", part).textContent;
  if (button.dataset.export === "copy") frame.copy(text, "Copied");
  else frame.save(part.dataset.file, text, "text/plain");
});

const {smaller, larger, chosen} = frame.actions;
Object.assign(frame.keys, {"-": smaller, "+": larger, "=": larger, c: chosen});

let themed;                                                            // the theme to return to after printing
addEventListener("beforeprint", () => { themed = root.dataset.theme; root.dataset.theme = "light"; });
addEventListener("afterprint", () => { root.dataset.theme = themed; });
frame.showTheme();
await frame.start();
