// Downloads and copying.
const tools = (() => {
  const {escape} = frame;
  const save = (extension, text, type) => frame.save(`${data.report.kind}.${extension}`, text, type);

  const FIELDS = ["noise_share", "noise_share_channel", "sqnr_tensor_db", "sqnr_channel_db", "largest_relative_range", "median_levels"];
  const FLAGS = ["outliers", "starved", "near_dead", "dead", "nonfinite"];
  function damages(layer) {
    const known = layer.sensitivity, at = data.report.sensitivity.bits.indexOf(data.report.bits);
    return {damage: known?.damage ?? null, confidence: known?.confidence ?? null, damage_channel: known?.weights.channel?.value[at] ?? null, damage_inputs: known?.damage_inputs ?? null, share_of_operations: known?.share_of_operations ?? null};
  }
  function records() {
    return [...data.layers].sort((a, b) => a.rank - b.rank).map((layer) => {
      const record = {rank: layer.rank, layer: layer.name, op: layer.op, shape: data.of(layer, "after").shape.join("x"), severity: layer.severity};
      if (data.changes) Object.assign(record, {layer_before: layer.name_before, verdict: layer.verdict, gain_db: layer.gain_db});
      if (data.report.sensitivity) Object.assign(record, damages(layer));
      for (const name of data.series) {
        const part = data.of(layer, name), suffix = data.changes ? `_${name}` : "";
        for (const field of FIELDS) record[field + suffix] = part[field];
        for (const flag of FLAGS) record[flag + suffix] = part.flags[flag].length;
      }
      return record;
    });
  }

  // The summary with the channels' statistics put back, where the page has them one by one.
  function whole() {
    const KEYS = ["min", "q25", "q50", "mean", "q75", "max", "std", "relative_range"];
    const fill = (part, arrays) => arrays.channel.length < part.channels ? part : {...part, statistics: Object.fromEntries(KEYS.map((key) => [key, Array.from(arrays[key], (v) => Number.isFinite(v) ? v : null)]))};
    const layers = data.layers.map((layer, i) => {
      const sets = data.channels(i);
      return data.changes ? {...layer, before: fill(layer.before, sets[0]), after: fill(layer.after, sets[1])} : fill(layer, sets[0]);
    });
    return {...data.report, layers};
  }

  Object.assign(frame.actions, {
    csv() { save("csv", frame.csv(records()), "text/csv"); },
    async json() { await data.loaded; save("json", JSON.stringify(whole(), null, 1), "application/json"); },
    markdown() {
      const shown = new Set(table.visible().map((row) => +row.dataset.i));
      const all = [...data.layers.entries()].filter(([i]) => shown.has(i)).map(([, layer]) => layer).sort((a, b) => a.rank - b.rank);
      const cell = (value) => value === null ? "n/a" : words.percent(value);
      const ran = data.report.sensitivity;
      const head = ran ? ["damage", "per channel", "of inputs"] : data.changes ? ["noise before", "noise after"] : ["rounding noise"];
      const lines = all.map((layer) => [layer.rank, escape(layer.name), escape(layer.op), layer.severity, ...(ran ? [damages(layer).damage, damages(layer).damage_channel, damages(layer).damage_inputs] : data.series.map((name) => data.of(layer, name).noise_share)).map(cell)]);
      frame.copyLayers(data.report.verdict.text, [["#", true], ["layer"], ["op"], ["severity"], ...head.map((title) => [title, true])], lines);
    },
  });

  frame.painters.push(() => figures.paint());
  let before;                                                          // the theme to return to after printing
  addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; figures.paint(); figures.repaint(); });
  addEventListener("afterprint", () => { root.dataset.theme = before; before = undefined; figures.paint(); });
  return {printing: () => before !== undefined};
})();
