// Downloads and copying, the chart of the whole model, and what is shown first.
const round = (value) => Number.isFinite(value) ? +value.toPrecision(4) : null;
function records() {
  return grids.layers.flatMap((layer, index) => grids.results(index).filter((one) => one.same === one.place).map((one) => ({
    layer: layer.name, rank: one.rank, grid: one.label, bits_per_weight: round(one.bits), bytes: one.bytes, sqnr_db: round(one.sqnr),
    ...(grids.ran ? {damage: round(one.damage)} : {}), runs_on: one.scheme.runs_on, beaten_by: one.by < 0 ? "" : grids.schemes[one.by].label})));
}
// The summary with the figures of each layer put back in the order of the schemes.
function summary() {
  const layers = grids.layers.map((layer, index) => {
    const found = grids.results(index).sort((a, b) => a.place - b.place), column = (read) => found.map(read);
    return {...layer, grids: {rank: column((one) => one.rank), bytes: column((one) => one.bytes), bits_per_weight: column((one) => round(one.bits)), sqnr_db: column((one) => round(one.sqnr)), damage: column((one) => round(one.damage)), beaten_by: column((one) => one.by < 0 ? null : one.by), same_as: column((one) => one.same)}};
  });
  return {...grids.report, layers};
}
Object.assign(frame.actions, {
  csv() { frame.save("grids.csv", frame.csv(records()), "text/csv"); },
  json() { frame.save("grids.json", JSON.stringify(summary(), null, 1), "application/json"); },
  markdown() {
    const {escape} = frame, once = grids.schemes.filter((one) => one.same_as === null).sort((a, b) => a.rank - b.rank).slice(0, 20);
    const cell = (value) => value === null ? "n/a" : String(value);
    frame.copy([`**${escape(grids.report.verdict.text)}**`, "", ...grids.report.answers.map((one) => `- **${escape(one.question)}** ${escape(one.short)}: ${escape(one.text)}`), "",
      ...frame.markdown([["grid"], ["bits a weight", true], ["size", true], ["SQNR dB", true], ...(grids.ran ? [["damage", true]] : []), ["runs on"], ["beaten by"]],
        once.map((one) => [escape(one.label), cell(one.bits_per_weight), words.size(one.bytes), cell(one.sqnr_db), ...(grids.ran ? [one.damage === null ? "n/a" : words.percent(one.damage)] : []), one.runs_on, one.beaten_by ?? "none"]))].join("\n"));
  },
});

const whole = grids.schemes.map((scheme, place) => ({place, scheme, label: scheme.label, bytes: scheme.bytes, bits: scheme.bits_per_weight ?? NaN, kept: scheme.kept_db ?? NaN,
  by: grids.schemes.findIndex((one) => one.label === scheme.beaten_by), same: scheme.same_as === null ? place : -1}));
grids.frontier($("#whole-chart"), whole, {keep: grids.report.keep_total_db, label: "What each grid keeps of the model by the bits that it takes. The table holds the numbers."});
frame.showTheme();
await frame.start(detail.start());
