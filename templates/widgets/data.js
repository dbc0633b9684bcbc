// The objects that Python wrote as columns.
function rows(found) {
  if (!found?.columns) return found;
  const fields = Object.entries(found.columns).map(([field, column]) => [field, rows(column)]), none = new Set(found.none);
  const count = none.size + (fields[0]?.[1].length ?? 0);
  let at = 0;
  return Array.from({length: count}, (_, i) => {
    if (none.has(i)) return null;
    const row = {};
    for (const [field, column] of fields) row[field] = column[at];
    at++;
    return row;
  });
}

// The summary that Python made, and the statistics of each channel as float32 views on one buffer: one set of arrays for
// each layer of a report, two for a comparison. The arrays are not waited for; `loaded` tells when channels() may be called.
const data = await (async () => {
  let numbers, start = 0;
  const loaded = unpack("channels").then((response) => response.arrayBuffer()).then((bytes) => { numbers = join(bytes); });
  const {document: report, columns, bins, points, distributions, unreliable} = await unpack("payload").then((response) => response.json());
  const changes = report.kind === "changes_after_optimization", layers = report.layers = rows(report.layers);
  for (const {sensitivity} of layers) {
    for (const found of sensitivity ? [...Object.values(sensitivity.weights), sensitivity.inputs] : []) if (found) found.value = found.predicted.map((predicted, i) => found.measured[i] ?? predicted);
  }
  const series = changes ? ["before", "after"] : ["now"];
  const starts = points.map((count, i) => { const at = start; start += (layers[i].stored ? 2 : series.length) * (count * columns.length + bins); return at; });

  function set(index, s) {
    const count = points[index], at = starts[index] + s * (count * columns.length + bins);
    const arrays = Object.fromEntries(columns.map((column, c) => [column, numbers.subarray(at + c * count, at + (c + 1) * count)]));
    return {...arrays, histogram: numbers.subarray(at + count * columns.length, at + count * columns.length + bins)};
  }
  const of = (layer, name) => changes ? layer[name] : layer;
  const channels = (index) => series.map((_, s) => set(index, s));
  return {
    report, changes, series, points, loaded, layers, of, channels, distributions, unreliable,
    // what the figures and tables show: the layer as quantized or, where a normalization was folded in, as the model holds it
    asStored: false,
    parts(index) { const layer = layers[index]; return this.asStored && layer.stored ? [{...layer, ...layer.stored}] : series.map((name) => of(layer, name)); },
    shown(index) { return this.asStored && layers[index].stored ? [set(index, 1)] : channels(index); },
  };
})();
