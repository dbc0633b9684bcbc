// What the page is about: the summary that Python made, the numbers of each layer's grids, and the levels of a grid.
const grids = await (async () => {
  const [{document: report, columns, confidences, tables}, bytes] = await Promise.all([
    unpack("payload").then((response) => response.json()), unpack("numbers").then((response) => response.arrayBuffer())]);
  const numbers = join(bytes), {schemes, layers} = report, ran = report.judged_by === "damage";
  const tabled = (scheme) => scheme.kind === "kmeans" ? 2 ** scheme.bits : 0;

  // Where the numbers of each layer and of each part of it begin.
  const books = schemes.reduce((sum, one) => sum + tabled(one), 0);
  let at = 0;
  const starts = layers.map((layer) => {
    const first = at;
    at += columns.length * schemes.length;
    const parts = layer.shown.map(([, , , bars]) => { const start = at; at += bars + 2 * schemes.length + books; return start; });
    return {first, parts};
  });

  const MOST_LEVELS = 512;
  const knownDb = (v) => v > 0 ? -10 * Math.log10(v) : v === 0 ? Infinity : NaN;

  // What each grid does to a layer, best first.
  function results(index) {
    const {first} = starts[index], layer = layers[index];
    const column = Object.fromEntries(columns.map((name, c) => [name, numbers.subarray(first + c * schemes.length, first + (c + 1) * schemes.length)]));
    return schemes.map((scheme, place) => {
      const sqnr = column.sqnr_db[place], damage = column.damage[place];
      return {place, scheme, label: scheme.label, ...size(scheme, layer), sqnr, damage, kept: layer.judged_by === "damage" && ran ? knownDb(damage) : sqnr,
        confidence: confidences[column.confidence[place]] ?? null, rank: column.rank[place], by: column.beaten_by[place], same: column.same_as[place]};
    }).sort((a, b) => a.rank - b.rank);
  }
  // As qvis.quantization.grids.Scheme.bytes has it.
  function size(scheme, {channels, elements}) {
    const group = scheme.granularity === "channel" ? elements : Math.min(scheme.granularity, elements);
    const blocks = scheme.granularity === "tensor" ? 1 : channels * Math.ceil(elements / group), all = channels * elements;
    const bytes = Math.ceil((all * scheme.bits + blocks * scheme.block_bits) / 8);
    return {bytes, bits: 8 * bytes / all};
  }

  // The weights of a part of a layer: how many are where, and the grids that hold them.
  function shown(index, part) {
    const [channel, low, high, bars] = layers[index].shown[part], start = starts[index].parts[part];
    return {channel, low, high, counts: numbers.subarray(start, start + bars), levels: (place) => levels(place, start + bars)};
  }
  // All numbers that a grid can hold; null where the part has several grids, or there are too many to be seen.
  function levels(place, start) {
    const scheme = schemes[place], scale = numbers[start + place], zero = numbers[start + schemes.length + place], {kind, bits} = scheme;
    if (Number.isNaN(scale) || (tables[`${kind} ${bits}`]?.length ?? 2 ** bits) > MOST_LEVELS) return null;
    if (tables[`${kind} ${bits}`]) return tables[`${kind} ${bits}`].map((level) => level * scale);
    const codes = Array.from({length: 2 ** bits}, (_, code) => code);
    if (kind === "kmeans") {
      const before = schemes.slice(0, place).reduce((sum, one) => sum + tabled(one), start + 2 * schemes.length);
      return [...new Set(numbers.subarray(before, before + 2 ** bits))];
    }
    if (kind === "offset") return codes.map((code) => code * scale + zero);
    const signed = scheme.symmetric ? codes.slice(scheme.narrow ? 1 : 0).map((code) => code - 2 ** (bits - 1)) : codes.map((code) => code - zero);
    return signed.map((code) => code * scale);
  }

  const db = (kept) => Number.isNaN(kept) ? "n/a" : Number.isFinite(kept) ? kept.toFixed(1) : "∞";
  const damageText = (one) => Number.isNaN(one.damage) ? "n/a" : words.percent(one.damage) + ({measured: "", low: "?"}[one.confidence] ?? "±");

  // Bits against dB: the frontier is a line with filled marks, what is beaten has open ones, what is drawn is ringed.
  function frontier(host, found, {keep, label, drawn = [], onpick}) {
    const usable = found.filter((one) => one.same === one.place && Number.isFinite(one.kept));
    const point = (one) => [one.bits, one.kept, `${one.label}\n${one.bits.toFixed(2)} bits a weight, ${words.size(one.bytes)}\n${db(one.kept)} dB kept${one.by < 0 ? "" : `\nbeaten by ${schemes[one.by].label}`}`, one.place];
    const best = usable.filter((one) => one.by < 0).sort((a, b) => a.bits - b.bits || a.kept - b.kept);
    chart(host, {height: 260, label, onpick, x: {label: "bits a weight"}, y: {label: ran ? "dB of the output kept" : "dB of the weights kept"}, series: [
      {kind: "rows", colour: "stem", name: `${keep} dB`, points: [[0, keep]]},
      {kind: "dots", colour: "stem", style: "open", size: 3, name: "beaten", points: usable.filter((one) => one.by >= 0).map(point)},
      {kind: "line", colour: "accent", points: best.map(point)},
      {kind: "dots", colour: "accent", name: "on the frontier", points: best.map(point)},
      ...(drawn.length ? [{kind: "dots", colour: "watch", style: "open", size: 7, name: "levels are drawn", points: usable.filter((one) => drawn.includes(one.place)).map(point)}] : []),
    ]});
  }

  return {report, schemes, layers, ran, results, shown, frontier, db, damageText};
})();

const table = (() => {
  const list = listing({then: () => detail.place()});
  sorting(list.body, list.heads, {down: (_, head) => head.classList.contains("num"), then: () => detail.place()});
  return list;
})();
